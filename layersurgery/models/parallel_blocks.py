"""Give several blocks the same stream, and sum what they add, in a model that calls its blocks one after another.

Each block keeps its own entry in the list of blocks, so the model gives it its own mask, positions and row of the
key-value cache. The first block of a group attaches its input to the stream that it returns; each later one runs on
that input, and adds what it computes to the stream.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..plans.route import Route

_INPUT = "_input_of_parallel_blocks"
NOT_SAVABLE = (
    "the model has parallel or averaged blocks, which no checkpoint can express: a reload would run them one after "
    "another. Use the model in memory only (operate, or operate_ with verify=False)"
)


@dataclass(frozen=True, slots=True)
class GroupMember:
    """Describe the place of a block in a group of parallel blocks.

    Attributes:
        is_first: whether the group's input is its own input.
        is_last: whether no later block needs the group's input.
        divisor: number by which what the block adds is divided.
    """

    is_first: bool
    is_last: bool
    divisor: int


def group_members(route: Route) -> dict[int, GroupMember]:
    """Return, by position, the places of the blocks that are parallel or divided; the others are not in it."""
    members: dict[int, GroupMember] = {}
    position = 0
    for group in route.groups:
        for number, visit in enumerate(group):
            if len(group) > 1 or visit.divisor != 1:
                members[position] = GroupMember(number == 0, number == len(group) - 1, visit.divisor)
            position += 1
    return members


def add_output(
    stream: torch.Tensor | None, group_input: torch.Tensor, output: torch.Tensor, divisor: int
) -> torch.Tensor:
    """Return the stream of a group with what one more block adds.

    Args:
        stream: the sum so far; None before the first block.
        group_input: what every block of the group is given.
        output: what the block returns for it.
        divisor: number by which what the block adds is divided.
    """
    if stream is None and divisor == 1:
        return output
    added = output - group_input if divisor == 1 else (output - group_input) / divisor
    return (group_input if stream is None else stream) + added


class ParallelBlock(nn.Module):
    """A block of a group; every such class also derives from the block's own class."""

    _group_member: GroupMember

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - documented in torch
        # An argument, and not an attribute of the module: a forward that is repeated for the gradient, and the hooks
        # that move arguments to a device, get it, too.
        stream = _stream(self, args, kwargs)
        group_input = stream if self._group_member.is_first else getattr(stream, _INPUT, None)
        if group_input is None:
            raise UnsupportedEditError(
                f"a {type(self).__name__} that is parallel to the block before it was not given the stream which that "
                "block returned, so the stream that both are given is unknown; use parallel blocks only in a whole "
                "model that passes the stream from block to block unchanged"
            )
        return super().__call__(*args, group_input=group_input, **kwargs)

    def forward(self, *args: Any, group_input: torch.Tensor, **kwargs: Any) -> Any:  # noqa: D102 - documented in torch
        member = self._group_member
        stream = _stream(self, args, kwargs)
        # A copy: some blocks add to their input in place.
        if args:
            args = (group_input.clone(), *args[1:])
        else:
            kwargs["hidden_states"] = group_input.clone()
        output = super().forward(*args, **kwargs)
        own = output[0] if isinstance(output, tuple | list) else output
        joined = add_output(None if member.is_first else stream, group_input, own, member.divisor)
        if not member.is_last:
            setattr(joined, _INPUT, group_input)
        return type(output)((joined, *output[1:])) if isinstance(output, tuple | list) else joined

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - documented in torch
        if not kwargs.get("keep_vars", False):
            raise UnsupportedEditError(NOT_SAVABLE)
        return super().state_dict(*args, **kwargs)


def _stream(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    stream = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(stream, torch.Tensor):
        raise UnsupportedEditError(
            f"a {type(block).__name__} is given the residual stream neither as its first argument nor as "
            "hidden_states, so it cannot be parallel to another block"
        )
    return stream


@cache
def _parallel_class(kind: Any) -> Any:
    """Return the subclass of a block's class for blocks of a group, under the same name."""
    return type(kind)(kind.__name__, (ParallelBlock, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def make_parallel(view: nn.Module, member: GroupMember) -> None:
    """Make a view of a block a member of a group, in place.

    Raises:
        UnsupportedEditError: another program replaced the block's forward.
    """
    kind: Any = type(view)
    attributes = vars(view)
    parallel: Any = _parallel_class(kind)
    if "forward" in attributes:
        # accelerate's hooks call `_old_forward`.
        old = attributes.get("_old_forward")
        if not isinstance(old, types.MethodType) or old.__func__ is not kind.forward:
            raise UnsupportedEditError(
                f"the forward of a {kind.__name__} was replaced, so it cannot be parallel to another block; edit the "
                "model first and replace forward afterwards"
            )
        attributes["_old_forward"] = types.MethodType(parallel.forward, view)
    attributes["_group_member"] = member
    view.__class__ = parallel


def refuse_parallel(modules: Iterable[nn.Module]) -> None:
    """Refuse a list of blocks that an edit has made parallel.

    Raises:
        UnsupportedEditError: one of them is parallel or averaged.
    """
    if any(isinstance(module, ParallelBlock) for module in modules):
        raise UnsupportedEditError(
            "the model has parallel or averaged blocks from an earlier edit, and its blocks cannot be edited or run "
            "one by one again; write all edits as one plan of the unedited model"
        )
