"""Read the rows of tables and the texts of files: .txt, .jsonl, .json, .csv, .tsv and .parquet."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from ..errors import LayerSurgeryError, SourceError
from ..library_logs import quiet_libraries

FORMATS = {
    ".txt": "text", ".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
PACKED = (".zst", ".gz")
COLUMNS = ("text", "messages", "conversations", "conversation")
"""Columns that are read if none is named: the first one found."""
# save_to_disk writes these.
_SAVED_DATASET, _SAVED_SPLITS = ("dataset_info.json", "state.json"), "dataset_dict.json"
_LONGEST_FIELD = (1 << 31) - 1  # of a .csv; Python's limit is 131,072 characters


def find_column(names: Iterable[Any], column: str | None) -> str | None:
    """Return the column that holds the text among these; None if there is none.

    Args:
        names: the columns that there are.
        column: the column that was asked for; None for the first of `COLUMNS`.
    """
    names = list(names)
    return next((name for name in ((column,) if column is not None else COLUMNS) if name in names), None)


def missing_column(place: str, names: Iterable[Any], column: str | None) -> str:
    """Say that a column is missing, and which there are."""
    wanted = repr(column) if column is not None else f"{', '.join(map(repr, COLUMNS[:-1]))} or {COLUMNS[-1]!r}"
    return (
        f"{place} has no column {wanted}; it has {', '.join(map(str, names)) or 'none'}. "
        "Name the column that contains the text or the conversations (`column`)"
    )


def file_format(path: Path) -> str | None:
    """Return a file's format, one of the values of `FORMATS`; None if it is not supported."""
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in PACKED:
        kind = FORMATS.get((suffixes[-2:-1] or [""])[0])
        return None if kind == "parquet" else kind
    return FORMATS.get(path.suffix)


def find_files(path: Path) -> list[Path]:
    """Return the readable files of a directory in a fixed order, or the file itself.

    Raises:
        SourceError: there is none, the format is not supported, or a dataset that `save_to_disk` wrote lies inside.
    """
    formats = f"{', '.join(FORMATS)}, or one of them but .parquet compressed as {' or '.join(PACKED)}"
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*")
            if file.is_file() and file_format(file) and not any(part[0] == "." for part in file.relative_to(path).parts)
        )  # fmt: skip
        if saved := next((file.parent for file in files if is_saved_dataset(file.parent)), None):
            raise SourceError(f"{path} contains a dataset that was saved with save_to_disk; name it: {saved}")
        if not files:
            raise SourceError(f"{path} contains no text: none of its files ends in {formats}")
        return files
    if file_format(path) is None:
        raise SourceError(
            f"{path} has a format that is not supported: give {formats}, a directory of such files or one that "
            "datasets' save_to_disk wrote, pydoc, or the id of a Hub dataset"
        )
    return [path]


def is_saved_dataset(path: Path) -> bool:
    """Return whether datasets' `save_to_disk` wrote this directory."""
    return (path / _SAVED_SPLITS).is_file() or all((path / name).is_file() for name in _SAVED_DATASET)


def saved_splits(path: Path) -> list[str]:
    """Return the splits of a dataset that `save_to_disk` wrote; none if it is a single dataset.

    Raises:
        SourceError: the file that lists them cannot be read.
    """
    listed = path / _SAVED_SPLITS
    if not listed.is_file():
        return []
    try:
        return [str(name) for name in json.loads(listed.read_text("utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{listed} does not list the dataset's splits: {type(error).__name__}: {error}") from error


def read_texts(path: Path, *, lines: bool = False) -> Iterator[tuple[str, str]]:
    """Yield a text file's one document, or each of its lines, after its place.

    Raises:
        SourceError: the file cannot be read.
    """

    def read() -> Iterator[tuple[str, str]]:
        with _open(path) as file:
            if lines:
                yield from ((f"{path}, line {number}", line.rstrip("\n")) for number, line in enumerate(file, 1))
            else:
                yield str(path), file.read()

    return _readable(path, "text", read())


def read_rows(path: Path, column: str | None) -> Iterator[tuple[int, Any]]:
    """Yield a table's rows after their numbers; the first row is 1, and lines of .jsonl files are rows.

    Args:
        path: the file.
        column: the column that will be read; a .json file is one row if it is an object that has it.

    Raises:
        SourceError: the file cannot be read; the error names the row if it is known.
    """
    kind = file_format(path)
    if kind == "parquet":
        rows = _parquet_rows(path)
    elif kind == "jsonl":
        rows = _json_lines(path)
    elif kind == "json":
        rows = _json_rows(path, column)
    else:
        rows = _csv_rows(path, "\t" if kind == "tsv" else ",")
    return _readable(path, str(kind), rows)


def _readable(path: Path, kind: str, found: Iterator[Any]) -> Iterator[Any]:
    """Yield what is read, and name the file in every error."""
    try:
        if path.stat().st_size:
            yield from found
    except (LayerSurgeryError, GeneratorExit):
        raise
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text: {error}") from error
    except Exception as error:  # the readers of the formats may raise any exception
        raise SourceError(f"cannot read {path} as {kind}: {type(error).__name__}: {error}") from error


def _open(path: Path, newline: str | None = None) -> IO[str]:
    """Open a text file that may be compressed."""
    file: Any = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 - what is returned closes it
    if path.suffix == ".zst":
        import zstandard

        # Without this option, reading ends after the first frame, and parallel compressors write many.
        file = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return io.TextIOWrapper(cast("IO[bytes]", file), encoding="utf-8-sig", newline=newline)


def _json_lines(path: Path, file: IO[str] | None = None) -> Iterator[tuple[int, Any]]:
    with file or _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                found = line.strip()
                found = found if len(found) <= 60 else f"{found[:57]}..."
                raise SourceError(f"{path}, row {number} is not JSON ({error}): found {found}") from error
            yield number, row


def _json_rows(path: Path, column: str | None) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a list of objects, of an object that holds one such list, or the object as one row."""
    with _open(path) as file:
        content = file.read()
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # many files of JSON lines are named .json
            yield from _json_lines(path, io.StringIO(content))
            return
        raise SourceError(f"{path} is not JSON: {error}") from error
    if isinstance(value, dict):
        if find_column(value, column):
            value = [value]
        else:
            lists = [name for name, rows in value.items() if _is_list_of_objects(rows)]
            if len(lists) > 1:
                raise SourceError(
                    f"{path} holds several lists of objects ({', '.join(lists)}), and it is not clear which one is "
                    "meant; write the rows of one of them into a file"
                )
            if not lists:
                raise SourceError(missing_column(str(path), value, column))
            value = value[lists[0]]
    if not isinstance(value, list):
        raise SourceError(f"{path} holds {describe(value)}, not a list of objects")
    yield from enumerate(value, 1)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    # pandas would turn texts such as "NA" and "12" into other values.
    csv.field_size_limit(_LONGEST_FIELD)
    with _open(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise SourceError(f"{path} has two columns of one name: {', '.join(names)}")
            for number, fields in enumerate(filter(None, reader), 1):  # blank lines are no rows
                if len(fields) != len(names):
                    raise SourceError(
                        f"{path}, row {number} (line {reader.line_num}) has {len(fields)} fields, and the header has "
                        f"{len(names)}: {', '.join(names)}"
                    )
                yield number, dict(zip(names, fields, strict=True))
        except csv.Error as error:
            raise SourceError(f"{path}, line {reader.line_num}: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import datasets

    with quiet_libraries(logging.CRITICAL):
        files = [glob.escape(str(path.resolve()))]
        yield from enumerate(datasets.load_dataset("parquet", data_files=files, split="train", streaming=True), 1)


def describe(value: Any) -> str:
    """Describe a value that was found in the place of a text, for errors."""
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, value)) or 'nothing in it'}"
    if isinstance(value, list | tuple):
        return f"a list of {type(value[0]).__name__}" if value else "an empty list"
    shown = repr(value)
    return f"{type(value).__name__} ({shown if len(shown) <= 40 else f'{shown[:37]}...'})"
