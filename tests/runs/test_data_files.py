"""Tables in files and saved datasets: the same texts from each, and every wrong row named."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard

from layersurgery.errors import PlanError, SourceError
from layersurgery.runs.data_files import file_format
from layersurgery.runs.documents import ReadingRecord, check_data, read_documents
from layersurgery.runs.text_request import TextRequest
from tests.support.tiny_checkpoint import tiny_tokenizer

TEXTS = ["one, two", 'a "quoted" word', "two\nlines", "NA", "12", "2024-01-01", "é\u2028x", "tab\there"]
TABLE = datasets.Dataset.from_dict({"number": list(range(len(TEXTS))), "text": TEXTS})


def texts_of(data: Path, record: ReadingRecord | None = None, **options: Any) -> list[str]:
    request = TextRequest(str(data), 100, 10, **options)
    check_data(request)
    return [document.text for document in read_documents(request, tiny_tokenizer(), record)]


def write(path: Path) -> Path:
    """Write the table with the datasets library, as the file's name says."""
    kind, name = file_format(path), str(path)
    if kind is None:
        TABLE.save_to_disk(name)
    elif kind == "parquet":
        TABLE.to_parquet(name)
    elif kind in ("csv", "tsv"):
        TABLE.to_csv(name, index=False, sep="," if kind == "csv" else "\t")
    elif kind == "json":
        TABLE.to_json(name, orient="records", lines=False)
    else:
        TABLE.to_json(name)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "a.csv.gz", "saved"])
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    record = ReadingRecord()
    assert texts_of(write(tmp_path / name), record) == TEXTS
    files = {} if name == "saved" else {"files": [name]}
    assert record.facts() == files | {"columns": ["text"], "documents": len(TEXTS)}
    with pytest.raises(SourceError, match=r"row 1 has no column 'body'; it has number, text. Name the column"):
        texts_of(tmp_path / name, column="body")
    with pytest.raises(SourceError, match="has no column 'nothing'"):
        texts_of(tmp_path / name, column="nothing")


def test_a_split_of_a_saved_dataset(tmp_path: Path) -> None:
    splits = datasets.DatasetDict(test=TABLE, other=datasets.Dataset.from_dict({"text": ["else"]}))
    splits.save_to_disk(tmp_path / "saved")
    assert texts_of(tmp_path / "saved", split="test") == TEXTS
    assert texts_of(tmp_path / "saved", split="other") == ["else"]
    with pytest.raises(
        SourceError, match=r"saved has no split 'train'; it has test, other. Name one of them \(`split`\)"
    ):
        texts_of(tmp_path / "saved")
    with pytest.raises(SourceError, match=r"contains a dataset that was saved with save_to_disk; name it: .*saved"):
        texts_of(tmp_path)
    with pytest.raises(PlanError, match="`lines` is for text files"):
        texts_of(tmp_path / "saved", split="test", lines=True)
    next((tmp_path / "saved" / "test").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(SourceError, match="cannot read the saved dataset"):
        texts_of(tmp_path / "saved", split="test")


@pytest.mark.parametrize("name", ["a.csv", "saved", "pydoc"])
def test_a_split_that_nothing_has_is_refused(tmp_path: Path, name: str) -> None:
    data = Path(name) if name == "pydoc" else write(tmp_path / name)
    with pytest.raises(PlanError, match="`split` is for a dataset of several splits"):
        texts_of(data, split="test")


def test_empty_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n\n{"text": "  "}\n{"text": "two"}\n')
    record = ReadingRecord()
    assert texts_of(tmp_path / "a.jsonl", record) == ["one", "two"]
    assert record.all_notes() == ["rows without text, which were left out: 2"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,n\none,1\ntwo\n", r"a.csv, row 2 \(line 3\) has 1 fields, and the header has 2: text, n"),
        ("a.tsv", "text\tn\none\t1\ntwo\t2\t3\n", r"a.tsv, row 2 \(line 3\) has 3 fields"),
        ("a.csv", 'text\n"one\n', "a.csv, line 2: unexpected end of data"),
        ("a.csv", "text,text\none,two\n", "a.csv has two columns of one name: text, text"),
        ("a.jsonl", '{"text": "one"}\n["two"]\n', "a.jsonl, row 2: found a list of str, not an object"),
        ("a.jsonl", '{"text": "one"}\n{"txt": "two"}\n', "a.jsonl, row 2 has no column 'text'; it has txt"),
        ("a.jsonl", '{"text": "one"}\n{"text": 2}\n', r"a.jsonl, row 2, column 'text': found int \(2\), not text"),
        ("a.jsonl", '{"text": "one"}\n{"text": two}\n', r"row 2 is not JSON \(Expecting value.*found {\"text\": two}"),
        ("a.json", '[{"text": "one"}, "two"]', r"a.json, row 2: found str \('two'\), not an object"),
        ("a.json", '[{"text": "one"}', "a.json is not JSON: Expecting ',' delimiter: line 1"),
        ("a.json", '{"version": 1}', "a.json has no column 'text', .*; it has version"),
        ("a.json", '"text"', r"a.json holds str \('text'\), not a list of objects"),
        ("a.json", '{"a": [{"text": "x"}], "b": [{"text": "y"}]}', r"holds several lists of objects \(a, b\)"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=words):
        texts_of(tmp_path / name)


def test_an_object_of_json_may_be_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "one", "parts": [{"text": "two"}]}))
    assert texts_of(tmp_path / "a.json") == ["one"]


def test_a_long_field_and_a_mark_of_the_encoding(tmp_path: Path) -> None:
    """Spreadsheets put a byte-order mark before the first column's name; Python's csv stops at 131,072 characters."""
    long = "x" * (csv.field_size_limit() + 1 if csv.field_size_limit() < 1 << 20 else 200_000)
    (tmp_path / "a.csv").write_text(f"text\n{long}\n", encoding="utf-8-sig")
    assert texts_of(tmp_path / "a.csv") == [long]


def test_a_compressed_file_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, lines)))
    assert texts_of(tmp_path / "a.jsonl.zst") == TEXTS
