"""Check that a model calls the blocks of its list once each, in the order of the list.

A list alone does not show it: a model may run a stretch of it several times, or split it at fixed numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import UnsupportedEditError
from ..models.block_list import unwrap_transformers
from ..models.block_probe import probe_forward
from ..models.call_tracing import ModuleWrapper, eval_no_grad, replace_modules
from ..runtime.offload import offload_hooks
from .cached_state import clear_cached_state

# For each list of blocks, the lengths at which its model was seen to call all of it in order. Which positions a model
# calls depends on the length of the list and not on the blocks in it.
_CHECKED: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

# What a wrapper returns: its input, alone or with a number of empty further outputs; or what its block returns.
Answer = Literal["block"] | int
_ANSWERS: tuple[Answer, ...] = (0, 1, 2, "block")


class _PositionRecorder(ModuleWrapper):
    """Wrapper that records its position, and returns its input or what its block returns."""

    _position: int
    _positions: list[int]
    _answer: Answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._positions.append(self._position)
        if self._answer == "block":
            return self.module(*args, **kwargs)
        stream = args[0] if args else kwargs["hidden_states"]
        return (stream, *[None] * self._answer) if self._answer else stream


def check_call_order(model: nn.Module, blocks: nn.ModuleList) -> None:
    """Check in a forward on a few tokens that a model calls its blocks once each, in order.

    The blocks themselves are run only if the forward fails without them, or before a refusal. Hooks of the user do not
    run. The result is kept for the list and its length. A model without weights (on the meta device) is not checked.

    Args:
        model: the model, edited or not.
        blocks: its list of blocks.

    Raises:
        UnsupportedEditError: it calls them otherwise, or cannot be run.
    """
    checked = _CHECKED.setdefault(blocks, set())
    if len(blocks) in checked or _has_no_weights(model):
        return
    expected = [*range(len(blocks))]
    positions: list[int] = []
    for answer in _ANSWERS:
        if positions == expected:
            break
        try:
            positions = _record_positions(model, blocks, answer)
        except UnsupportedEditError:
            if answer == "block":
                raise
    if positions != expected:
        called = " ".join(map(str, positions[:20])) + (" ..." if len(positions) > 20 else "") or "none"
        raise UnsupportedEditError(
            f"{type(unwrap_transformers(model)).__name__} does not call the {len(blocks)} blocks of its list once "
            f"each, in order (a forward calls {called}), so an edit of the list is not an edit of its layers"
        )
    checked.add(len(blocks))


def _record_positions(model: nn.Module, blocks: nn.ModuleList, answer: Answer) -> list[int]:
    positions: list[int] = []
    recorders = [
        _PositionRecorder(block, _position=position, _positions=positions, _answer=answer)
        for position, block in enumerate(blocks)
    ]
    places: list[tuple[nn.Module, str]] = [(blocks, str(position)) for position in range(len(blocks))]
    try:
        with _without_hooks(model), eval_no_grad(model), replace_modules(places, recorders):
            probe_forward(model)
    finally:
        clear_cached_state(model)
    return positions


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Remove the forward hooks of all modules inside the `with` block."""
    removed = [(vars(module), name) for module in model.modules() for name in _HOOKS if vars(module)[name]]
    hooks = [attributes[name] for attributes, name in removed]
    try:
        for attributes, name in removed:
            attributes[name] = OrderedDict()
        yield
    finally:
        for (attributes, name), original in zip(removed, hooks, strict=True):
            attributes[name] = original


def _has_no_weights(model: nn.Module) -> bool:
    """Return whether some weights are on the meta device and no hook would load them."""
    return any(parameter.is_meta for parameter in model.parameters()) and not any(
        True for module in model.modules() for _ in offload_hooks(module)
    )
