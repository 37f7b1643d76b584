"""Blocks compiled by torch, each shown equal to itself before it is believed.

Norms, rotary embeddings and gates are many passes over a stream; compiled, they are few. Blocks of one kind share one compiled
function, for their parameters are its arguments. Each shape has a function of its own: one for all of them would depend on which
came first, and so would the last digits of a run that was stopped and goes on. CUDA graphs are not asked for: they would hand out the
same memory at each call, and with thousands of tokens at once there is no launching to save.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..models.call_tracing import first_tensor

# What rounding in another order may change, as a share of what a block adds to the stream.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_KINDS = 64

Bind = Callable[[torch.Tensor], tuple[tuple[Any, ...], dict[str, Any]]]


class Compiler:
    """Calls blocks, compiled where torch can do it and the result is right, as they are where not, which is said once.

    Attributes:
        refused: why blocks are called as they are; None while all are compiled.
    """

    def __init__(self) -> None:
        self.refused: str | None = None
        self._ready: dict[nn.Module, Any] = {}

    def __call__(self, block: nn.Module, stream: torch.Tensor, bind: Bind) -> Any:
        """What a block returns for a stream.

        Args:
            block: to be called.
            stream: (batch, length, width); the block may overwrite it.
            bind: gives the block's arguments for a stream.
        """
        if self.refused is None and block not in self._ready:
            self._prove(block, stream, bind)
        if self.refused is not None:
            return _call(block, stream, bind)
        with _compiling():
            return _call(self._ready[block], stream, bind)

    def _prove(self, block: nn.Module, stream: torch.Tensor, bind: Bind) -> None:
        name, call = type(block).__name__, torch.compile(block, fullgraph=True, dynamic=False)
        plain = first_tensor(_call(block, stream.clone(), bind))
        try:
            with _compiling():
                fast = first_tensor(_call(call, stream.clone(), bind))
        except Exception as error:  # torch, its compiler and a C++ compiler may raise anything
            self._give_up(
                f"torch cannot compile {name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            )
            return
        if fast is None or plain is None or not _same(fast, plain, stream):
            self._give_up(f"compiled by torch, {name} computes something else")
            return
        self._ready[block] = call

    def _give_up(self, why: str) -> None:
        self.refused = why
        self._ready.clear()
        warnings.warn(f"{why}; blocks are run as they are", stacklevel=2)


def _call(block: Any, stream: torch.Tensor, bind: Bind) -> Any:
    args, kwargs = bind(stream)
    return block(*args, **kwargs)


@contextmanager
def _compiling() -> Iterator[None]:
    """A model may have more kinds of blocks than torch compiles by default before it gives up."""
    with torch.compiler.set_stance("default"), torch._dynamo.config.patch(recompile_limit=_KINDS):
        yield


def _same(fast: torch.Tensor, plain: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether what is added to the stream is the same but for rounding, of which the stream itself brings some."""
    if not bool(plain.isfinite().all()):
        return True  # that is found, and said, where predictions are measured
    off, added, whole = (float(part.double().norm()) for part in (fast - plain, plain - before, plain))
    return off <= _TOLERANCE.get(plain.dtype, 1e-3) * added + 2 * torch.finfo(plain.dtype).eps * whole
