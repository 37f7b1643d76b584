"""Skip or scale what a block adds to the stream at later tokens, and leave the first tokens as they are.

The block runs for all tokens: later tokens still attend to the keys of all earlier ones, and the cache has all of them.
Only what it adds is changed, by a factor for each position. Positions are the `position_ids` that the model gives its
blocks. A block that is given none counts from the length of its row of the cache; there, padding at the left counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..plans.visit import BRANCHES, Visit
from .block_parts import BlockParts
from .block_view import position_name
from .call_tracing import ArgumentKey, first_tensor
from .memory_only import MemoryOnlyModule, derive, stream_of, with_first


@dataclass(frozen=True, slots=True)
class LaterTokens:
    """Describe the change of a block at later tokens.

    Attributes:
        start: number of first tokens that are not changed.
        drop: whether the later tokens pass by the whole block.
        ends: modules whose output is changed, relative to the block, each with its factor and the argument that it
            adds to its output, if it adds the residual stream itself.
    """

    start: int
    drop: bool
    ends: tuple[tuple[str, float, ArgumentKey | None], ...]


def find_later_tokens(visit: Visit, parts: BlockParts) -> LaterTokens | None:
    """Return how to change a block at later tokens; None if the visit changes all tokens, or none.

    Args:
        visit: the visit; `BlockWeights.changes` checks that its branches can be scaled.
        parts: the block's parts.
    """
    if not visit.start:
        return None
    if not visit.attention and not visit.mlp:
        return LaterTokens(visit.start, True, ())
    ends = [
        (end.path, float(visit.factor(branch)), end.residual)
        for branch in BRANCHES
        if visit.factor(branch) is not True
        for end in parts.ends(branch)
    ]
    return LaterTokens(visit.start, False, tuple(ends))


def install_later_tokens(block: nn.Module, change: LaterTokens | None) -> None:
    """Change a block in place. `block` must be a view, so that the original is not changed."""
    if change is None:
        return
    shared = _FirstTokens()
    for path, factor, residual in change.ends:
        derive(block.get_submodule(path), _LaterTokensBranch, _first=shared, _factor=factor, _residual=residual)
    derive(block, _LaterTokensBlock, _first=shared, _change=change)


class _FirstTokens:
    """Hold which tokens of the current call are first tokens, (batch or 1, length)."""

    mask: torch.Tensor


class _LaterTokens(MemoryOnlyModule):
    not_savable = (
        "the model has blocks that are changed at some tokens only, which no checkpoint can express: a reload would "
        "treat all tokens alike. Use the model in memory only (operate, or operate_ with verify=False)"
    )
    _first: _FirstTokens


class _LaterTokensBlock(_LaterTokens):
    """A block that finds the positions of its tokens; with `drop`, it returns its input at later tokens."""

    _change: LaterTokens

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = stream_of(self, args, kwargs)
        self._first.mask = (_positions(self, stream, args, kwargs) < self._change.start).to(stream.device)
        if not self._change.drop:
            self._check_ends()
            return super().forward(*args, **kwargs)
        # A copy: some blocks add to their input in place.
        args, kwargs = (
            ((stream.clone(), *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream.clone()})
        )
        output = super().forward(*args, **kwargs)
        after = first_tensor(output)
        assert after is not None
        return with_first(output, torch.where(self._first.mask[..., None], after, stream.to(after.dtype)))

    def _check_ends(self) -> None:
        """Refuse another module in the place of one whose output is changed: its own part would not be."""
        for path, _, _ in self._change.ends:
            if not isinstance(module := self.get_submodule(path), _LaterTokensBranch):
                raise UnsupportedEditError(
                    f"a {type(module).__name__} has replaced {path} since the edit, and what it adds would not be "
                    "changed at later tokens; add adapters first, and edit the model with them"
                )


class _LaterTokensBranch(_LaterTokens):
    """A module of which the output at later tokens is multiplied by a factor."""

    _factor: float
    _residual: ArgumentKey | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        residual = self._residual
        before = None if residual is None else (args[residual] if isinstance(residual, int) else kwargs[residual])
        before = None if before is None else before.clone()
        output = super().forward(*args, **kwargs)
        after = first_tensor(output)
        assert after is not None
        if before is None:
            later = after * self._factor if self._factor else torch.zeros_like(after)
        else:
            later = before + (after - before) * self._factor if self._factor else before
        first = self._first.mask.to(after.device)
        if after.dim() == 2:  # all tokens of the batch in one dimension
            first = first.expand(after.shape[0] // first.shape[-1], -1).flatten()
        return with_first(output, torch.where(first[..., None], after, later))


def _positions(block: nn.Module, stream: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the positions of a call's tokens, (batch or 1, length)."""
    length = stream.shape[-2]
    for name in ("position_ids", "cache_position"):
        positions = kwargs.get(name)
        if isinstance(positions, torch.Tensor) and positions.dim() <= 2 and positions.shape[-1] == length:
            return positions.reshape(-1, length)
    caches = [value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")]
    passed = _passed_tokens(block, caches[0]) if caches else 0
    return torch.arange(passed, passed + length, device=stream.device)[None]


def _passed_tokens(block: nn.Module, cache: Any) -> int:
    """Return how many tokens a block's row of the cache has.

    Raises:
        UnsupportedEditError: the row has no length.
    """
    owner = next((module for module in block.modules() if position_name(module)), None)
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if owner is not None and layers is not None:
        row = getattr(owner, position_name(owner) or "")
        if row >= len(layers):
            return 0
        if hasattr(layers[row], "get_seq_length"):
            return int(layers[row].get_seq_length())
    raise UnsupportedEditError(
        f"a {type(block).__name__} is given no positions, and its part of the cache has no length, so which tokens "
        "are the first is unknown; run the model with use_cache=False"
    )
