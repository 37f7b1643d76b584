"""What the searches for windows of text share: encoding, fingerprints, batches, and the error for too little text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from ..errors import MeasurementError
from ..runs.text import pieces

OnWindows = Callable[[int, int], None]
"""Called with the number of windows done and the total."""
_SPARE = 1.2


def encode_pieces(documents: Iterable[str], tokenizer: Any, **options: Any) -> Iterator[tuple[str, Any]]:
    """Yield each piece of each document, and the tokenizer's output for it; a piece is never joined to another."""
    for document in documents:
        for piece in pieces(document):
            yield piece, tokenizer(piece, add_special_tokens=False, verbose=False, **options)


def fingerprint(ids: torch.Tensor, *labels: np.ndarray) -> str:
    """Return a hash of windows of tokens and of the labels of each window."""
    digest = hashlib.sha256(ids.numpy().astype("<i8").tobytes())
    digest.update(np.stack(labels).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def prepend_token(ids: torch.Tensor, first: int | None) -> torch.Tensor:
    """Put a token before every window; None for no token."""
    return ids if first is None else torch.cat([torch.full((len(ids), 1), first), ids], 1)


def in_batches(count: int, batch_size: int, progress: OnWindows | None) -> Iterator[slice]:
    """Yield the windows of each batch, and report progress after it.

    Args:
        count: number of windows.
        batch_size: windows per batch.
        progress: called after each batch.
    """
    for start in range(0, count, batch_size):
        batch = slice(start, min(start + batch_size, count))
        yield batch
        if progress is not None:
            progress(batch.stop, count)


def too_few_windows(problem: str, *, found: float, needed: int, read: int, advice: str) -> MeasurementError:
    """Make the error for too few windows.

    Args:
        problem: what was found and what is needed.
        found: number of windows that were found.
        needed: number of windows that are needed.
        read: number of tokens that were searched.
        advice: what to do if none was found, since then nobody knows how much text is needed.
    """
    if not found:
        return MeasurementError(f"{problem}. {advice}")
    tokens = _round_up(_SPARE * read * needed / found)
    return MeasurementError(
        f"{problem}. At this rate, about {tokens:,} tokens of text are needed: give more text (`data`, `tokens`)"
    )


def _round_up(tokens: float) -> int:
    """Round up to two significant digits."""
    step: int = 10 ** max(0, len(str(int(tokens))) - 2)
    return math.ceil(tokens / step) * step
