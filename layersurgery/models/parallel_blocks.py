"""Give several blocks the same stream, and sum what they add, in a model that calls its blocks one after another.

Each block keeps its own entry in the list of blocks, so the model gives it its own mask, positions and row of the
key-value cache. The first block of a group attaches its input to the stream that it returns; each later one runs on
that input, and adds what it computes to the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..plans.route import Route
from .call_tracing import first_tensor
from .memory_only import MemoryOnlyModule, derive, stream_of, with_first

_INPUT = "_input_of_parallel_blocks"


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


class ParallelBlock(MemoryOnlyModule):
    """A block of a group; every such class also derives from the block's own class."""

    not_savable = (
        "the model has parallel or averaged blocks, which no checkpoint can express: a reload would run them one after "
        "another. Use the model in memory only (operate, or operate_ with verify=False)"
    )
    _group_member: GroupMember

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - documented in torch
        # An argument, and not an attribute of the module: a forward that is repeated for the gradient, and the hooks
        # that move arguments to a device, get it, too.
        stream = stream_of(self, args, kwargs)
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
        stream = stream_of(self, args, kwargs)
        # A copy: some blocks add to their input in place.
        if args:
            args = (group_input.clone(), *args[1:])
        else:
            kwargs["hidden_states"] = group_input.clone()
        output = super().forward(*args, **kwargs)
        own = first_tensor(output)
        assert own is not None
        joined = add_output(None if member.is_first else stream, group_input, own, member.divisor)
        if not member.is_last:
            setattr(joined, _INPUT, group_input)
        return with_first(output, joined)


def make_parallel(view: nn.Module, member: GroupMember) -> None:
    """Make a view of a block a member of a group, in place.

    Raises:
        UnsupportedEditError: another program replaced the block's forward.
    """
    derive(view, ParallelBlock, _group_member=member)
