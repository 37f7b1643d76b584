"""What a block is made of, found by watching it run.

A module of the block that lets one token see another mixes tokens (attention, Mamba, a convolution); other modules with weight
matrices are its MLP. That the stream leaves the block as stream + attention + MLP, and how each branch can be left out, is
then tried: names are not asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..plans.edits import Branch
from .block_view import share_parameters
from .call_tracing import Call, first_tensor, is_per_token, random_like, record_calls
from .output_projections import output_parameters
from .skipped_branch import SkippedBranch, SkipSpec, install_skips

# Output that depends on other tokens by more than this share of how it depends on its own; a mixture of experts' rounding,
# which depends on which tokens are computed together, stays far below.
_MIXES = 0.02


@dataclass(frozen=True, slots=True)
class BlockParts:
    """What one kind of block is made of; paths are within the block.

    Attributes:
        attention: modules that mix tokens.
        mlp: the other modules with weight matrices.
        norms_before: norms of a branch's input.
        norms_after: norms of a branch's output.
        attention_stubs: stand-ins with which the attention is left out.
        mlp_stubs: the same for the MLP.
        parallel: whether attention and MLP read the same stream; None where there are not both.
        fault: why no branch can be left out; empty where they can.
    """

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    norms_before: tuple[str, ...] = ()
    norms_after: tuple[str, ...] = ()
    attention_skips: tuple[SkipSpec, ...] = ()
    mlp_skips: tuple[SkipSpec, ...] = ()
    parallel: bool | None = None
    fault: str = ""

    def skips(self, part: Branch) -> tuple[SkipSpec, ...]:
        """Stand-ins for one branch."""
        return self.attention_skips if part == "attention" else self.mlp_skips

    def outputs(self, branch: Branch) -> tuple[str, ...]:
        """Parameters that write one branch into the residual stream."""
        return tuple(name for skip in self.skips(branch) for name in skip.outputs)


def find_block_parts(block: nn.Module, call: Call) -> BlockParts:
    """Find the parts of a block.

    Args:
        block: one decoder block, in evaluation mode; it is not changed.
        call: a call of it in its own model, with a batch of one sequence of `witness.TOKENS` tokens.
    """
    where = call.hidden_states_argument()
    if where is None:
        return BlockParts((), (), fault="it is not given a residual stream of (1, tokens, width)")
    trial = BlockProbe(block, call, random_like(call[where], 1))
    try:
        mixers, rest, calls = _sort(trial)
        found = BlockParts(tuple(c.name for c in mixers), tuple(c.name for c in rest))
        fault = _is_sequential(trial, mixers)
        if fault:
            return replace(found, fault=fault)
        skips = [_skip_specs(trial, units, calls) for units in (mixers, rest)]
        skips[0] = [replace(skip, updates_cache=place == 0) for place, skip in enumerate(skips[0])]
        before, after = _norms(trial, calls, [*mixers, *rest])
        return _confirm(trial, replace(found, norms_before=before, norms_after=after), skips)
    except UnsupportedEditError as error:
        return BlockParts((), (), fault=str(error))


class BlockProbe:
    """A block, what it was given, and a stream of random numbers to give it instead."""

    def __init__(self, block: nn.Module, call: Call, stream: torch.Tensor) -> None:
        self.block, self.call, self.stream = block, call, stream
        where = call.hidden_states_argument()
        assert where is not None
        self.where = where

    def run(self, block: nn.Module, stream: torch.Tensor | None = None) -> torch.Tensor:
        """What the stream is after `block`."""
        args, kwargs = self.call.with_argument(self.where, self.stream if stream is None else stream)
        output = first_tensor(block(*args, **kwargs))
        if output is None or output.shape != self.stream.shape:
            raise UnsupportedEditError("it does not return the residual stream")
        return output.clone()

    def without(self, skips: Iterable[SkipSpec], stream: torch.Tensor | None = None) -> torch.Tensor:
        """The same, some modules replaced."""
        silenced = share_parameters(self.block)
        install_skips(silenced, list(skips))
        return self.run(silenced, stream)

    def calls(self, paths: Sequence[str], block: nn.Module | None = None) -> list[Call]:
        """Calls of the modules at `paths` during one run."""
        block = share_parameters(self.block) if block is None else block
        places = [(block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], path) for path in paths]
        with record_calls(places) as log:
            self.run(block)
        return log.calls


def _sort(trial: BlockProbe) -> tuple[list[Call], list[Call], list[Call]]:
    """Modules that mix tokens, other modules with weight matrices, and all calls; in the order in which they run."""
    paths = list(_runnable(trial.block, ""))
    for _ in range(3):
        calls = trial.calls(paths)
        weighty = [call for call in calls if _works(trial.block.get_submodule(call.name))]
        mixers = [call for call in weighty if _mixes(trial.block.get_submodule(call.name), call)]
        # Attention, norms and residual in one module (DBRX): look inside.
        composite = [call.name for call in mixers if len(_streams(call.output, trial.stream)) > 1]
        if not composite:
            break
        paths = [inner for path in paths for inner in (_runnable(trial.block, path) if path in composite else [path])]
    names = [call.name for call in weighty]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UnsupportedEditError(f"it runs {repeated[0]} {names.count(repeated[0])} times")
    mixing = {call.name for call in mixers}
    return mixers, [call for call in weighty if call.name not in mixing], calls


def _runnable(block: nn.Module, path: str) -> Iterable[str]:
    for name, child in block.get_submodule(path).named_children():
        if type(child).forward is not nn.Module.forward and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield f"{path}.{name}" if path else name


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _works(module: nn.Module) -> bool:
    """Whether a module may be one of attention or MLP; one that is skipped already is neither."""
    skipped = {
        id(inner) for outer in module.modules() if isinstance(outer, SkippedBranch) for inner in outer.parameters()
    }
    return any(parameter.dim() > 1 and id(parameter) not in skipped for parameter in module.parameters())


def _streams(output: Any, like: torch.Tensor) -> list[torch.Tensor]:
    values = output if isinstance(output, tuple | list) else [output]
    return [value for value in values if is_per_token(value) and value.shape[-1] == like.shape[-1]]


def _mixes(module: nn.Module, call: Call) -> bool:
    """Whether the last token's output changes when only other tokens' input does."""
    where = call.hidden_states_argument()
    if where is None:
        return False
    other = random_like(call[where], 2)
    other[..., -1, :] = call[where][..., -1, :]
    return _last_follows(*(first_tensor(_call_with(module, call, where, hidden)) for hidden in (call[where], other)))


def _call_with(module: nn.Module, call: Call, where: int | str, value: torch.Tensor) -> Any:
    args, kwargs = call.with_argument(where, value)
    return module(*args, **kwargs)


def _last_follows(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or not is_per_token(one):
        return False
    change = (one.float() - other.float()).norm(dim=-1).flatten()
    return bool(change[-1] > _MIXES * change[:-1].mean())


def _is_sequential(trial: BlockProbe, mixers: list[Call]) -> str:
    """What to say of a block in which one module that mixes tokens reads another's output."""
    for first, second in pairwise(mixers):
        (skip,) = _skip_specs(trial, [first], [])
        silenced = share_parameters(trial.block)
        install_skips(silenced, [skip])
        (call,) = trial.calls([second.name], silenced)
        where = second.hidden_states_argument()
        assert where is not None
        if not torch.equal(call[where], second[where]):
            return f"{first.name} and {second.name} both mix tokens, one after the other, so neither alone is its attention"
    return ""


def _skip_specs(trial: BlockProbe, units: list[Call], calls: list[Call]) -> list[SkipSpec]:
    skips = []
    width = trial.stream.shape[-1]
    for call in units:
        where, output = call.hidden_states_argument(), first_tensor(call.output)
        if where is None or output is None:
            raise UnsupportedEditError(f"{call.name} is not given one row for each token, or returns none")
        writes = is_per_token(output) and output.shape[-1] == width
        residual = _residual(trial, call, where, output) if writes else None
        outputs = _written_by(trial.block, call.name, width) if writes else ()
        length = len(call.output) if isinstance(call.output, tuple | list) else None
        skips.append(
            SkipSpec(
                call.name,
                where,
                output.shape[-1],
                length,
                residual,
                passthrough=not writes,
                outputs=outputs or (),
                savable=outputs is not None,
            )
        )
        if writes and residual is None:
            skips += [_after(trial, norm) for norm in calls if _reads(norm, output) and _is_norm(trial, norm)]
    return skips


def _written_by(block: nn.Module, path: str, width: int) -> tuple[str, ...] | None:
    """Parameters with which a module writes the stream; None where they cannot be told, which only saving asks for."""
    try:
        return output_parameters(block, path, width)
    except UnsupportedEditError:
        return None


def _residual(trial: BlockProbe, call: Call, where: int | str, output: torch.Tensor) -> int | str | None:
    """The argument that the module adds to its output, if there is one."""
    module = trial.block.get_submodule(call.name)
    for other, value in call.tensors():
        if other != where and value.shape == output.shape:
            nudge = random_like(value, 3)
            changed = first_tensor(_call_with(module, call, other, value + nudge))
            assert changed is not None
            if torch.allclose(
                (changed - output).float(), nudge.float(), rtol=0.05, atol=0.05 * nudge.float().std().item()
            ):
                return other
    return None


def _is_norm(trial: BlockProbe, call: Call) -> bool:
    module = trial.block.get_submodule(call.name)
    return not _has_matrix(module) and (
        any(True for _ in module.parameters()) or "norm" in type(module).__name__.lower()
    )


def _reads(call: Call, value: torch.Tensor) -> bool:
    where = call.hidden_states_argument()
    return where is not None and call[where].shape == value.shape and torch.equal(call[where], value)


def _after(trial: BlockProbe, norm: Call) -> SkipSpec:
    where = norm.hidden_states_argument()
    assert where is not None
    module = trial.block.get_submodule(norm.name)
    bias = (f"{norm.name}.bias",) if getattr(module, "bias", None) is not None else ()
    return SkipSpec(norm.name, where, norm[where].shape[-1], outputs=bias)


def _norms(trial: BlockProbe, calls: list[Call], units: list[Call]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Norms whose output a branch reads, and norms that read a branch's output."""
    inputs = [call[where] for call in units if (where := call.hidden_states_argument()) is not None]
    outputs = [output for call in units if (output := first_tensor(call.output)) is not None]
    names = {call.name for call in units}
    norms = [call for call in calls if call.name not in names and _is_norm(trial, call)]

    def same(one: torch.Tensor | None, others: list[torch.Tensor]) -> bool:
        return one is not None and any(
            one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten()) for other in others
        )

    before = [call.name for call in norms if same(first_tensor(call.output), inputs)]
    after = [
        call.name
        for call in norms
        if call.name not in before
        and (where := call.hidden_states_argument()) is not None
        and same(call[where], outputs)
    ]
    return tuple(before), tuple(after)


def _confirm(trial: BlockProbe, found: BlockParts, skips: list[list[SkipSpec]]) -> BlockParts:
    """Try the stand-ins; those that only save the cost of preparing input are given up where they do not fit."""
    fault = ""
    for attempt in (skips, [[skip for skip in part if not skip.passthrough] for part in skips]):
        silenced = replace(found, attention_skips=tuple(attempt[0]), mlp_skips=tuple(attempt[1]))
        try:
            parallel, fault = _laws(trial, silenced)
        except Exception as error:  # a block may raise anything on what a stand-in returns
            fault = f"leaving a branch out failed ({type(error).__name__}: {error})"
        if not fault:
            return _with_outputs(trial, replace(silenced, parallel=parallel))
    return replace(found, fault=fault)


def _with_outputs(trial: BlockProbe, parts: BlockParts) -> BlockParts:
    """Keep the output parameters only where zeroing them does what leaving the branch out does."""

    def kept(part: Branch) -> tuple[SkipSpec, ...]:
        skips = parts.skips(part)
        zeroed = share_parameters(trial.block)
        for name in parts.outputs(part):
            owner, _, key = name.rpartition(".")
            parameters = zeroed.get_submodule(owner)._parameters
            held = parameters[key]
            assert held is not None
            if held.is_meta:  # offloaded: it cannot be tried here
                return skips
            parameters[key] = nn.Parameter(torch.zeros_like(held), requires_grad=False)
        if torch.equal(trial.run(zeroed), trial.without(skips)):
            return skips
        return tuple(replace(skip, outputs=(), savable=False) for skip in skips)

    return replace(parts, attention_skips=kept("attention"), mlp_skips=kept("mlp"))


def _laws(trial: BlockProbe, parts: BlockParts) -> tuple[bool | None, str]:
    """Whether its branches are parallel, and what speaks against the block being stream + attention + MLP."""
    stream = trial.stream
    whole = trial.run(trial.block)
    if not torch.equal(trial.without([*parts.attention_skips, *parts.mlp_skips]), stream):
        listed = ", ".join([*parts.attention, *parts.mlp]) or "nothing"
        return None, f"without {listed} it does not return its input, so it is not the stream plus attention plus MLP"
    if not parts.attention or not parts.mlp:
        return None, ""
    other = random_like(stream, 4)
    other[..., -1, :] = stream[..., -1, :]
    no_attention, no_mlp = trial.without(parts.attention_skips), trial.without(parts.mlp_skips)
    if _last_follows(no_attention, trial.without(parts.attention_skips, other)):
        return None, f"without {', '.join(parts.attention)} its tokens still mix"
    if torch.equal(no_attention, whole) or torch.equal(no_mlp, whole):
        return None, "leaving a branch out changes nothing, so the branch is elsewhere"
    if _close(trial.without(parts.attention_skips, no_mlp), whole, stream) or _close(
        trial.without(parts.mlp_skips, no_attention), whole, stream
    ):
        return False, ""
    if _close(no_attention + no_mlp - stream, whole, stream):
        return True, ""
    return None, "its output is not the stream plus its attention plus its MLP"


def _close(found: torch.Tensor, wanted: torch.Tensor, stream: torch.Tensor) -> bool:
    tolerance = 1e-4 if stream.dtype in (torch.float32, torch.float64) else 0.05
    change = (wanted - stream).float().norm()
    return bool(
        (found - wanted).float().norm()
        <= tolerance * change + 4 * torch.finfo(stream.dtype).eps * stream.float().norm()
    )
