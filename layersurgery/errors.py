"""Exceptions, by what the user has to change.

Every error that this package raises on purpose is a `LayerSurgeryError`. Its text says what was asked, where, what was
found and what to do. The command line prints it without a traceback.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

# Messages that accelerate does not know: of cuBLAS, of the CUDA driver and of Triton.
_OUT_OF_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
)


class LayerSurgeryError(Exception):
    """Base class of all errors raised on purpose."""


class PlanError(LayerSurgeryError, ValueError):
    """An invalid plan, edit or route. Fix the plan."""


class SourceError(LayerSurgeryError):
    """A model that cannot be found or read: missing, damaged, or in an unsupported format."""


class UnsupportedEditError(LayerSurgeryError):
    """An edit that this architecture does not support, or that its config.json cannot represent."""


class OutputError(LayerSurgeryError):
    """An output that cannot be written: it exists, the disk is full, access is denied, or it lies inside the source."""


class UndoError(LayerSurgeryError):
    """An edit in memory that was not undone, because other code changed the model in the meantime."""


class MeasurementError(LayerSurgeryError):
    """A measurement that failed: NaN or infinite predictions, not enough memory, or not enough text."""


class LayerSurgeryWarning(UserWarning):
    """A warning of this package: something was left out, or is done in another way than asked."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, whichever library raised it.

    >>> from layersurgery.errors import is_out_of_memory
    >>> is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    True
    """
    # torch's class has this name; torch is not imported for it, since that would slow down every command.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # The exceptions with which Typer ends a command are RuntimeErrors, too: they have a number, or nothing.
    if not isinstance(error, RuntimeError) or not any(isinstance(argument, str) for argument in error.args):
        return False
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(RuntimeError(str(error))) or any(text in str(error) for text in _OUT_OF_MEMORY)


def warn(message: str) -> None:
    """Warn at the line outside of this package that called it, however many functions lie between."""
    package = str(Path(__file__).parent)
    frame, level = sys._getframe(1), 2
    inside = (package, contextlib.__file__)  # a `with` block inside the package runs code of contextlib
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, LayerSurgeryWarning, stacklevel=level)
