"""Compile blocks with torch, and check that each compiled block equals the original before using it.

Norms, rotary embeddings and gates take many passes over the stream; compiled, they take few. Blocks of one kind share
one compiled function, because their parameters are its arguments. Each input shape gets its own function: a function
for all shapes would depend on the shape that came first, and so would the last digits of a resumed run. CUDA graphs are
not used: they reuse the same output memory at each call, and with thousands of tokens at once kernel launches cost
little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import is_out_of_memory, warn
from ..models.call_tracing import first_tensor
from ..models.numerics import is_same_change, tolerance

_MAX_BLOCK_KINDS = 64

Bind = Callable[[torch.Tensor], tuple[tuple[Any, ...], dict[str, Any]]]


class Compiler:
    """Calls blocks in compiled form; uncompiled, with one warning, if torch cannot compile them or the result is wrong.

    Attributes:
        error: why blocks are called uncompiled; None while all are compiled.
    """

    def __init__(self) -> None:
        self.error: str | None = None
        self._compiled: dict[nn.Module, Any] = {}

    def __call__(self, block: nn.Module, stream: torch.Tensor, bind: Bind) -> Any:
        """Call a block on a stream and return its output.

        Args:
            block: the block to call.
            stream: residual stream, (batch, length, width); the block may overwrite it.
            bind: returns the block's arguments for a stream.
        """
        if self.error is None and block not in self._compiled:
            self._compile_and_check(block, stream, bind)
        if self.error is not None:
            return _call(block, stream, bind)
        with _compiling():
            return _call(self._compiled[block], stream, bind)

    def _compile_and_check(self, block: nn.Module, stream: torch.Tensor, bind: Bind) -> None:
        name, compiled = type(block).__name__, torch.compile(block, fullgraph=True, dynamic=False)
        eager_output = first_tensor(_call(block, stream.clone(), bind))
        try:
            with _compiling():
                compiled_output = first_tensor(_call(compiled, stream.clone(), bind))
        except Exception as error:  # torch, its compiler and a C++ compiler may raise anything
            if is_out_of_memory(error):
                raise
            self._stop_compiling(
                f"torch cannot compile {name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            )
            return
        if compiled_output is None or eager_output is None or not _is_equal(compiled_output, eager_output, stream):
            self._stop_compiling(f"compiled by torch, {name} returns different values")
            return
        self._compiled[block] = compiled

    def _stop_compiling(self, reason: str) -> None:
        self.error = reason
        self._compiled.clear()
        warn(f"{reason}; blocks are run uncompiled")


def _call(block: Any, stream: torch.Tensor, bind: Bind) -> Any:
    args, kwargs = bind(stream)
    return block(*args, **kwargs)


@contextmanager
def _compiling() -> Iterator[None]:
    """Allow compilation, for more kinds of blocks than torch's default limit."""
    with torch.compiler.set_stance("default"), torch._dynamo.config.patch(recompile_limit=_MAX_BLOCK_KINDS):
        yield


def _is_equal(compiled_output: torch.Tensor, eager_output: torch.Tensor, before: torch.Tensor) -> bool:
    """Check whether both outputs are equal up to rounding of the block's change and of the stream itself."""
    if not bool(eager_output.isfinite().all()):
        return True  # the measurement of predictions reports NaN and infinite values
    return is_same_change(compiled_output, eager_output, before, tolerance("compile", eager_output.dtype))
