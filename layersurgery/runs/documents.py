"""Read documents from Python's help, local files or the Hugging Face Hub."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import PlanError, SourceError
from ..library_logs import quiet_libraries
from .text_request import PYDOC, TextRequest

_KINDS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
_PACKED = (".zst", ".gz")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.+-]+)?")
_BUFFER = 10_000


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
