"""Tokenize documents and cut them into the sequences to measure on.

The same arguments give the same tokens on any machine, and a fingerprint shows whether they did. (Python's help differs
slightly between versions of Python.)
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import MeasurementError, PlanError
from .documents import read_documents
from .first_token import adds_bos, bos_token_id, uses_bos
from .text_request import ALL, TextRequest

_PIECE = 1_000_000  # characters tokenized at once
_POOL = 16


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """Tokenized text to measure on.

    Attributes:
        ids: token ids, (sequences, length), int64.
        mask: 1 for a token and 0 for padding, the same shape.
        fingerprint: hash of the ids and the mask.
        notes: messages about differences from the request.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Return the number of tokens, without padding."""
        return int(self.mask.sum())


def read_text(request: TextRequest, tokenizer: Any) -> TokenizedText:
    """Read and tokenize the requested text.

    Args:
        request: the text, and how to cut it into sequences.
        tokenizer: the model's tokenizer.

    Returns:
        The tokens, padded on the right to one length.

    Raises:
        SourceError: the data does not exist, cannot be read, is not text, or has no such column.
        MeasurementError: the data contains no text of at least two tokens.
        PlanError: the context is too short, or the tokenizer has no beginning-of-text token.
    """
    if request.context < 2:
        raise PlanError(f"a context of {request.context} has no next token to predict; give at least 2")
    request = replace(request, bos=uses_bos(request.bos, tokenizer))
    context = min(request.context, max(2, request.tokens))
    notes = []
    cut: list[int] = []
    if request.pack and tokenizer.eos_token_id is None:
        notes.append("the tokenizer has no end-of-text token, so documents are joined without one")
    source = (
        _pack_documents(request, context, tokenizer)
        if request.pack
        else _read_separately(request, context, tokenizer, cut)
    )
    needed = context * -(-request.tokens // context) if request.pack else request.tokens
    sequences = _take_tokens(source, needed * (_POOL if request.shuffled and not request.from_hub else 1))
    if request.pack and len(sequences) > 1 and len(sequences[-1]) < context:
        sequences.pop()  # the incomplete context at the end of a text that is too short
    if request.shuffled and not request.from_hub:
        sequences = _take_tokens(random.Random(request.seed).sample(sequences, len(sequences)), needed)
    if not sequences:
        raise MeasurementError(f"{request.data} contains no text of at least two tokens")
    total = sum(map(len, sequences))
    if cut:
        notes.append(f"documents longer than {context} tokens (context), which were cut: {len(cut)}")
    if total < request.tokens < ALL:
        notes.append(f"the text is too short: it has {total:,} tokens of the {request.tokens:,} requested")
    length = max(map(len, sequences))
    # Pad with 0, not with the tokenizer's padding token, which the model may not have. Padding is masked.
    ids = torch.tensor([[*sequence, *[0] * (length - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (length - len(sequence)) for sequence in sequences])
    return TokenizedText(ids, mask, fingerprint_of(ids, mask), tuple(notes))


def _take_tokens(source: Iterable[list[int]], tokens: int) -> list[list[int]]:
    """Take sequences of at least two tokens until they have `tokens` tokens together."""
    sequences, total = [], 0
    for sequence in source:
        if len(sequence) > 1:
            sequences.append(sequence)
            total += len(sequence)
        if total >= tokens:
            break
    return sequences


def fingerprint_of(ids: torch.Tensor, mask: torch.Tensor) -> str:
    """Return a hash of token ids and their mask."""
    digest = hashlib.sha256(str(tuple(ids.shape)).encode())
    for tensor in (ids, mask):
        digest.update(tensor.numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _pack_documents(request: TextRequest, length: int, tokenizer: Any) -> Iterator[list[int]]:
    """Join documents with the end-of-text token and cut them into contexts. The last context may be shorter."""
    prefix = [bos_token_id(tokenizer)] if request.bos else []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    step = length - len(prefix)
    remaining: list[int] = []
    for document in read_documents(request):
        for piece in pieces(document):
            remaining += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            complete = len(remaining) // step * step
            yield from ([*prefix, *remaining[start : start + step]] for start in range(0, complete, step))
            remaining = remaining[complete:]
        remaining += separator
    if remaining:
        yield [*prefix, *remaining[:step]]


def _read_separately(request: TextRequest, length: int, tokenizer: Any, cut: list[int]) -> Iterator[list[int]]:
    """Yield each document with the special tokens that its tokenizer adds, cut off at `length`.

    Add the length of each that was cut to `cut`.
    """
    strips_bos = not request.bos and adds_bos(tokenizer)
    for document in read_documents(request):
        ids: list[int] = tokenizer(document[: 32 * length], verbose=False)["input_ids"]
        if request.bos and ids[:1] != [bos_token_id(tokenizer)]:
            ids = [bos_token_id(tokenizer), *ids]
        elif strips_bos:
            ids = ids[1:]
        if len(ids) > length or len(document) > 32 * length:
            cut.append(len(ids))
        yield ids[:length]


def pieces(document: str) -> Iterator[str]:
    """Split a long document into pieces that end with a line, so that only as many as needed are tokenized."""
    start = 0
    while start < len(document):
        stop = start + _PIECE
        if stop < len(document):
            stop = document.rfind("\n", start, stop) + 1 or stop
        yield document[start:stop]
        start = stop
