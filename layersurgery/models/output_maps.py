"""Apply a linear map to what a branch adds to the stream, by changing the weights of its output projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import PlanError, UnsupportedEditError
from ..plans.visit import Branch
from .block_parts import BlockParts
from .block_probe import BlockProbe
from .block_view import share_parameters
from .numerics import is_same_change, tolerance
from .quantized import is_quantized
from .weight_change import install_changes
from .weight_conventions import output_dim

_TRIAL_SIZE = 0.5


@dataclass(frozen=True, slots=True)
class OutputMap:
    """Linear map of the output of one parameter: its new output is the old one, times 1 + `delta`.

    Attributes:
        parameter: its name, relative to the block.
        dim: dimension along which the parameter writes the stream, counted from the last one (-1), since a file may
            hold each expert of a parameter by itself.
        delta: float64, (width, width).
    """

    parameter: str
    dim: int
    delta: torch.Tensor = field(compare=False)
    is_product = False

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the changed weight; computed in float64, and rounded once.

        Raises:
            PlanError: a finite number becomes infinite.
        """
        rows = weight.to("cpu", torch.float64).movedim(self.dim, -1)
        changed = (rows + rows @ self.delta).movedim(-1, self.dim).to(weight.dtype)
        if not bool(changed.isfinite().all()) and bool(weight.isfinite().all()):
            raise PlanError(f"a linear map makes numbers of {self.parameter} too large for its data type")
        return changed.contiguous().to(weight.device)


OutputMaps = Mapping[int, Sequence[OutputMap]]
"""Maps of what branches add, by the position of their block in an edited model."""


def find_output_maps(
    probe: BlockProbe, parts: BlockParts, name: str, delta: torch.Tensor, branch: Branch = "mlp"
) -> tuple[OutputMap, ...]:
    """Return the maps of a block's parameters that multiply what a branch adds to the stream by 1 + `delta`.

    What is found by structure is confirmed by running the block with a random map.

    Args:
        probe: the block.
        parts: its parts.
        name: its name, for errors.
        delta: float64, (width, width).
        branch: the branch.

    Raises:
        UnsupportedEditError: no weights of this kind of block do that; gives the reason.
    """
    refusal = f"no linear map can be folded into the {branch} of {name}"
    skips = () if parts.skip_error else parts.skips(branch)
    if not skips:
        raise UnsupportedEditError(f"{refusal}: {parts.skip_error or 'it has none'}")
    if any(skip.path in parts.norms_after for skip in skips):
        raise UnsupportedEditError(f"{refusal}: a norm follows its output projection")
    width = probe.stream.shape[-1]
    dims: dict[str, int] = {}
    for output in parts.outputs(branch):
        path, _, key = output.rpartition(".")
        owner, parameter = probe.block.get_submodule(path), probe.block.get_parameter(output)
        if not parameter.is_floating_point() or is_quantized(owner):
            raise UnsupportedEditError(f"{refusal}: {output} is quantized")
        dims[output] = (0 if parameter.dim() == 1 else output_dim(owner, key, width)) - parameter.dim()
    generator = torch.Generator().manual_seed(5)
    trial = torch.randn(width, width, generator=generator, dtype=torch.float64) * (_TRIAL_SIZE / width**0.5)
    whole, without = probe.run(), probe.without(skips)
    added = (whole - without).double().cpu()
    expected = without + (added + added @ trial).to(whole.device, whole.dtype)
    edited = share_parameters(probe.block)
    install_changes(edited, [OutputMap(output, dim, trial) for output, dim in dims.items()])
    if not dims or not is_same_change(probe.run(edited), expected, whole, tolerance("fit", whole.dtype)):
        raise UnsupportedEditError(f"{refusal}: no weights were found that alone write what it adds to the stream")
    return tuple(OutputMap(output, dim, delta) for output, dim in dims.items())
