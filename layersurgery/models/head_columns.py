"""Find which inputs of an attention's output projection belong to which head, by running the block."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .block_probe import BlockProbe
from .call_tracing import TOKENS, Call


def count_head_columns(probe: BlockProbe, path: str) -> int | None:
    """Return the number of heads whose outputs, side by side, are the input of a projection.

    A gate may multiply them on the way. So the block is run with zeros in the place of one head's output: only the
    numbers of that head may change, and they must become zero.

    Args:
        probe: the block.
        path: path of the projection within it, which is called once.

    Returns:
        The number; None if the input is something else.
    """
    seen = _FourDimensional()
    with seen:
        (call,) = probe.calls([path])
    projected = _input(call)
    counts: set[int] = set()
    for number, output in enumerate(seen.outputs):
        for dim in (1, 2):
            heads = output.shape[dim]
            if output.shape[3 - dim] != TOKENS or output.numel() != projected.numel() or heads == 1:
                continue
            by_head = projected.reshape(*projected.shape[:-1], heads, -1)
            if all(_silences(probe, path, number, dim, head, by_head) for head in (0, heads - 1)):
                counts.add(heads)
    return counts.pop() if len(counts) == 1 else None


def _silences(probe: BlockProbe, path: str, number: int, dim: int, head: int, by_head: torch.Tensor) -> bool:
    """Return whether zeros at one head of a tensor give zeros at the same head of the projection's input only."""
    with _FourDimensional(number, dim, head):
        (call,) = probe.calls([path])
    found = _input(call).reshape(by_head.shape)
    expected = by_head.index_fill(-2, torch.tensor([head], device=by_head.device), 0)
    return torch.equal(found, expected) and not torch.equal(found, by_head)


def _input(call: Call) -> torch.Tensor:
    argument = call.hidden_states_argument()
    assert argument is not None
    hidden: torch.Tensor = call[argument]
    return hidden


class _FourDimensional(TorchFunctionMode):
    """Context that keeps every tensor of four dimensions that functions of torch return.

    Args:
        number: number of the tensor, in this order, that gets zeros; None for no tensor.
        dim: its dimension of heads.
        head: the head at which it gets zeros.
    """

    def __init__(self, number: int | None = None, dim: int = 0, head: int = 0) -> None:
        super().__init__()
        self.outputs: list[torch.Tensor] = []
        self._number, self._dim, self._head = number, dim, head

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.dim() == 4 and TOKENS in output.shape[1:3]:
            if len(self.outputs) == self._number:
                output = output.index_fill(self._dim, torch.tensor([self._head], device=output.device), 0)
            self.outputs.append(output.detach().clone())
        return output
