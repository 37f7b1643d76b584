"""Tokenize documents and cut them into the sequences to measure on.

The same arguments give the same tokens on any machine, and a fingerprint shows whether they did. (Python's help differs
slightly between versions of Python.)
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import MeasurementError, PlanError
from .documents import ReadingRecord, read_documents
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
        read: what the tokens were made from, for `run.json`.
        scored: True for the tokens that are scored, the same shape; None if every token with one before it is.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    fingerprint: str
    notes: tuple[str, ...] = ()
    read: dict[str, Any] = field(default_factory=dict)
    scored: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Return the number of tokens, without padding."""
        return int(self.mask.sum())

    @property
    def noun(self) -> str:
        """Return what a sequence is: a request of a task, of which only some tokens are scored, or a sequence."""
        return "sequence" if self.scored is None else "request"

    def count(self, sequences: int) -> str:
        """Return a number of sequences in words."""
        return f"{sequences:,} {self.noun}{'s'[: sequences != 1]}"


def read_text(request: TextRequest, tokenizer: Any) -> TokenizedText:
    """Read and tokenize the requested text.

    Args:
        request: the text, and how to cut it into sequences.
        tokenizer: the model's tokenizer.

    Returns:
        The tokens, padded on the right to one length.

    Raises:
        SourceError: the data does not exist, cannot be read, is not text, or has no such column; or the tokenizer has
            no chat template for a conversation.
        MeasurementError: the data contains no text of at least two tokens.
        PlanError: the context is too short, or the tokenizer has no beginning-of-text token.
    """
    if request.context < 2:
        raise PlanError(f"a context of {request.context} has no next token to predict; give at least 2")
    request = replace(request, bos=uses_bos(request.bos, tokenizer))
    context = min(request.context, max(2, request.tokens))
    notes = []
    cut: list[int] = []
    record = ReadingRecord()
    if request.pack and tokenizer.eos_token_id is None:
        notes.append("the tokenizer has no end-of-text token, so documents are joined without one")
    source = (
        _pack_documents(request, context, tokenizer, record)
        if request.pack
        else _read_separately(request, context, tokenizer, record, cut)
    )
    needed = context * -(-request.tokens // context) if request.pack else request.tokens
    sequences = _take_tokens(source, needed * (_POOL if request.shuffled and not request.from_hub else 1))
    if request.pack and len(sequences) > 1 and len(sequences[-1]) < context:
        sequences.pop()  # the incomplete context at the end of a text that is too short
    if request.shuffled and not request.from_hub:
        sequences = _take_tokens(random.Random(request.seed).sample(sequences, len(sequences)), needed)
    if not sequences:
        raise MeasurementError(f"{request.data} contains no text of at least two tokens")
    notes += record.all_notes()
    total = sum(map(len, sequences))
    if cut:
        notes.append(f"documents longer than {context} tokens (`context`), which were cut: {len(cut)}")
    if total < request.tokens < ALL:
        notes.append(f"the text is too short: it has {total:,} tokens of the {request.tokens:,} requested")
    length = max(map(len, sequences))
    # Pad with 0, not with the tokenizer's padding token, which the model may not have. Padding is masked.
    ids = torch.tensor([[*sequence, *[0] * (length - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (length - len(sequence)) for sequence in sequences])
    return TokenizedText(ids, mask, fingerprint_of(ids, mask), tuple(notes), record.facts())


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


def _pack_documents(request: TextRequest, length: int, tokenizer: Any, record: ReadingRecord) -> Iterator[list[int]]:
    """Join documents with the end-of-text token and cut them into contexts. The last context may be shorter."""
    prefix = [bos_token_id(tokenizer)] if request.bos else []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    remaining: list[int] = []
    has_chat = False

    def cut(*, is_last: bool = False) -> Iterator[list[int]]:
        start = 0
        while start < len(remaining):
            # A chat template writes the first token by itself; it is not put before another one.
            first = [] if has_chat and remaining[start : start + 1] == prefix else prefix
            stop = start + length - len(first)
            if stop > len(remaining) and not is_last:
                break
            yield [*first, *remaining[start:stop]]
            start = stop
        del remaining[:start]

    for document in read_documents(request, tokenizer, record):
        has_chat = has_chat or document.is_chat
        for piece in pieces(document.text):
            remaining += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            yield from cut()
        # The templates of many chat models end with the end-of-text token, and white space.
        if not (document.is_chat and separator and document.text.rstrip().endswith(tokenizer.eos_token)):
            remaining += separator
    yield from cut(is_last=True)


def _read_separately(
    request: TextRequest, length: int, tokenizer: Any, record: ReadingRecord, cut: list[int]
) -> Iterator[list[int]]:
    """Yield each document with the special tokens that its tokenizer or its chat template adds, cut off at `length`.

    Add the length of each that was cut to `cut`.
    """
    strips_bos = not request.bos and adds_bos(tokenizer)
    for document in read_documents(request, tokenizer, record):
        text = document.text
        ids: list[int] = tokenizer(text[: 32 * length], add_special_tokens=not document.is_chat, verbose=False)[
            "input_ids"
        ]
        if request.bos and ids[:1] != [bos_token_id(tokenizer)]:
            ids = [bos_token_id(tokenizer), *ids]
        elif strips_bos and not document.is_chat:
            ids = ids[1:]
        if len(ids) > length or len(text) > 32 * length:
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
