"""Text to measure on: from Python's own help, local files or the hub, as token ids in contexts of one length.

The same arguments give the same tokens on any machine; a fingerprint says whether they did. (Python's help differs a little
between versions of Python.)
"""

from __future__ import annotations

import glob
import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import MeasurementError, PlanError, SourceError

PYDOC = "pydoc"
PILE = "EleutherAI/the_pile_deduplicated"
_KINDS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
_PACKED = (".zst", ".gz")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.+-]+)?")
_PIECE = 1_000_000  # characters tokenised at once
_POOL = 16
_BUFFER = 10_000


@dataclass(frozen=True, slots=True)
class TextRequest:
    """What text is asked for.

    Attributes:
        data: "pydoc", a file (.txt, .jsonl, these packed by zst or gz, .parquet), a directory of these, or a hub dataset's id
            ("id:configuration" where it has several).
        tokens: how many tokens; rounded up to whole contexts.
        context: tokens of one sequence, at most.
        split: of a hub dataset.
        column: that holds the text, in tables.
        pack: join documents by the end-of-text token and cut them into contexts; otherwise each document is a sequence.
        bos: begin each context with the tokenizer's beginning-of-text token.
        shuffle: take contexts at random, and not from the start; None: a hub dataset's yes, others no.
        seed: of the shuffling.
    """

    data: str
    tokens: int
    context: int
    split: str = "train"
    column: str = "text"
    pack: bool = True
    bos: bool = False
    shuffle: bool | None = None
    seed: int = 0

    @property
    def from_hub(self) -> bool:
        """Whether the text comes from the hub."""
        try:
            return self.data != PYDOC and not Path(self.data).expanduser().exists()
        except (OSError, RuntimeError):  # a name too long, no such user
            return True

    @property
    def shuffled(self) -> bool:
        """Whether contexts are taken at random."""
        return self.from_hub if self.shuffle is None else self.shuffle


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """Tokens to measure on.

    Attributes:
        ids: (sequences, length), int64.
        mask: 1 for a token and 0 for padding, the same shape.
        fingerprint: of both.
        notes: what was otherwise than asked.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in all, without padding."""
        return int(self.mask.sum())


def parse_count(text: str) -> int:
    """A count as people write it: "4096", "100k", "1M", "2.5M".

    Raises:
        PlanError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB]?)", text.strip().replace("_", "").replace(",", ""))
    value = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()] if match else 0
    if value < 1 or value != int(value):
        raise PlanError(f"{text!r} is no number of tokens: write 4096, 100k or 1M")
    return int(value)


def read_text(request: TextRequest, tokenizer: Any) -> TokenizedText:
    """Tokenise the text that is asked for.

    Raises:
        SourceError: it is not there, cannot be read, is no text, or has no such column.
        MeasurementError: it holds no two tokens.
        PlanError: a context too short.
    """
    if request.context < 2:
        raise PlanError(f"a context of {request.context} has no next token to predict; give at least 2")
    context = min(request.context, max(2, request.tokens))
    notes = []
    if request.pack and tokenizer.eos_token_id is None:
        notes.append("the tokenizer has no end-of-text token, so documents are joined without one")
    sequences = (
        _contexts(request, context, tokenizer) if request.pack else _documents_alone(request, context, tokenizer)
    )
    wanted = context * -(-request.tokens // context) if request.pack else request.tokens
    taken = _taken(sequences, wanted * (_POOL if request.shuffled and not request.from_hub else 1))
    if request.pack and len(taken) > 1 and len(taken[-1]) < context:
        taken.pop()  # the rest of a text that ended early
    if request.shuffled and not request.from_hub:
        taken = _taken(random.Random(request.seed).sample(taken, len(taken)), wanted)
    if not taken:
        raise MeasurementError(f"{request.data} holds no text of at least two tokens")
    total = sum(map(len, taken))
    if total < request.tokens:
        notes.append(f"the text ended early: {total:,} tokens, of {request.tokens:,} asked")
    length = max(map(len, taken))
    # Padding is masked, and a tokenizer's own padding may be a token that the model does not have.
    ids = torch.tensor([[*sequence, *[0] * (length - len(sequence))] for sequence in taken])
    mask = torch.tensor([[1] * len(sequence) + [0] * (length - len(sequence)) for sequence in taken])
    return TokenizedText(ids, mask, _fingerprint(ids, mask), tuple(notes))


def _taken(sequences: Iterable[list[int]], tokens: int) -> list[list[int]]:
    taken, total = [], 0
    for sequence in sequences:
        if len(sequence) > 1:
            taken.append(sequence)
            total += len(sequence)
        if total >= tokens:
            break
    return taken


def _fingerprint(ids: torch.Tensor, mask: torch.Tensor) -> str:
    digest = hashlib.sha256(str(tuple(ids.shape)).encode())
    for tensor in (ids, mask):
        digest.update(tensor.numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _contexts(asked: TextRequest, length: int, tokenizer: Any) -> Iterator[list[int]]:
    """Documents joined by the end-of-text token and cut; what is left at the end is shorter."""
    head = [bos_of(tokenizer)] if asked.bos else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    step = length - len(head)
    rest: list[int] = []
    for document in documents(asked):
        for piece in pieces(document):
            rest += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            whole = len(rest) // step * step
            yield from ([*head, *rest[start : start + step]] for start in range(0, whole, step))
            rest = rest[whole:]
        rest += end
    if rest:
        yield [*head, *rest[:step]]


def bos_of(tokenizer: Any) -> int:
    """The beginning-of-text token.

    Raises:
        PlanError: there is none.
    """
    if tokenizer.bos_token_id is None:
        raise PlanError("--bos: this tokenizer has no beginning-of-text token; leave it out")
    return int(tokenizer.bos_token_id)


def _documents_alone(asked: TextRequest, length: int, tokenizer: Any) -> Iterator[list[int]]:
    """Each document as its tokenizer would begin and end it, cut off at `length`."""
    for document in documents(asked):
        ids: list[int] = tokenizer(document[: 32 * length], verbose=False)["input_ids"]
        if asked.bos and ids[:1] != [bos_of(tokenizer)]:
            ids = [bos_of(tokenizer), *ids]
        yield ids[:length]


def pieces(document: str) -> Iterator[str]:
    """A long document in parts that end with a line, so that no more is tokenised than is needed."""
    start = 0
    while start < len(document):
        stop = start + _PIECE
        if stop < len(document):
            stop = document.rfind("\n", start, stop) + 1 or stop
        yield document[start:stop]
        start = stop


def documents(asked: TextRequest) -> Iterator[str]:
    """The documents themselves, those without any text left out.

    Raises:
        SourceError: they are not there, or cannot be read.
    """
    if asked.data == PYDOC:
        from pydoc_data.topics import topics

        found: Iterable[str] = (topics[name] for name in sorted(topics))
    elif not asked.from_hub:
        found = (
            document for file in _files(Path(asked.data).expanduser()) for document in _from_file(file, asked.column)
        )
    else:
        found = _from_hub(asked)
    return (document for document in found if document.strip())


def check_data(asked: TextRequest) -> None:
    """Refuse text that cannot be there, before anything is loaded.

    Raises:
        SourceError: no such file or directory, none of a kind that is read, or no hub id.
    """
    if asked.data == PYDOC:
        return
    if not asked.from_hub:
        _files(Path(asked.data).expanduser())
    elif not _HUB_ID.fullmatch(asked.data) or asked.data.endswith((*_KINDS, *_PACKED)):
        raise SourceError(f"{asked.data} does not exist on this machine and is no hub dataset (organisation/name)")


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in _PACKED:
        kind = _KINDS.get((suffixes[-2:-1] or [""])[0])
        return None if kind == "parquet" else kind
    return _KINDS.get(path.suffix)


def _files(path: Path) -> list[Path]:
    known = f"{', '.join(_KINDS)}, or .txt and .jsonl packed as {' or '.join(_PACKED)}"
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*")
            if file.is_file() and _kind(file) and not any(part[0] == "." for part in file.relative_to(path).parts)
        )  # fmt: skip
        if not files:
            raise SourceError(f"{path} holds no text: none of its files ends in {known}")
        return files
    if _kind(path) is None:
        raise SourceError(f"{path} is not read: text comes as {known}, as {PYDOC!r}, or as the id of a hub dataset")
    return [path]


def _from_file(path: Path, column: str) -> Iterator[str]:
    import datasets

    kind = _kind(path)
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    if path.stat().st_size == 0:
        return
    try:
        with _silence_datasets():
            rows = datasets.load_dataset(
                kind, data_files=[glob.escape(str(path.resolve()))], split="train", streaming=True, **options
            )
            yield from _texts(rows, column, str(path))
    except (SourceError, GeneratorExit):
        raise
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is no UTF-8 text: {error}") from error
    except Exception as error:  # readers of several formats raise what they like
        raise SourceError(f"cannot read {path} as {kind}: {type(error).__name__}: {error}") from error


def _from_hub(asked: TextRequest) -> Iterator[str]:
    import datasets

    name, _, configuration = asked.data.partition(":")
    try:
        with _silence_datasets():
            rows = datasets.load_dataset(name, configuration or None, split=asked.split, streaming=True)
            if asked.shuffled:
                rows = rows.shuffle(seed=asked.seed, buffer_size=_BUFFER)
            yield from _texts(rows, asked.column, name)
    except (SourceError, GeneratorExit):
        raise
    except Exception as error:  # so does the hub's client
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise SourceError(
            f"cannot read the dataset {asked.data} (split {asked.split}): {first}. Go online, check the spelling, or take local text: --data "
            f"FILE, or --data {PYDOC}"
        ) from error


def _texts(rows: Any, column: str, where: str) -> Iterator[str]:
    for row in rows:
        if column not in row:
            raise SourceError(
                f"{where} has no column {column!r}; it has {', '.join(map(str, row))}. Say which holds the text: --column"
            )
        text = row[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise SourceError(
                f"the column {column!r} of {where} holds {type(text).__name__}, not text; say which holds text: --column"
            )
        yield text


class _silence_datasets:  # noqa: N801 - it reads as a word
    """Without the progress bars and the log of the library that reads."""

    def __enter__(self) -> None:
        import logging

        import datasets

        self.bars = datasets.are_progress_bars_disabled()
        self.disabled = logging.root.manager.disable
        datasets.disable_progress_bars()
        logging.disable(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        import logging

        import datasets

        logging.disable(self.disabled)
        if not self.bars:
            datasets.enable_progress_bars()
