"""Change single parameters of a block: multiply them, set units to zero, or replace them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from ..errors import PlanError, UnsupportedEditError


@dataclass(frozen=True, slots=True)
class WeightChange:
    """Change of one parameter of a block.

    Attributes:
        parameter: its name, relative to the block.
        factor: number by which it is multiplied.
        offset: number that the module adds to it before it uses it: 1 in a norm that multiplies by 1 + weight.
        units: numbers of the units that become zero.
        unit_size: number of indexes of one unit.
        dim: dimension of the units.
        value: what the parameter becomes, in the place of all this; None for no such value.
    """

    parameter: str
    factor: float = 1.0
    offset: float = 0.0
    units: tuple[int, ...] = ()
    unit_size: int = 1
    dim: int = 0
    value: torch.Tensor | None = field(default=None, compare=False)

    @property
    def is_product(self) -> bool:
        """Return whether every number is multiplied by one factor, so that the layout makes no difference."""
        return not self.units and not self.offset and self.value is None

    @property
    def indexes(self) -> torch.Tensor:
        """Return the indexes that become zero."""
        return (torch.tensor(self.units)[:, None] * self.unit_size + torch.arange(self.unit_size)).flatten()

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the changed weight; computed in float32 at least, and rounded once.

        Raises:
            PlanError: the factor makes a finite number infinite.
        """
        if self.value is not None:
            changed = self.value.to(weight.device, weight.dtype)
            if not bool(changed.isfinite().all()):
                raise PlanError(
                    f"the mean that {self.parameter} would hold has numbers larger than "
                    f"{str(weight.dtype).removeprefix('torch.')} can hold"
                )
            return changed.clone()
        if not self.factor:  # also of numbers that are infinite
            return torch.full_like(weight, -self.offset if self.offset else 0.0)
        exact = torch.promote_types(weight.dtype, torch.float32)
        changed = ((weight.to(exact) + self.offset) * self.factor - self.offset).to(weight.dtype)
        if self.factor != 1 and bool((weight.isfinite() & ~changed.isfinite()).any()):
            raise PlanError(
                f"a factor of {self.factor:g} makes numbers of {self.parameter} larger than "
                f"{str(weight.dtype).removeprefix('torch.')} can hold; choose a smaller one"
            )
        return changed.index_fill_(self.dim, self.indexes.to(weight.device), 0) if self.units else changed


class ParameterChange(Protocol):
    """Hold the change of one parameter, named relative to the block."""

    @property
    def parameter(self) -> str:
        """Return its name."""

    def apply(self, weight: torch.Tensor, /) -> torch.Tensor:
        """Return the changed weight."""


def install_changes(block: nn.Module, changes: Iterable[ParameterChange]) -> None:
    """Change weights of `block` in place: new parameters take the place of the old ones.

    `block` must be a view, so that the original is not changed, or a block that is edited for good.

    Raises:
        UnsupportedEditError: a weight is offloaded, so it has no values to change.
    """
    for change in changes:
        path, _, name = change.parameter.rpartition(".")
        owner = block.get_submodule(path)
        parameter = owner._parameters[name]
        assert parameter is not None
        if parameter.is_meta:
            raise UnsupportedEditError(
                f"{change.parameter} is offloaded, and weights that are changed must be in memory; load "
                "the model without offloading, or edit the checkpoint on disk"
            )
        owner._parameters[name] = nn.Parameter(change.apply(parameter.detach()), requires_grad=parameter.requires_grad)
