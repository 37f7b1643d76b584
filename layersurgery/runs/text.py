"""Read text from Python's help, local files or the Hugging Face Hub, and tokenize it into sequences.

The same arguments give the same tokens on any machine, and a fingerprint shows whether they did. (Python's help differs
slightly between versions of Python.)
"""

from __future__ import annotations

import glob
import hashlib
import logging
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import MeasurementError, PlanError, SourceError
from ..library_logs import quiet_libraries

PYDOC = "pydoc"
PILE = "EleutherAI/the_pile_deduplicated"
_KINDS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
_PACKED = (".zst", ".gz")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.+-]+)?")
_BOS = {"auto": None, "yes": True, "no": False}
ALL = 1 << 40
"""A number of tokens that stands for all there are."""
_PIECE = 1_000_000  # characters tokenized at once
_POOL = 16
_BUFFER = 10_000


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Request for text.

    Attributes:
        data: "pydoc", a file (.txt or .jsonl, also compressed as .zst or .gz, or .parquet), a directory of such files,
            or the id of a Hub dataset ("id:configuration" if it has several configurations).
        tokens: number of tokens; rounded up to whole contexts.
        context: largest number of tokens of one sequence.
        split: split of the Hub dataset.
        column: the column that contains the text, for tables.
        pack: join documents with the end-of-text token and cut them into contexts; otherwise each document is one
            sequence.
        bos: begin each sequence with the tokenizer's beginning-of-text token; None does what the tokenizer does.
        shuffle: take contexts in random order instead of from the start; None means yes for a Hub dataset, no for other
            text.
        seed: seed for shuffling.
        lines: each line of a text file is one document.
        documents: texts that were given from Python; `data` is then a name for them.
    """

    data: str
    tokens: int
    context: int
    split: str = "train"
    column: str = "text"
    pack: bool = True
    bos: bool | None = None
    shuffle: bool | None = None
    seed: int = 0
    lines: bool = False
    documents: Iterable[str] | None = field(default=None, compare=False, repr=False)

    @property
    def from_hub(self) -> bool:
        """Return whether the text comes from the Hub."""
        if self.documents is not None:
            return False
        try:
            return self.data != PYDOC and not Path(self.data).expanduser().exists()
        except (OSError, RuntimeError):  # the name is too long, or "~user" names no user
            return True

    @property
    def shuffled(self) -> bool:
        """Return whether contexts are taken in random order."""
        return self.from_hub if self.shuffle is None else self.shuffle

    def arguments(self) -> dict[str, Any]:
        """Return what the tokens depend on, as `run.json` records it."""
        names = ("data", "tokens", "context", "split", "column", "pack", "bos")
        arguments: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.tokens >= ALL:
            arguments["tokens"] = "all"
        arguments |= {"shuffle": self.shuffled, "seed": self.seed}
        return arguments | ({"lines": True} if self.lines else {})


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


def parse_count(text: str) -> int:
    """Parse a count such as "4096", "100k", "1M" or "2.5M".

    Raises:
        PlanError: the text is not a positive whole number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB]?)", text.strip().replace("_", "").replace(",", ""))
    value = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()] if match else 0
    if value < 1 or value != int(value):
        raise PlanError(f"{text!r} is not a number of tokens: write for example 4096, 100k or 1M")
    return int(value)


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


def bos_token_id(tokenizer: Any) -> int:
    """Return the id of the tokenizer's beginning-of-text token.

    Raises:
        PlanError: the tokenizer has none.
    """
    if tokenizer.bos_token_id is None:
        raise PlanError("bos: this tokenizer has no beginning-of-text token; leave it out")
    return int(tokenizer.bos_token_id)


def parse_bos(bos: bool | str | None) -> bool | None:
    """Return whether sequences begin with the beginning-of-text token; None for what the tokenizer does.

    Raises:
        PlanError: it is not "auto", "yes", "no" or a bool.
    """
    if bos is None or isinstance(bos, bool):
        return bos
    if bos not in _BOS:
        raise PlanError(f"bos is auto, yes or no, not {bos!r}")
    return _BOS[bos]


def uses_bos(bos: bool | str | None, tokenizer: Any) -> bool:
    """Return whether sequences begin with the beginning-of-text token, as asked for or as the tokenizer does.

    Without the token that their training put first, models such as Gemma predict much worse.

    Raises:
        PlanError: it is asked for, and the tokenizer has none.
    """
    choice = parse_bos(bos)
    if choice is None:
        return adds_bos(tokenizer)
    if choice:
        bos_token_id(tokenizer)
    return choice


def adds_bos(tokenizer: Any) -> bool:
    """Return whether a tokenizer puts its beginning-of-text token before plain text by itself."""
    first = getattr(tokenizer, "bos_token_id", None)
    if first is None:
        return False
    with_special, text = (
        tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"][:1] for special in (True, False)
    )
    return bool(list(with_special) == [first] != list(text))


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


def read_documents(request: TextRequest) -> Iterator[str]:
    """Yield the requested documents, except those that contain only white space.

    Raises:
        SourceError: the data does not exist or cannot be read.
    """
    found: Iterable[str]
    if request.documents is not None:
        found = request.documents
    elif request.data == PYDOC:
        from pydoc_data.topics import topics

        found = (topics[name] for name in sorted(topics))
    elif not request.from_hub:
        found = (
            document
            for file in _files(Path(request.data).expanduser())
            for document in _from_file(file, request.column, lines=request.lines)
        )
    else:
        found = _from_hub(request)
    return (document for document in found if document.strip())


def check_data(request: TextRequest) -> None:
    """Check that the requested data can exist, before anything is loaded.

    Raises:
        SourceError: there is no such file or directory, its format is not supported, or the name is not a Hub dataset
            id.
    """
    if request.lines and (request.data == PYDOC or request.from_hub):
        raise PlanError("lines is for text files: each line of the file is one document")
    if request.data == PYDOC or request.documents is not None:
        return
    if not request.from_hub:
        _files(Path(request.data).expanduser())
    elif not _HUB_ID.fullmatch(request.data) or request.data.endswith((*_KINDS, *_PACKED)):
        raise SourceError(f"{request.data} does not exist on this machine and is not a Hub dataset (organization/name)")


def _kind(path: Path) -> str | None:
    """Return the file's format ("text", "json" or "parquet"); None if it is not supported."""
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in _PACKED:
        kind = _KINDS.get((suffixes[-2:-1] or [""])[0])
        return None if kind == "parquet" else kind
    return _KINDS.get(path.suffix)


def _files(path: Path) -> list[Path]:
    """Return the readable files of a directory in a fixed order, or the file itself."""
    formats = f"{', '.join(_KINDS)}, or .txt and .jsonl compressed as {' or '.join(_PACKED)}"
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*")
            if file.is_file() and _kind(file) and not any(part[0] == "." for part in file.relative_to(path).parts)
        )  # fmt: skip
        if not files:
            raise SourceError(f"{path} contains no text: none of its files ends in {formats}")
        return files
    if _kind(path) is None:
        raise SourceError(
            f"{path} has a format that is not supported: give {formats}, {PYDOC!r}, or the id of a Hub dataset"
        )
    return [path]


def _from_file(path: Path, column: str, *, lines: bool = False) -> Iterator[str]:
    import datasets

    kind = _kind(path)
    if lines and kind != "text":
        raise PlanError(f"lines is for text files, and {path} is {kind}: each of its rows is one document already")
    options: dict[str, Any] = {"sample_by": "line" if lines else "document"} if kind == "text" else {}
    if path.stat().st_size == 0:
        return
    try:
        with quiet_libraries(logging.CRITICAL):
            rows = datasets.load_dataset(
                kind, data_files=[glob.escape(str(path.resolve()))], split="train", streaming=True, **options
            )
            yield from column_texts(rows, column, str(path))
    except (SourceError, GeneratorExit):
        raise
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text: {error}") from error
    except Exception as error:  # the readers of the formats may raise any exception
        raise SourceError(f"cannot read {path} as {kind}: {type(error).__name__}: {error}") from error


def _from_hub(request: TextRequest) -> Iterator[str]:
    import datasets

    name, _, configuration = request.data.partition(":")
    try:
        with quiet_libraries(logging.CRITICAL):
            rows = datasets.load_dataset(name, configuration or None, split=request.split, streaming=True)
            if request.shuffled:
                rows = rows.shuffle(seed=request.seed, buffer_size=_BUFFER)
            yield from column_texts(rows, request.column, name)
    except (SourceError, GeneratorExit):
        raise
    except Exception as error:  # the Hub's client may raise any exception
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise SourceError(
            f"cannot read the dataset {request.data} (split {request.split}): {first}. Go online, check the spelling, "
            f"or use local text: a file, or {PYDOC}"
        ) from error


def column_texts(rows: Any, column: str, source: str) -> Iterator[str]:
    """Yield the texts of a column; `source` names the data in errors."""
    for row in rows:
        if column not in row:
            raise SourceError(
                f"{source} has no column {column!r}; it has {', '.join(map(str, row))}. "
                "Name the column that contains the text (column)"
            )
        text = row[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise SourceError(
                f"the column {column!r} of {source} contains {type(text).__name__}, not text; "
                "name the column that contains the text (column)"
            )
        yield text
