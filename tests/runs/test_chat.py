"""Conversations: what transformers' chat template writes, in every form in which datasets keep them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

import layersurgery as ls
from layersurgery.errors import SourceError
from layersurgery.runs.documents import check_data, read_plain_texts
from layersurgery.runs.text import TokenizedText, read_text
from layersurgery.runs.text_request import TextRequest
from tests.cli.test_cli import run
from tests.support.tiny_checkpoint import checkpoint, tiny_tokenizer

BOS, END = 1, 2
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CHATS = [
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}],
    [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A model."}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "Bye"}],
]
SENDERS = {"system": "system", "user": "human", "assistant": "gpt"}
SHARE_GPT = [[{"from": SENDERS[m["role"]], "value": m["content"]} for m in chat] for chat in CHATS]


def chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def read(data: Any, tokens: int = 1000, context: int = 64, tokenizer: Any = None, **options: Any) -> TokenizedText:
    request = TextRequest(str(data), tokens, context, **options)
    check_data(request)
    return read_text(request, tokenizer or chat_tokenizer())


def rows(text: TokenizedText) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(text.ids, text.mask, strict=True)]


def expected() -> list[list[int]]:
    """Return the tokens that transformers makes of the conversations."""
    tokenizer = chat_tokenizer()
    return [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in CHATS]


def parts_of(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in (content[:2], content[2:])]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"id": n, "messages": chat}) + "\n" for n, chat in enumerate(CHATS)))
    return path


@pytest.mark.parametrize(
    "form",
    ["jsonl", "json", "json field", "json lines", "parquet", "saved", "saved splits", "ShareGPT", "lists", "parts"],
)
def test_conversations_in_any_form_are_what_transformers_writes(tmp_path: Path, jsonl: Path, form: str) -> None:
    objects: list[dict[str, Any]] = [{"messages": chat} for chat in CHATS]
    table = datasets.Dataset.from_list(objects)
    path = tmp_path / "chats"
    options: dict[str, Any] = {}
    if form == "jsonl":
        path = jsonl
    elif form.startswith("json"):
        path = path.with_suffix(".json")
        content = {
            "json": json.dumps(objects),
            "json field": json.dumps({"version": 1, "data": objects}, indent=1),
            "json lines": jsonl.read_text(encoding="utf-8"),
        }
        path.write_text(content[form])
    elif form == "parquet":
        path = path.with_suffix(".parquet")
        table.to_parquet(path)
    elif form == "saved":
        table.save_to_disk(path)
    elif form == "saved splits":
        other = datasets.Dataset.from_dict({"text": ["another split"]})
        datasets.DatasetDict(train=other, test=table).save_to_disk(path)
        options["split"] = "test"
    elif form == "ShareGPT":
        path = path.with_suffix(".jsonl")
        path.write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in SHARE_GPT))
    elif form == "lists":  # an object of lists in each row, as many older datasets have it
        lists = [{"conversations": {name: [m[name] for m in chat] for name in ("from", "value")}} for chat in SHARE_GPT]
        path = path.with_suffix(".parquet")
        datasets.Dataset.from_list(lists).to_parquet(path)
    else:
        path = path.with_suffix(".jsonl")
        in_parts = [[message | {"content": parts_of(message["content"])} for message in chat] for chat in CHATS]
        path.write_text("".join(json.dumps({"messages": chat, "tools": None}) + "\n" for chat in in_parts))
    text = read(path, pack=False, **options)
    assert rows(text) == expected()
    assert text.read["conversations"] == text.read["documents"] == 3
    assert text.read["chat_template"] == TEMPLATE
    assert text.read["columns"] == ["conversations" if form in ("ShareGPT", "lists") else "messages"]


def test_keys_that_a_table_fills_with_nothing_are_not_given_to_the_template(tmp_path: Path) -> None:
    """Leave out keys that a table adds: a template that asks "if name is defined" must not find them."""
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.name is defined %}{{ m.name }}{% endif %}"
        "{% if 'tool_calls' in m %}{{ 'calls' }}{% endif %}{% endfor %}"
    )
    chat = [{"role": "user", "content": "hi", "name": "ann"}, {"role": "assistant", "content": "yes"}]
    call = [{"role": "assistant", "content": "on it", "tool_calls": [{"function": "f"}]}]
    datasets.Dataset.from_dict({"messages": [chat, call]}).save_to_disk(tmp_path / "saved")
    tokenizer = chat_tokenizer(template)
    texts = [tokenizer.decode(ids) for ids in rows(read(tmp_path / "saved", pack=False, tokenizer=tokenizer))]
    assert texts == ["hiannyes", "on itcalls"]


@pytest.mark.parametrize("bos", [True, False])
def test_packed_conversations_double_neither_the_first_nor_the_last_token(jsonl: Path, bos: bool) -> None:
    whole = [token for ids in expected() for token in ids]  # each ends with the end-of-text token and a line break
    for context in (7, 16, len(expected()[0]), 64):
        sequences = rows(read(jsonl, context=context, bos=bos))
        if bos:
            assert all(row[0] == BOS != row[1] for row in sequences)
        else:
            assert [token for row in sequences for token in row] == whole[: sum(map(len, sequences))]
            assert sum(map(len, sequences)) > len(whole) - context
    separate = rows(read(jsonl, bos=bos, pack=False))
    assert separate == expected()
    unmarked = chat_tokenizer(TEMPLATE.replace("{{ bos_token }}", "").replace(" + eos_token", ""))
    plain = [ids[1:] for ids in expected()]
    ids = [[token for token in row if token != END] for row in plain]
    assert rows(read(jsonl, bos=bos, pack=False, tokenizer=unmarked)) == [[BOS] * bos + row for row in ids]
    packed = rows(read(jsonl, context=500, bos=bos, tokenizer=unmarked))
    assert packed == [[BOS] * bos + [token for row in ids for token in [*row, END]]]


def test_texts_before_which_a_first_token_is_put_do_not_begin_with_one(jsonl: Path) -> None:
    """Expect it before every window of the analyses that search a text for windows."""
    tokenizer = chat_tokenizer()
    for bos in (True, False):
        texts = list(read_plain_texts(TextRequest(str(jsonl), 100, 10, bos=bos), tokenizer))
        assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] == [
            ids[1:] if bos else ids for ids in expected()
        ]


def test_the_real_template_of_the_bundled_model(jsonl: Path) -> None:
    """Its first token is also the mark of a role, which must stay."""
    from layersurgery.checkpoints.loading import tokenizer_of
    from layersurgery.checkpoints.model_packages import EMBEDDED
    from layersurgery.checkpoints.sources import find_source

    tokenizer = tokenizer_of(find_source(EMBEDDED))
    ids = [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in CHATS]
    for bos in (True, False):
        assert rows(read(jsonl, context=200, tokenizer=tokenizer, pack=False, bos=bos)) == ids
        assert rows(read(jsonl, context=500, tokenizer=tokenizer, bos=bos)) == [[token for row in ids for token in row]]


def test_a_template_that_writes_the_date_writes_the_same_on_every_day(jsonl: Path) -> None:
    template = "{% set today = strftime_now('%d %b %Y') %}{{ today }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = chat_tokenizer(template)
    text = read(jsonl, pack=False, tokenizer=tokenizer)
    assert tokenizer.decode(rows(text)[0]) == "26 Jul 2024Be short.Who?"
    assert "the chat template writes today's date; 2024-07-26 is written instead" in text.notes[0]
    assert text.read["chat_template"] == template
    unknown = chat_tokenizer("{% set form = '%Y' %}{{ strftime_now(form) }}{{ messages[0].content }}")
    assert "the tokens are the same on this day only" in read(jsonl, tokenizer=unknown).notes[0]


def test_a_tokenizer_without_a_template_is_refused_with_the_way_out(jsonl: Path) -> None:
    with pytest.raises(SourceError, match="row 1, column 'messages': .* has no chat template; name the tokenizer"):
        read(jsonl, tokenizer=chat_tokenizer(None))
    several: Any = {"rag": TEMPLATE, "tool_use": TEMPLATE}
    with pytest.raises(SourceError, match="multiple chat templates with no default"):
        read(jsonl, tokenizer=chat_tokenizer(several))
    assert rows(read(jsonl, pack=False, tokenizer=chat_tokenizer(several | {"default": TEMPLATE}))) == expected()


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([USER, {"role": "user"}], "message 2 has role, and not role and content"),
        ([USER, {"user": "hi"}], "message 2 has user, and not role and content"),
        ([{"role": 3, "content": "hi"}], r"message 1 has a role that is not text: int \(3\)"),
        ([{"role": "user", "content": 5}], r"message 1 has content that is not text: int \(5\)"),
        ([{"from": "bot", "value": "hi"}], "message 1 is from 'bot'; known are human, user, gpt, assistant, system"),
        ([{"role": "user", "content": [{"type": "image"}]}], "not text: a part of type image"),
        ([USER, "hi"], r"found a list of dict, not text or a list of messages"),
        ("hi", r"found str \('hi'\), not a list of messages; to read it as text, name it \(`column`\)"),
        (7, r"found int \(7\), not text or a list of messages"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"f": 1}]}], "chat template would leave them out"),
        ([{"role": "tool", "content": "x"}], "chat template refuses this conversation: no tools here"),
        ([{"role": "user", "content": "\ud800"}], "the text is not valid Unicode"),
    ],
)
def test_malformed_conversations_are_named(tmp_path: Path, found: Any, words: str) -> None:
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps({'messages': [USER]})}\n\n{json.dumps({'messages': found})}\n")
    with pytest.raises(SourceError, match=rf"chats.jsonl, row 3, column 'messages': .*{words}"):
        read(path, tokenizer=tokenizer)


def test_the_same_from_python(tmp_path: Path, jsonl: Path) -> None:
    model, tokenizer = ls.load(checkpoint(tmp_path / "tiny"))
    tokenizer.chat_template = TEMPLATE
    table = datasets.Dataset.from_dict({"messages": CHATS})
    table.to_parquet(tmp_path / "chats.parquet")
    renamed = table.rename_column("messages", "talk")
    forms: dict[str, Any] = {
        "list": {"text": CHATS},
        "file": {"text": jsonl, "pack": False},
        "dataset": {"text": table, "pack": False},
        "splits": {"text": datasets.DatasetDict(validation=table), "split": "validation", "pack": False},
        "column": {"text": table["messages"]},
        "streamed": {"text": renamed.to_iterable_dataset(), "column": "talk", "pack": False},
        "table": {"text": pd.read_parquet(tmp_path / "chats.parquet")},
        "ShareGPT": {"text": SHARE_GPT},
        "tokens": {"text": tokenizer.apply_chat_template(CHATS, padding=True, return_dict=True)},
    }  # fmt: skip
    options: dict[str, Any] = {"tokens": sum(map(len, expected())), "context": 64, "tokenizer": tokenizer}
    frames = {
        name: ls.sweep(model, "drop", **form, **({} if name == "tokens" else options)) for name, form in forms.items()
    }
    for name, frame in frames.items():
        pd.testing.assert_frame_equal(frame, frames["tokens"], obj=name)
    one = ls.sweep(model, "drop", CHATS[1], tokenizer=tokenizer)
    pd.testing.assert_frame_equal(one, ls.sweep(model, "drop", [CHATS[1]], tokenizer=tokenizer))


def test_a_run_records_what_was_read_and_refuses_other_data(tmp_path: Path, jsonl: Path) -> None:
    model = checkpoint(tmp_path / "tiny")
    chat_tokenizer().save_pretrained(model)
    words = ["sweep", model, "--data", jsonl, "--context", 30, "--edits", "drop", "--device", "cpu"]
    found = run(*words, "-o", tmp_path / "out")
    assert found.exit_code == 0, found.stderr
    assert "; 3 conversations in the tokenizer's chat template" in " ".join(found.stderr.split())
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["text"]["read"] == {
        "files": ["chats.jsonl"], "columns": ["messages"], "documents": 3, "conversations": 3,
        "chat_template": TEMPLATE,
    }  # fmt: skip
    page = ls.report(tmp_path / "out", tmp_path / "page.html").path.read_text()
    assert "column messages" in page
    assert "3 conversations in the tokenizer" in page
    assert run(*words, "-o", tmp_path / "out").exit_code == 0

    before = jsonl.read_text(encoding="utf-8")
    jsonl.write_text(before.replace("Who?", "Why?"), encoding="utf-8")
    changed = run(*words, "-o", tmp_path / "out")
    assert changed.exit_code == 1
    assert "with other arguments: text fingerprint" in " ".join(changed.stderr.split())
    jsonl.write_text(before, encoding="utf-8")
    chat_tokenizer(TEMPLATE.replace(": ", ">")).save_pretrained(model)
    assert "text fingerprint" in " ".join(run(*words, "-o", tmp_path / "out").stderr.split())
    chat_tokenizer(None).save_pretrained(model)
    (model / "chat_template.jinja").unlink()
    refused = run(*words, "-o", tmp_path / "new")
    assert refused.exit_code == 1
    assert "has no chat template; name the tokenizer" in " ".join(refused.stderr.split())
    assert not (tmp_path / "new").exists()
