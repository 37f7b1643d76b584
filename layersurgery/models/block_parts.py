"""Find the parts of a decoder block by running it.

A module of the block mixes tokens if one token's output depends on other tokens (attention, Mamba, a convolution). The
other modules with weight matrices are the block's MLP. Trial runs then confirm that the block returns stream +
attention + MLP, and how each branch can be skipped. Module names are not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError, is_out_of_memory
from ..plans.visit import Branch
from .block_probe import BlockProbe
from .block_view import share_parameters
from .call_tracing import Call, first_tensor, is_per_token, random_like
from .numerics import is_same_change, tolerance
from .output_projections import output_parameters
from .quantized import is_quantized
from .skipped_branch import SkippedBranch, SkipSpec, install_skips

# A module mixes tokens if the other tokens change a token's output by more than this share of what its own input
# changes. Rounding in a mixture of experts also depends on which tokens are computed together, but is far below this.
_MIXING_THRESHOLD = 0.02


@dataclass(frozen=True, slots=True)
class BlockParts:
    """Parts of one kind of block; paths are relative to the block.

    Attributes:
        attention: modules that mix tokens.
        mlp: the other modules with weight matrices.
        norms_before: norms whose output is the input of a branch.
        norms_after: norms whose input is the output of a branch.
        attention_skips: replacements of modules that skip the attention.
        mlp_skips: replacements of modules that skip the MLP.
        parallel: whether attention and MLP read the same stream; None unless the block has both.
        skip_error: why no branch can be skipped; empty if they can.
    """

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    norms_before: tuple[str, ...] = ()
    norms_after: tuple[str, ...] = ()
    attention_skips: tuple[SkipSpec, ...] = ()
    mlp_skips: tuple[SkipSpec, ...] = ()
    parallel: bool | None = None
    skip_error: str = ""

    def skips(self, branch: Branch) -> tuple[SkipSpec, ...]:
        """Return the specs that replace the modules of one branch."""
        return self.attention_skips if branch == "attention" else self.mlp_skips

    def ends(self, branch: Branch) -> tuple[SkipSpec, ...]:
        """Return the specs of the modules whose output is what a branch adds: its last ones, or the norms after it."""
        skips = self.skips(branch)
        norms = [skip for skip in skips if skip.path in self.norms_after]
        before_norms = {skip.path for skip, after in pairwise(skips) if after in norms and skip.residual is None}
        modules = [skip for skip in skips if not skip.passthrough and skip not in norms]
        return (*(skip for skip in modules if skip.path not in before_norms), *norms)

    def outputs(self, branch: Branch) -> tuple[str, ...]:
        """Return the names of the parameters that write one branch into the residual stream."""
        return tuple(name for skip in self.skips(branch) for name in skip.outputs)


def find_block_parts(block: nn.Module, call: Call) -> BlockParts:
    """Find the parts of a block.

    Args:
        block: one decoder block, in evaluation mode; it is not changed.
        call: a recorded call of the block in its model, with a batch of one sequence of `call_tracing.TOKENS` tokens.
    """
    try:
        probe = BlockProbe(block, call, seed=1)
        mixers, mlp, calls = _sort_modules(probe)
        if len(writing := [call for call in mlp if not _prepares(call, [*mixers, *mlp], probe.stream)]) < len(mlp):
            parts = _find_skips(probe, mixers, writing, calls)
            if not parts.skip_error:
                return parts
        return _find_skips(probe, mixers, mlp, calls)
    except UnsupportedEditError as error:
        return BlockParts((), (), skip_error=str(error))
    except Exception as error:  # a block may raise anything on random numbers, or with its modules recorded
        if is_out_of_memory(error):
            raise
        return BlockParts((), (), skip_error=f"it cannot be run by itself ({type(error).__name__}: {error})")


def _find_skips(probe: BlockProbe, mixers: list[Call], mlp: list[Call], calls: list[Call]) -> BlockParts:
    """Find how the branches with these modules can be skipped."""
    parts = BlockParts(tuple(c.name for c in mixers), tuple(c.name for c in mlp))
    reason = _is_sequential(probe, mixers)
    if reason:
        return replace(parts, skip_error=reason)
    skips = [_skip_specs(probe, branch, calls) for branch in (mixers, mlp)]
    skips[0] = [replace(skip, updates_cache=index == 0) for index, skip in enumerate(skips[0])]
    before, after = _find_norms(probe, calls, [*mixers, *mlp])
    return _confirm(probe, replace(parts, norms_before=before, norms_after=after), skips)


def _prepares(call: Call, branches: list[Call], like: torch.Tensor) -> bool:
    """Check whether a module only computes the input of another, such as a norm with a gate that has matrices."""
    output = first_tensor(call.output)
    return (
        output is not None
        and output.shape == like.shape
        and any(_reads(other, output) for other in branches if other.name != call.name)
    )


def _sort_modules(probe: BlockProbe) -> tuple[list[Call], list[Call], list[Call]]:
    """Return the modules that mix tokens, the other modules with matrices, and all calls, each in execution order."""
    paths = list(_child_paths(probe.block, ""))
    for _ in range(3):
        calls = probe.calls(paths)
        with_weights = [call for call in calls if _has_active_weights(probe.block.get_submodule(call.name))]
        mixers = [call for call in with_weights if _mixes_tokens(probe.block.get_submodule(call.name), call)]
        # One module may hold attention, norms and residual (DBRX): examine its children instead.
        composite = [call.name for call in mixers if len(_stream_outputs(call.output, probe.stream)) > 1]
        if not composite:
            break
        paths = [
            child for path in paths for child in (_child_paths(probe.block, path) if path in composite else [path])
        ]
    names = [call.name for call in with_weights]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UnsupportedEditError(f"it runs {repeated[0]} {names.count(repeated[0])} times")
    mixer_names = {call.name for call in mixers}
    return mixers, [call for call in with_weights if call.name not in mixer_names], calls


def _child_paths(block: nn.Module, path: str) -> Iterable[str]:
    """List the paths of a module's children that have their own forward method."""
    for name, child in block.get_submodule(path).named_children():
        if type(child).forward is not nn.Module.forward and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield f"{path}.{name}" if path else name


def _has_matrix(module: nn.Module) -> bool:
    """Check whether a module holds a weight matrix."""
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _has_active_weights(module: nn.Module) -> bool:
    """Check whether a module holds a weight matrix that is not part of a skipped branch."""
    skipped = {
        id(inner) for outer in module.modules() if isinstance(outer, SkippedBranch) for inner in outer.parameters()
    }
    return any(parameter.dim() > 1 and id(parameter) not in skipped for parameter in module.parameters())


def _stream_outputs(output: Any, like: torch.Tensor) -> list[torch.Tensor]:
    """List the outputs that have the shape of the residual stream."""
    values = output if isinstance(output, tuple | list) else [output]
    return [value for value in values if is_per_token(value) and value.shape[-1] == like.shape[-1]]


def _mixes_tokens(module: nn.Module, call: Call) -> bool:
    """Check whether the last token's output changes if only the other tokens' input changes."""
    argument = call.hidden_states_argument()
    if argument is None:
        return False
    other = random_like(call[argument], 2)
    other[..., -1, :] = call[argument][..., -1, :]
    return _last_token_differs(
        *(first_tensor(_call_with(module, call, argument, hidden)) for hidden in (call[argument], other))
    )


def _call_with(module: nn.Module, call: Call, argument: int | str, value: torch.Tensor) -> Any:
    """Call a module with one recorded argument replaced."""
    args, kwargs = call.with_argument(argument, value)
    return module(*args, **kwargs)


def _last_token_differs(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Check whether the last token's output differs between two calls in which its own input is the same."""
    if first is None or second is None or not is_per_token(first):
        return False
    change = (first.float() - second.float()).norm(dim=-1).flatten()
    return bool(change[-1] > _MIXING_THRESHOLD * change[:-1].mean())


def _is_sequential(probe: BlockProbe, mixers: list[Call]) -> str:
    """Return a reason if one module that mixes tokens reads another's output; an empty text otherwise."""
    for first, second in pairwise(mixers):
        (skip,) = _skip_specs(probe, [first], [])
        edited = share_parameters(probe.block)
        install_skips(edited, [skip])
        (call,) = probe.calls([second.name], edited)
        argument = second.hidden_states_argument()
        assert argument is not None
        if not torch.equal(call[argument], second[argument]):
            return (
                f"{first.name} and {second.name} both mix tokens, one after the other, "
                "so neither alone is its attention"
            )
    return ""


def _skip_specs(probe: BlockProbe, branch: list[Call], calls: list[Call]) -> list[SkipSpec]:
    """Return the specs that replace the modules of one branch, and the norms after them."""
    skips = []
    width = probe.stream.shape[-1]
    for call in branch:
        argument, output = call.hidden_states_argument(), first_tensor(call.output)
        if argument is None or output is None:
            raise UnsupportedEditError(f"{call.name} does not take one row for each token, or does not return a tensor")
        writes = is_per_token(output) and output.shape[-1] == width
        residual = _find_residual_argument(probe, call, argument, output) if writes else None
        outputs = _find_output_parameters(probe.block, call.name, width) if writes else ()
        length = len(call.output) if isinstance(call.output, tuple | list) else None
        skips.append(
            SkipSpec(
                call.name,
                argument,
                output.shape[-1],
                length,
                residual,
                passthrough=not writes,
                outputs=outputs or (),
                savable=outputs is not None,
            )
        )
        if writes and residual is None:
            skips += [_norm_skip_spec(probe, norm) for norm in calls if _reads(norm, output) and _is_norm(probe, norm)]
    return skips


def _find_output_parameters(block: nn.Module, path: str, width: int) -> tuple[str, ...] | None:
    """Return the parameters with which a module writes the stream; None if they cannot be found."""
    try:
        return output_parameters(block, path, width)
    except UnsupportedEditError:
        return None  # only saving needs them


def _find_residual_argument(probe: BlockProbe, call: Call, hidden: int | str, output: torch.Tensor) -> int | str | None:
    """Return the argument that the module adds to its output; None if there is none."""
    module = probe.block.get_submodule(call.name)
    for candidate, value in call.tensors():
        if candidate != hidden and value.shape == output.shape:
            noise = random_like(value, 3)
            changed = first_tensor(_call_with(module, call, candidate, value + noise))
            assert changed is not None
            if torch.allclose(
                (changed - output).float(), noise.float(), rtol=0.05, atol=0.05 * noise.float().std().item()
            ):
                return candidate
    return None


def _is_norm(probe: BlockProbe, call: Call) -> bool:
    """Check whether a module is a norm: it has no matrix, but has parameters or "norm" in its class name."""
    module = probe.block.get_submodule(call.name)
    return not _has_matrix(module) and (
        any(True for _ in module.parameters()) or "norm" in type(module).__name__.lower()
    )


def _reads(call: Call, value: torch.Tensor) -> bool:
    """Check whether the hidden states passed to a module equal this tensor."""
    argument = call.hidden_states_argument()
    return argument is not None and call[argument].shape == value.shape and torch.equal(call[argument], value)


def _norm_skip_spec(probe: BlockProbe, norm: Call) -> SkipSpec:
    """Return the spec that replaces a norm after a branch and zeroes its bias when saved."""
    argument = norm.hidden_states_argument()
    assert argument is not None
    module = probe.block.get_submodule(norm.name)
    bias = (f"{norm.name}.bias",) if getattr(module, "bias", None) is not None else ()
    return SkipSpec(norm.name, argument, norm[argument].shape[-1], outputs=bias)


def _find_norms(probe: BlockProbe, calls: list[Call], branches: list[Call]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the norms whose output a branch reads, and the norms that read a branch's output."""
    inputs = [call[argument] for call in branches if (argument := call.hidden_states_argument()) is not None]
    outputs = [output for call in branches if (output := first_tensor(call.output)) is not None]
    names = {call.name for call in branches}
    norms = [call for call in calls if call.name not in names and _is_norm(probe, call)]

    def equals_any(tensor: torch.Tensor | None, candidates: list[torch.Tensor]) -> bool:
        return tensor is not None and any(
            tensor.numel() == candidate.numel() and torch.equal(tensor.flatten(), candidate.flatten())
            for candidate in candidates
        )

    before = [call.name for call in norms if equals_any(first_tensor(call.output), inputs)]
    after = [
        call.name
        for call in norms
        if call.name not in before
        and (argument := call.hidden_states_argument()) is not None
        and equals_any(call[argument], outputs)
    ]
    return tuple(before), tuple(after)


def _confirm(probe: BlockProbe, parts: BlockParts, skips: list[list[SkipSpec]]) -> BlockParts:
    """Test the skips; if they fail, test them without those that only save the cost of preparing a branch's input."""
    reason = ""
    for attempt in (skips, [[skip for skip in branch if not skip.passthrough] for branch in skips]):
        candidate = replace(parts, attention_skips=tuple(attempt[0]), mlp_skips=tuple(attempt[1]))
        try:
            parallel, reason = _check_structure(probe, candidate)
        except Exception as error:  # a block may raise anything on a replacement's output
            if is_out_of_memory(error):
                raise
            reason = f"skipping a branch failed ({type(error).__name__}: {error})"
        if not reason:
            return _check_outputs(probe, replace(candidate, parallel=parallel))
    return replace(parts, skip_error=reason)


class _Zeros(nn.Module):
    """Stand for a linear layer whose weight and bias are zero."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros((*x.shape[:-1], self.outputs))


def _check_outputs(probe: BlockProbe, parts: BlockParts) -> BlockParts:
    """Keep the output parameters only if zeroing them gives the same output as skipping the branch."""

    def check_branch(branch: Branch) -> tuple[SkipSpec, ...]:
        skips = parts.skips(branch)
        zeroed = share_parameters(probe.block)
        quantized = False
        for name in parts.outputs(branch):
            owner, _, key = name.rpartition(".")
            module = zeroed.get_submodule(owner)
            if isinstance(module, _Zeros):  # its weight came before
                continue
            if is_quantized(module):
                parent, _, child = owner.rpartition(".")
                zeroed.get_submodule(parent)._modules[child] = _Zeros(probe.stream.shape[-1])
                quantized = True
                continue
            parameters = module._parameters
            parameter = parameters[key]
            assert parameter is not None
            if parameter.is_meta:  # offloaded, so it cannot be tested here
                return skips
            parameters[key] = nn.Parameter(torch.zeros_like(parameter), requires_grad=False)
        if torch.equal(probe.run(zeroed), probe.without(skips)):
            # Zeros are not zero weights in every quantized format.
            return tuple(replace(skip, savable=False) for skip in skips) if quantized else skips
        return tuple(replace(skip, outputs=(), savable=False) for skip in skips)

    return replace(parts, attention_skips=check_branch("attention"), mlp_skips=check_branch("mlp"))


def _check_structure(probe: BlockProbe, parts: BlockParts) -> tuple[bool | None, str]:
    """Check that a block returns stream + attention + MLP.

    Returns:
        Whether the branches are parallel (None unless the block has both), and the reason why the check failed (empty
        if not).
    """
    stream = probe.stream
    full = probe.run()
    if not torch.equal(probe.without([*parts.attention_skips, *parts.mlp_skips]), stream):
        names = ", ".join([*parts.attention, *parts.mlp]) or "nothing"
        return None, f"without {names} it does not return its input, so it is not the stream plus attention plus MLP"
    if not parts.attention or not parts.mlp:
        return None, ""
    other_stream = random_like(stream, 4)
    other_stream[..., -1, :] = stream[..., -1, :]
    no_attention, no_mlp = probe.without(parts.attention_skips), probe.without(parts.mlp_skips)
    if _last_token_differs(no_attention, probe.without(parts.attention_skips, other_stream)):
        return None, f"without {', '.join(parts.attention)} it still mixes tokens"
    if torch.equal(no_attention, full) or torch.equal(no_mlp, full):
        return None, "skipping a branch changes nothing, so the branch must be in other modules"

    def gives_full(after: torch.Tensor) -> bool:
        return is_same_change(after, full, stream, tolerance("fit", stream.dtype))

    if gives_full(probe.without(parts.attention_skips, no_mlp)) or gives_full(
        probe.without(parts.mlp_skips, no_attention)
    ):
        return False, ""
    if gives_full(no_attention + no_mlp - stream):
        return True, ""
    return None, "its output is not the stream plus its attention plus its MLP"
