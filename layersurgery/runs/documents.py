"""Read documents: texts and conversations from Python's help, files, saved datasets, the Hugging Face Hub or Python."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PlanError, SourceError
from ..library_logs import quiet_libraries
from .chat import ChatWriter, as_messages
from .data_files import (
    FORMATS,
    PACKED,
    describe,
    file_format,
    find_column,
    find_files,
    is_saved_dataset,
    missing_column,
    read_rows,
    read_texts,
    saved_splits,
)
from .text_request import DEFAULT_SPLIT, PYDOC, TextRequest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.+-]+)?")
_BUFFER = 10_000
_Entry = tuple[str, Any]  # where it stands, and what stands there


@dataclass(frozen=True, slots=True)
class Document:
    """Describe a text to tokenize.

    Attributes:
        text: the text.
        is_chat: whether a chat template wrote it; the text then has all special tokens that it should have.
    """

    text: str
    is_chat: bool = False


@dataclass(slots=True)
class ReadingRecord:
    """Record what was read so far.

    Attributes:
        files: the files.
        columns: the columns of tables that held the documents.
        documents: number of documents; conversations are counted as well.
        conversations: number of conversations.
        empty_rows: number of rows of tables without text, which are left out.
        template: the chat template, if there were conversations.
        notes: messages about the chat template.
    """

    files: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    documents: int = 0
    conversations: int = 0
    empty_rows: int = 0
    template: str | None = None
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Return what `run.json` says about it."""
        found = {
            "files": self.files, "columns": self.columns, "documents": self.documents,
            "conversations": self.conversations, "empty_rows": self.empty_rows, "chat_template": self.template,
        }  # fmt: skip
        return {name: value for name, value in found.items() if value}

    def all_notes(self) -> list[str]:
        """Return messages about what was read."""
        empty = [f"rows without text, which were left out: {self.empty_rows:,}"] if self.empty_rows else []
        return [*self.notes, *empty]


def read_documents(request: TextRequest, tokenizer: Any, record: ReadingRecord | None = None) -> Iterator[Document]:
    """Yield the requested documents, except those that contain only white space.

    Args:
        request: which documents.
        tokenizer: the tokenizer, whose chat template writes conversations.
        record: takes note of what was read.

    Raises:
        SourceError: the data does not exist or cannot be read, an entry is neither text nor a conversation, or the
            tokenizer has no chat template for a conversation.
    """
    record = ReadingRecord() if record is None else record
    writer = ChatWriter(tokenizer)
    for place, found in _entries(request, record):
        messages = None if isinstance(found, str) else as_messages(found)
        if messages is not None:
            text = writer.write(messages, place)
            record.template, record.notes = writer.template, writer.notes
        elif isinstance(found, str):
            text = found
        else:
            raise SourceError(f"{place}: found {describe(found)}, not text or a list of messages")
        if not text.strip():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a pair, which JSON can spell
            raise SourceError(f"{place}: the text is not valid Unicode: {error}") from error
        record.documents += 1
        record.conversations += messages is not None
        yield Document(text, messages is not None)


def read_plain_texts(request: TextRequest, tokenizer: Any, record: ReadingRecord | None = None) -> Iterator[str]:
    """Yield the texts of documents into which no beginning-of-text token belongs; arguments as for `read_documents`."""
    first = (request.bos and tokenizer.bos_token) or ""
    for document in read_documents(request, tokenizer, record):
        yield document.text.removeprefix(first) if document.is_chat else document.text


def check_data(request: TextRequest) -> None:
    """Check that the requested data can exist, before anything is loaded.

    Raises:
        SourceError: the file, directory or split does not exist, its format is not supported, or the name is not a Hub
            dataset id.
        PlanError: an option is for other data.
    """
    if request.documents is not None:
        return
    path = request.path
    is_saved = path is not None and is_saved_dataset(path)
    if request.lines and (is_saved or path is None):
        raise PlanError("`lines` is for text files: each line of the file is one document")
    splits = saved_splits(path) if path and is_saved else []
    if splits and request.split not in splits:
        raise SourceError(_missing_split(str(path), splits, request.split))
    if request.split != DEFAULT_SPLIT and not (splits or request.from_hub):
        raise PlanError(f"`split` is for a dataset of several splits, and {request.data} is not one")
    if path and not is_saved:
        for file in find_files(path):
            if request.lines and file_format(file) != "text":
                raise PlanError(
                    f"`lines` is for text files, and {file} is {file_format(file)}: each of its rows is one document "
                    "already"
                )
    elif request.from_hub and (not _HUB_ID.fullmatch(request.data) or request.data.endswith((*FORMATS, *PACKED))):
        raise SourceError(f"{request.data} does not exist on this machine and is not a Hub dataset (organization/name)")


def choose_split(dataset: Any, split: str, source: str) -> Any:
    """Return one split of a dataset.

    Raises:
        SourceError: it does not have this split; the error names those it has.
    """
    if split not in dataset:
        raise SourceError(_missing_split(source, dataset, split))
    return dataset[split]


def _missing_split(source: str, splits: Iterable[str], split: str) -> str:
    return f"{source} has no split {split!r}; it has {', '.join(map(str, splits))}. Name one of them (`split`)"


def _entries(request: TextRequest, record: ReadingRecord) -> Iterator[_Entry]:
    """Yield what stands where the documents are."""
    if request.documents is not None:
        if hasattr(request.documents, "column_names"):
            yield from _cells(enumerate(request.documents, 1), request.column, "the dataset", record)
        else:
            yield from ((f"text {number}", found) for number, found in enumerate(request.documents, 1))
    elif request.data == PYDOC:
        from pydoc_data.topics import topics

        yield from ((f"the topic {name}", topics[name]) for name in sorted(topics))
    elif (path := request.path) is None:
        yield from _from_hub(request, record)
    elif is_saved_dataset(path):
        yield from _from_saved_dataset(path, request, record)
    else:
        for file in find_files(path):
            record.files.append(file.relative_to(path).as_posix() if file != path else file.name)
            if file_format(file) == "text":
                yield from read_texts(file, lines=request.lines)
            else:
                yield from _cells(read_rows(file, request.column), request.column, str(file), record)


def _cells(rows: Iterable[tuple[int, Any]], column: str | None, source: str, record: ReadingRecord) -> Iterator[_Entry]:
    """Yield what the rows of a table hold in one column, except nothing.

    Args:
        rows: the rows after their numbers.
        column: the column; None for the first one that a table of texts or of conversations usually has.
        source: the table, for errors.
        record: takes note of the column and of empty rows.
    """
    wanted = column
    for number, row in rows:
        place = f"{source}, row {number}"
        if not isinstance(row, Mapping):
            raise SourceError(f"{place}: found {describe(row)}, not an object with named fields")
        chosen = find_column(row, wanted)
        if chosen is None:
            raise SourceError(missing_column(place, row, wanted))
        wanted = chosen
        if chosen not in record.columns:
            record.columns.append(chosen)
        found, place = row[chosen], f"{place}, column {chosen!r}"
        if found is None or found == [] or (isinstance(found, str) and not found.strip()):
            record.empty_rows += 1
        elif isinstance(found, str) and column is None and chosen != "text":
            raise SourceError(
                f"{place}: found {describe(found)}, not a list of messages; to read it as text, name it (`column`)"
            )
        else:
            yield place, found


def _from_saved_dataset(path: Path, request: TextRequest, record: ReadingRecord) -> Iterator[_Entry]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path.resolve()))
        if isinstance(dataset, Mapping):
            dataset = choose_split(dataset, request.split, str(path))
        yield from _cells(enumerate(dataset, 1), request.column, str(path), record)
    except (SourceError, GeneratorExit):
        raise
    except Exception as error:  # a damaged file may raise any exception
        raise SourceError(f"cannot read the saved dataset {path}: {type(error).__name__}: {error}") from error


def _from_hub(request: TextRequest, record: ReadingRecord) -> Iterator[_Entry]:
    import datasets

    name, _, configuration = request.data.partition(":")
    try:
        with quiet_libraries(logging.CRITICAL):
            rows = datasets.load_dataset(name, configuration or None, split=request.split, streaming=True)
            if request.shuffled:
                rows = rows.shuffle(seed=request.seed, buffer_size=_BUFFER)
            order = " in shuffled order" if request.shuffled else ""
            yield from _cells(enumerate(rows, 1), request.column, f"{name}{order}", record)
    except (SourceError, GeneratorExit):
        raise
    except Exception as error:  # the Hub's client may raise any exception
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise SourceError(
            f"cannot read the dataset {request.data} (split {request.split}): {first}. Go online, check the spelling, "
            f"or use local text (`data`): a file, or {PYDOC}, which every Python has"
        ) from error
