"""Find which weights of a block to change so that a branch is scaled, or heads or neurons of it are off.

What is found by structure is confirmed by running the block: the changed weights must give the scaled output, or the
output that the block has if the input of the projection is zero there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ..errors import PlanError, UnsupportedEditError
from ..plans.visit import BRANCHES, Branch, Visit
from .block_parts import BlockParts
from .block_probe import BlockProbe
from .block_view import share_parameters
from .call_tracing import ModuleWrapper, random_like
from .head_columns import count_head_columns
from .later_tokens import find_later_tokens, install_later_tokens
from .numerics import is_same_change, tolerance
from .quantized import is_quantized
from .skipped_branch import SkipSpec, install_skips
from .weight_change import WeightChange, install_changes
from .weight_conventions import output_dim

_TRIAL_FACTOR = -0.5
_UNITS: dict[Branch, str] = {"attention": "head", "mlp": "neuron"}


@dataclass(frozen=True, slots=True)
class _UnitLayout:
    """Place of a branch's heads or neurons in the weight that writes the stream."""

    parameter: str
    dim: int
    count: int
    size: int


class BlockWeights:
    """Find the weights to change in one kind of block.

    Args:
        probe: a block of this kind.
        parts: its parts.
        name: its name, for errors.
    """

    def __init__(self, probe: BlockProbe, parts: BlockParts, name: str) -> None:
        self._probe, self.parts, self._name = probe, parts, name
        self._scaled = cache(self._find_scaled)
        self._layout = cache(self._find_layout)
        self._zeroed = cache(self._find_zeroed)
        self._bias = cache(self._find_bias)

    def changes(self, visit: Visit) -> tuple[WeightChange, ...]:
        """Return the changes of a visit's weights, in the order in which to make them.

        Raises:
            UnsupportedEditError: this kind of block cannot be changed in this way; gives the reason.
            PlanError: the block does not have a head or neuron of a number.
        """
        if visit.start:
            self._check_later_tokens(visit)
            return ()
        changes: list[WeightChange] = []
        if visit.zeroed:
            return tuple(change for branch in BRANCHES if self._has(branch) for change in self._zeroed(branch))
        for branch in BRANCHES:
            if units := visit.units_off(branch):
                layout = self._layout(branch)
                if units[-1] >= layout.count:
                    raise PlanError(
                        f"block {visit.block} has no {_UNITS[branch]} {units[-1]}: it has {layout.count} "
                        f"{_UNITS[branch]}s, 0 to {layout.count - 1}"
                    )
                changes.append(WeightChange(layout.parameter, units=units, unit_size=layout.size, dim=layout.dim))
            factor = visit.factor(branch)
            if visit.attention == visit.mlp and self._has_one_branch and not self.parts.skips(branch):
                continue  # the whole block is scaled
            if factor and factor is not True:
                changes += (WeightChange(name, factor, offset) for name, offset in self._scaled(branch))
        return tuple(changes)

    def _check_later_tokens(self, visit: Visit) -> None:
        """Check that the factors of later tokens scale what each branch adds, by running the block without the other.

        The whole block can be dropped at later tokens whatever it consists of.
        """
        changed = [branch for branch in BRANCHES if visit.factor(branch) is not True]
        if not visit.attention and not visit.mlp:
            return
        if visit.attention == visit.mlp and self._has_one_branch:
            changed = [branch for branch in BRANCHES if self.parts.skips(branch)]
        for branch in changed:
            self._check_branch(branch)
            probe, others = self._probe, self.parts.skips("mlp" if branch == "attention" else "attention")
            factors: dict[str, Any] = {branch: _TRIAL_FACTOR}
            edited = share_parameters(probe.block)
            install_skips(edited, others)
            install_later_tokens(edited, find_later_tokens(Visit(0, start=3, **factors), self.parts))
            whole = probe.without(others)
            expected = probe.stream + _TRIAL_FACTOR * (whole - probe.stream)
            expected[..., :3, :] = whole[..., :3, :]
            if not is_same_change(probe.run(edited), expected, probe.stream, tolerance("fit", expected.dtype)):
                raise self._refuse(f"the {branch}", "what it adds to single tokens cannot be scaled")

    def count_units(self, branch: Branch) -> int:
        """Return the number of heads, or of neurons.

        Raises:
            UnsupportedEditError: they cannot be turned off one by one; gives the reason.
        """
        return self._layout(branch).count

    @property
    def _has_one_branch(self) -> bool:
        return bool(self.parts.attention_skips) != bool(self.parts.mlp_skips)

    def _refuse(self, what: str, reason: str) -> UnsupportedEditError:
        return UnsupportedEditError(f"{what} of {self._name} cannot be changed: {reason}")

    def _find_scaled(self, branch: Branch) -> tuple[tuple[str, float], ...]:
        """Return the parameters that scale a branch, each with its offset."""
        probe, parts = self._probe, self.parts
        skips = self._check_branch(branch)
        others = parts.skips("mlp" if branch == "attention" else "attention")
        whole = probe.without(others)
        expected = probe.stream + _TRIAL_FACTOR * (whole - probe.stream)
        norms = [skip.path for skip in skips if skip.path in parts.norms_after]
        candidates: list[list[tuple[str, float]]] = (
            [
                [
                    (f"{path}.{name}", offset if name == "weight" else 0.0)
                    for path in norms
                    for name, parameter in probe.block.get_submodule(path)._parameters.items()
                    if parameter is not None
                ]
                for offset in (0.0, 1.0)
            ]
            if norms
            else [[(name, 0.0) for name in parts.outputs(branch)]]
        )
        for candidate in filter(None, candidates):
            changes = [WeightChange(name, _TRIAL_FACTOR, offset) for name, offset in candidate]
            if self._is_changeable(candidate) and self._gives(changes, expected, probe.stream, others):
                return tuple(candidate)
        raise self._refuse(f"the {branch}", "no weights were found that scale what it adds to the stream")

    def _has(self, branch: Branch) -> bool:
        """Return whether the block has a branch; refuse a block that is not known to be a sum of its branches."""
        return bool(self.parts.skip_error or self.parts.skips(branch))

    def _find_zeroed(self, branch: Branch) -> tuple[WeightChange, ...]:
        """Return the changes after which a branch adds nothing, but can be trained.

        They are zeros in the output projection; or in the norm behind it, because the gradient of a norm of zeros is
        very large.
        """
        probe, skips = self._probe, self._check_branch(branch)
        has_norm = any(skip.path in self.parts.norms_after for skip in skips)
        found = self._scaled(branch) if has_norm else [(name, 0.0) for name in self.parts.outputs(branch)]
        changes = tuple(WeightChange(name, 0.0, offset) for name, offset in found)
        if not changes or not self._is_changeable(found):
            raise self._refuse(f"the {branch}", "its output projection is quantized, or is not known")
        if not self._gives(changes, probe.without(skips), probe.run(), ()):
            raise self._refuse(f"the {branch}", "zeros in its output projection do not remove what it adds")
        return changes

    def with_biases(self, specs: Iterable[SkipSpec]) -> tuple[SkipSpec, ...]:
        """Return specs that add means, each with the bias that can hold its mean in a saved model, if there is one."""
        return tuple(spec if spec.mean is None else self._with_bias(spec) for spec in specs)

    def _with_bias(self, spec: SkipSpec) -> SkipSpec:
        bias = self._bias(spec.path)
        return replace(spec, bias=bias, savable=True) if bias and bias.startswith(f"{spec.path}.") else spec

    def mean_changes(self, block: int, specs: Iterable[SkipSpec]) -> tuple[WeightChange, ...]:
        """Return the changes with which branches add a mean and compute nothing: zeros, and the mean in a bias.

        Args:
            block: the block's number, for errors.
            specs: the specs of the branches, each with one mean.

        Raises:
            UnsupportedEditError: a branch has no bias that could hold its mean.
        """
        changes: list[WeightChange] = []
        for spec in specs:
            bias = "" if spec.mean is None else self._bias(spec.path)
            if spec.mean is not None and not bias:
                raise UnsupportedEditError(
                    f"the mean of block {block} cannot be written to a checkpoint: no bias of its {spec.path} can "
                    "hold it; use it in memory (operate), or skip the branch (without mean)"
                )
            changes += (
                WeightChange(name, value=spec.mean) if name == bias else WeightChange(name, 0.0)
                for name in spec.outputs
            )
        return tuple(changes)

    def _find_bias(self, path: str) -> str:
        """Return the bias that can hold the mean of the branch with a module; empty if there is none.

        A bias can, if the block gives with it, and zeros in all other parameters that write the stream, what it gives
        with the mean in the place of the module's output.
        """
        probe = self._probe
        (branch,) = (one for one in BRANCHES if any(skip.path == path for skip in self.parts.skips(one)))
        skips, outputs = self.parts.skips(branch), self.parts.outputs(branch)
        (skip,) = (skip for skip in skips if skip.path == path)
        if not all(skip.savable for skip in skips) or not self._is_changeable([(name, 0.0) for name in outputs]):
            return ""
        trial = random_like(probe.stream, seed=2)[0, 0].float()
        if skip.width != len(trial):
            return ""
        specs = [replace(one, mean=trial) if one is skip else one for one in skips]
        expected = probe.without(specs)
        for bias in skip.outputs:
            if probe.block.get_parameter(bias).shape != trial.shape or not bias.endswith("bias"):
                continue
            changes = [WeightChange(name, 0.0) for name in outputs if name != bias]
            changes.append(WeightChange(bias, value=trial))
            if self._gives(changes, expected, probe.without(skips), ()):
                return bias
        return ""

    def _find_layout(self, branch: Branch) -> _UnitLayout:
        """Return where the heads or neurons of a branch are in the weight that writes the stream."""
        probe, unit = self._probe, _UNITS[branch]
        self._check_branch(branch)
        names = [name for name in self.parts.outputs(branch) if probe.block.get_parameter(name).dim() > 1]
        what = f"single {unit}s"
        if len(names) != 1 or probe.block.get_parameter(names[0]).dim() != 2:
            raise self._refuse(
                what, f"its {branch} has experts, or several output projections: {', '.join(names) or 'none is known'}"
            )
        if not self._is_changeable([(names[0], 0.0)]):
            raise self._refuse(what, f"{names[0]} is quantized")
        path, _, name = names[0].rpartition(".")
        owner = probe.block.get_submodule(path)
        dim = 1 - output_dim(owner, name, probe.stream.shape[-1])
        inputs = probe.block.get_parameter(names[0]).shape[dim]
        calls = probe.calls([path])
        argument = calls[0].hidden_states_argument() if len(calls) == 1 else None
        if argument is None or calls[0][argument].shape[-1] != inputs:
            raise self._refuse(what, f"{names[0]} is not used as one linear map")
        count = inputs if branch == "mlp" else count_head_columns(probe, path)
        if count is None:
            raise self._refuse(
                what,
                "what its attention projects into the stream is not the outputs of heads side by side (a mixer without "
                "heads, or a single head)",
            )
        layout = _UnitLayout(names[0], dim, count, inputs // count)
        # Every second unit: a single one may be zero on random numbers, for example after a ReLU.
        change = WeightChange(names[0], units=tuple(range(0, count, 2)), unit_size=layout.size, dim=dim)
        edited = share_parameters(probe.block)
        parent, _, key = path.rpartition(".")
        edited.get_submodule(parent)._modules[key] = _WithoutInputs(owner, _indexes=change.indexes)
        full, expected = probe.run(), probe.run(edited)
        if torch.equal(expected, full) or not self._gives([change], expected, full, ()):
            raise self._refuse(what, f"zeros in {names[0]} do not have the effect of {unit}s that are off")
        return layout

    def _check_branch(self, branch: Branch) -> Sequence[Any]:
        """Return how a branch is skipped; refuse a block that is not known to be a sum of its branches."""
        if self.parts.skip_error:
            raise self._refuse("a branch", self.parts.skip_error)
        skips = self.parts.skips(branch)
        if not skips:
            raise self._refuse(f"the {branch}", "it has none")
        return skips

    def _is_changeable(self, names: Iterable[tuple[str, float]]) -> bool:
        """Return whether parameters hold plain numbers."""
        return all(
            self._probe.block.get_parameter(name).is_floating_point()
            and not is_quantized(self._probe.block.get_submodule(name.rpartition(".")[0]))
            for name, _ in names
        )

    def _gives(
        self, changes: Sequence[WeightChange], expected: torch.Tensor, before: torch.Tensor, skips: Sequence[Any]
    ) -> bool:
        edited = share_parameters(self._probe.block)
        install_changes(edited, changes)
        install_skips(edited, skips)
        return is_same_change(self._probe.run(edited), expected, before, tolerance("fit", expected.dtype))


class _WithoutInputs(ModuleWrapper):
    """Runs a module on its input with zeros at some indexes of the last dimension."""

    _indexes: torch.Tensor

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.module(hidden.index_fill(-1, self._indexes.to(hidden.device), 0), *args, **kwargs)
