"""Text from everywhere: the same arguments, the same tokens."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from tokenizers import processors

import layersurgery as ls
from layersurgery.errors import MeasurementError, PlanError, SourceError
from layersurgery.plans.variants import variants
from layersurgery.runs.documents import check_data
from layersurgery.runs.first_token import adds_bos, parse_bos
from layersurgery.runs.options import RunOptions
from layersurgery.runs.requests import text_request
from layersurgery.runs.text import TokenizedText, read_text
from layersurgery.runs.text_request import PILE, TextRequest, parse_count
from tests.cli.test_cli import run
from tests.support.tiny_checkpoint import LETTERS, checkpoint, tiny_tokenizer
from tests.support.zoo import tiny_model

END = 2
DOCUMENTS = ["one document", "and another one", "x", "the third: a bit longer than those before it"]


def ids_of(text: str) -> list[int]:
    return [LETTERS.index(letter) + 4 for letter in text]


JOINED = [token for document in DOCUMENTS for token in [*ids_of(document), END]]


def read(data: Path | str, tokens: int = 40, context: int = 10, tokenizer: Any = None, **options: Any) -> TokenizedText:
    asked = TextRequest(str(data), tokens, context, **options)
    check_data(asked)
    return read_text(asked, tokenizer or tiny_tokenizer())


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "some.jsonl"
    rows = [{"text": document, "meta": {"n": i} if i % 2 else {"s": "x"}} for i, document in enumerate(DOCUMENTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_documents_are_joined_by_the_end_of_text_and_cut(jsonl: Path) -> None:
    text = read(jsonl)
    assert text.ids.tolist() == [JOINED[start : start + 10] for start in range(0, 40, 10)]
    assert text.mask.all()
    assert (text.tokens, text.notes) == (40, ())


@pytest.mark.parametrize("kind", ["jsonl.zst", "jsonl.gz", "parquet", "directory"])
def test_the_same_text_in_any_form_is_the_same(jsonl: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "other" / f"some.{kind}"
    path.parent.mkdir()
    if kind == "jsonl.zst":
        path.write_bytes(zstandard.compress(jsonl.read_bytes()))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(jsonl.read_bytes()))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": DOCUMENTS, "number": [1, 2, 3, 4]}), path)
    else:
        path = path.parent
        for place, document in enumerate(DOCUMENTS):
            (path / f"{place}.txt").write_text(document)
        (path / "notes.md").write_text("not read")
    assert read(path).fingerprint == read(jsonl).fingerprint
    assert read(path, 30).fingerprint != read(jsonl).fingerprint


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first line\n\nthird line\n" * 3)
    text = read(tmp_path / "a.txt", 30, 15)
    assert text.ids.flatten().tolist() == ids_of(("first line\n\nthird line\n" * 3)[:30])
    packed = zstandard.compress((tmp_path / "a.txt").read_bytes())
    (tmp_path / "b.txt.zst").write_bytes(packed)
    assert read(tmp_path / "b.txt.zst", 30, 15).fingerprint == text.fingerprint


def test_a_long_document_is_tokenised_as_far_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layersurgery.runs.text._PIECE", 50)
    lines = "".join(f"line {number}\n" for number in range(1000))
    (tmp_path / "a.txt").write_text(lines)
    tokenizer = tiny_tokenizer()
    given: list[str] = []

    class Counting:
        eos_token_id = pad_token_id = END

        def __call__(self, piece: str, **options: Any) -> Any:
            given.append(piece)
            return tokenizer(piece, **options)

    text = read(tmp_path / "a.txt", 200, 20, Counting())
    assert text.ids.flatten().tolist() == ids_of(lines[:200])
    assert all(piece.endswith("\n") for piece in given)
    assert len(given) <= 6


def test_pydoc_is_the_help_of_python() -> None:
    text = read("pydoc", 1000, 100)
    tokenizer = tiny_tokenizer()
    first = tokenizer(topics[min(topics)], add_special_tokens=False)["input_ids"]
    assert text.ids.flatten().tolist()[: len(first)] == first[:1000]
    assert text.ids.shape == (10, 100)


def test_one_document_a_sequence(jsonl: Path) -> None:
    text = read(jsonl, 1000, 20, pack=False)
    kept = [ids_of(document)[:20] for document in DOCUMENTS if len(document) > 1]
    assert [row[mask.bool()].tolist() for row, mask in zip(text.ids, text.mask, strict=True)] == kept
    assert text.ids.shape == (3, 20)
    assert text.ids[0, 12:].eq(0).all()
    assert text.notes == (
        "documents longer than 20 tokens (`context`), which were cut: 1",
        "the text is too short: it has 47 tokens of the 1,000 requested",
    )
    assert len(read(jsonl, 13, 20, pack=False).ids) == 2


def test_every_sequence_may_begin_with_the_beginning_of_text(jsonl: Path) -> None:
    text = read(jsonl, bos=True)
    assert text.ids[:, 0].eq(1).all()
    assert text.ids[:, 1:].flatten().tolist() == JOINED[:36]
    assert read(jsonl, 100, 20, pack=False, bos=True).ids[:, 0].eq(1).all()
    with pytest.raises(PlanError, match="`bos`: this tokenizer has no beginning-of-text token"):
        read(jsonl, bos=True, tokenizer=_without("bos_token"))


def _without(name: str) -> Any:
    tokenizer = tiny_tokenizer()
    setattr(tokenizer, name, None)
    return tokenizer


def test_without_an_end_of_text_token_documents_are_joined_and_that_is_said(jsonl: Path) -> None:
    text = read(jsonl, tokenizer=_without("eos_token"))
    assert text.ids.flatten().tolist() == ids_of("".join(DOCUMENTS))[:40]
    assert text.notes == ("the tokenizer has no end-of-text token, so documents are joined without one",)


def test_shuffling_takes_contexts_at_random_by_the_seed(jsonl: Path) -> None:
    plain = read(jsonl, 30)
    assert read(jsonl, 30, seed=5).fingerprint == plain.fingerprint
    shuffled = [read(jsonl, 30, shuffle=True, seed=seed) for seed in range(6)]
    assert len({text.fingerprint for text in shuffled}) > 3
    assert shuffled[2].fingerprint == read(jsonl, 30, shuffle=True, seed=2).fingerprint
    contexts = {tuple(JOINED[start : start + 10]) for start in range(0, len(JOINED), 10)}
    assert {tuple(row) for text in shuffled for row in text.ids.tolist()} <= contexts
    assert len({tuple(row) for text in shuffled for row in text.ids.tolist()}) > 4


def test_tokens_are_rounded_up_to_whole_contexts(jsonl: Path) -> None:
    assert read(jsonl, 31).ids.shape == (4, 10)
    assert read(jsonl, 7, 50).ids.shape == (1, 7)


def test_a_text_that_ends_early_is_said(jsonl: Path) -> None:
    text = read(jsonl, 100)
    assert len(JOINED) == 75 + 1
    assert text.ids.shape == (7, 10)
    assert text.notes == ("the text is too short: it has 70 tokens of the 100 requested",)
    short = read(jsonl, 1000, 500)
    assert short.ids.tolist() == [JOINED]


def test_the_tokens_of_the_real_tokenizer_are_known() -> None:
    """A sweep's digits depend on these tokens. pydoc's text depends on the Python version, so a fixed text is used."""
    from layersurgery.checkpoints.loading import tokenizer_of
    from layersurgery.checkpoints.model_packages import EMBEDDED
    from layersurgery.checkpoints.sources import find_source

    tokenizer = tokenizer_of(find_source(EMBEDDED))
    ids = tokenizer("The capital of France is Paris.", add_special_tokens=False)["input_ids"]
    assert ids == [504, 3575, 282, 4649, 314, 7042, 30]


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("1M", 1_000_000), ("2.5k", 2500), ("10_000", 10_000), ("1b", 10**9), ("1,024", 1024)],
)
def test_numbers_as_people_write_them(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "0", "-3", "1.5", "many", "1Q", "0.0001k"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(PlanError, match="is not a number of tokens: write for example 4096, 100k or 1M"):
        parse_count(text)


def test_wrong_columns(jsonl: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SourceError,
        match="some.jsonl, row 1 has no column 'body'; it has text, meta. Name the column that contains the text or",
    ):
        read(jsonl, column="body")
    with pytest.raises(
        SourceError, match="row 1, column 'meta': found an object with s, not text or a list of messages"
    ):
        read(jsonl, column="meta")


def test_what_is_no_text(tmp_path: Path) -> None:
    cases: dict[str, tuple[bytes, str]] = {
        "bad.txt": (b"ok\n\xff\xfe\x00", "bad.txt is not UTF-8 text"),
        "bad.jsonl": (
            b'{"text": "a"}\n{"text": \n',
            r"bad.jsonl, row 2 is not JSON \(Expecting value.*found {\"text\":",
        ),
        "bad.parquet": (b"PAR1 not really", "cannot read .*bad.parquet as parquet"),
        "bad.jsonl.zst": (b"not packed", "cannot read .*bad.jsonl.zst as jsonl"),
        "empty.jsonl": (b"", "(contains no text|cannot read)"),
        "blank.jsonl": (b'{"text": "  "}\n{"text": null}\n', "contains no text of at least two tokens"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises((SourceError, MeasurementError), match=words):
            read(tmp_path / name)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(MeasurementError, match="empty.txt contains no text of at least two tokens"):
        read(tmp_path / "empty.txt")


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    cases: dict[Path | str, str] = {
        tmp_path / "a.pdf": "a.pdf has a format that is not supported: give .txt, .jsonl, .json, .csv, .tsv, .parquet",
        tmp_path / "gone.txt": "gone.txt does not exist on this machine and is not a Hub dataset",
        "gone.jsonl": "gone.jsonl does not exist on this machine",
        "not a name": "not a name does not exist on this machine",
        "~nobody-of-this-name/text.txt": "does not exist on this machine",
        "long/" + "x" * 5000: "cannot read the dataset",
        tmp_path: "contains no text: none of its files ends in .txt",
        "someone/nowhere": r"cannot read the dataset someone/nowhere .*local text \(`data`\): a file, or p",
    }
    for data, words in cases.items():
        with pytest.raises(SourceError, match=words):
            read(data)
    with pytest.raises(PlanError, match="a context of 1 has no next token"):
        read("pydoc", 10, 1)


def test_a_hub_dataset_is_streamed_and_shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Played: there is no hub here. The dataset is a real one of the library's, streamed from memory."""
    import datasets

    calls: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": DOCUMENTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    plain = read("someone/texts:small", split="validation", shuffle=False)
    assert calls == [(("someone/texts", "small"), {"split": "validation", "streaming": True})]
    assert plain.ids.flatten().tolist() == JOINED[:40]
    shuffled = {read("someone/texts", seed=seed).fingerprint for seed in range(5)}
    assert len(shuffled) > 2
    assert read("someone/texts", seed=3).fingerprint == read("someone/texts", seed=3).fingerprint
    assert isinstance(plain.ids, torch.Tensor)


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("the right one" * 9)
    (tmp_path / "a1.txt").write_text("the wrong one" * 9)
    assert read(tmp_path / "a[1].txt", 13, 13).ids.flatten().tolist() == ids_of("the right one")


def bos_tokenizer() -> Any:
    """Return a tokenizer that puts its beginning-of-text token before a text, as those of Llama and Gemma do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@pytest.mark.parametrize("pack", [True, False])
def test_the_first_token_is_what_the_tokenizer_does(jsonl: Path, pack: bool) -> None:
    def ids(tokenizer: Any, bos: bool | None) -> list[list[int]]:
        return read(jsonl, 100, 20, tokenizer, pack=pack, bos=bos).ids.tolist()

    plain, adding = tiny_tokenizer(), bos_tokenizer()
    assert not adds_bos(plain)
    assert adds_bos(adding)
    assert ids(plain, None) == ids(plain, False) == ids(adding, False)
    assert ids(adding, None) == ids(adding, True) == ids(plain, True)
    assert all(row[0] == 1 for row in ids(adding, None))
    assert not any(1 in row for row in ids(plain, None))
    assert not adds_bos(_without("bos_token"))


def test_what_bos_may_be() -> None:
    assert [parse_bos(bos) for bos in ("auto", "yes", "no", None, True, False)] == [
        None,
        True,
        False,
        None,
        True,
        False,
    ]
    with pytest.raises(PlanError, match="`bos` is auto, yes or no, not 'perhaps'"):
        parse_bos("perhaps")


def test_the_first_token_is_said_and_recorded(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "tiny")
    bos_tokenizer().save_pretrained(model)
    (tmp_path / "text.txt").write_text("Once upon a time. " * 20)
    words = ["sweep", model, "--data", tmp_path / "text.txt", "-n", 60, "--context", 30, "--edits", "drop"]
    found = run(*words, "-o", tmp_path / "auto")
    assert "60 tokens in 2 sequences of 30, each after <s>" in " ".join(found.stderr.split())
    assert "each after" not in run(*words, "-o", tmp_path / "no", "--bos", "no").stderr
    assert run(*words, "-o", tmp_path / "wrong", "--bos", "maybe").exit_code == 2
    runs = {name: ls.read_results(tmp_path / name) for name in ("auto", "no")}
    assert [frame.attrs["run"]["arguments"]["text"]["bos"] for frame in runs.values()] == [True, False]
    # The first token is never a target: as many predictions, but others.
    assert runs["auto"].tokens.iloc[0] == runs["no"].tokens.iloc[0] == 58
    assert runs["auto"].kl_nats.iloc[1] != runs["no"].kl_nats.iloc[1]
    again = ls.sweep(str(model), "drop", tmp_path / "text.txt", tokens=60, context=30, bos="yes", device="cpu")
    assert list(again.kl_nats) == pytest.approx(list(runs["auto"].kl_nats))


@pytest.mark.parametrize(
    ("base", "tags", "data"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "[layersurgery]", "pydoc"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "[other]", PILE),
        ("org/other", "[layersurgery]", PILE),
        ("[org/a, org/b]", "[layersurgery]", PILE),
    ],
)
def test_an_edited_copy_of_a_packaged_model_keeps_its_text(tmp_path: Path, base: str, tags: str, data: str) -> None:
    (tmp_path / "README.md").write_text(f"---\nbase_model: {base}\ntags: {tags}\n---\ntext\n", "utf-8")
    assert text_request(str(tmp_path), RunOptions(), 2048).data == data


def test_a_long_measurement_says_how_long_it_takes_at_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the text takes twice the time, and a short measurement says nothing."""
    from layersurgery.sweeps import estimate
    from layersurgery.sweeps.measurer import Measurer

    measurer = Measurer(tiny_model("llama"), variants("drop", 6))
    assert estimate.shortest_time(measurer, 10_000, 16) is None
    monkeypatch.setattr(estimate, "_WORTH_SAYING", 0)
    monkeypatch.setattr(estimate, "matmul_rate", lambda *_: 1e9)
    one, two = (estimate.shortest_time(measurer, tokens, 16) for tokens in (1000, 2000))
    assert one is not None
    assert two == pytest.approx(2 * one)
    # The same as the estimate that is made from the config alone.
    cost = estimate.estimate(measurer.runner.model.config, measurer.variants[1:], tokens=1600, context=16)
    assert estimate.shortest_time(measurer, 1600, 16) == pytest.approx(cost.flops / 1e9)
