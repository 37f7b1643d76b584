"""Describe how a run was made, and the command that reproduces it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..path_names import without_directories
from ..plans.families import FAMILIES
from ..registry import ANALYSES
from ..runs.tables import noun_of
from .collect import FinishedRun
from .text_format import is_hidden, rounded

_PROGRAM = "layersurgery"
_BEGIN = {
    name: [name] if name in ("stages", "rank") else ["analyze", name]
    for name, analysis in ANALYSES.items()
    if analysis.help and analysis.needs in ("text", "weights")
}


@dataclass(frozen=True, slots=True)
class Provenance:
    """Description of how one run was made.

    Attributes:
        command: the words of the command that reproduces the run, quoted for a shell; empty if unknown.
        note: what the command does not state; empty if it is complete.
        facts: names and values.
        skipped: reasons, and what was skipped for each.
        non_finite: what gave NaN or infinity, and in which batches.
    """

    command: list[str]
    note: str
    facts: list[tuple[str, str]]
    skipped: list[tuple[str, list[str]]]
    non_finite: list[tuple[str, str]]


def provenance(run: FinishedRun) -> Provenance:
    """Describe how a run was made."""
    words, note = _command(run)
    reasons: dict[str, list[str]] = {}
    for what, why in _pairs(run.fact("skipped", default={})):
        reasons.setdefault(str(why), []).append(what)
    non_finite = [(what, _batches(batches)) for what, batches in _pairs(run.fact("non_finite", default={}))]
    facts = [(name, text) for name, text in _facts(run) if text]
    return Provenance([*map(_quoted, words)], note, facts, [*reasons.items()], non_finite)


def _pairs(value: Any) -> list[tuple[str, Any]]:
    return [(str(key), item) for key, item in value.items()] if isinstance(value, Mapping) else []


def _batches(value: Any) -> str:
    batches = list(map(str, value)) if isinstance(value, list) else [str(value)]
    return ", ".join(batches[:8]) + (" ..." if len(batches) > 8 else "")


def _command(run: FinishedRun) -> tuple[list[str], str]:
    """Return the words of the command, and a note; no words if they cannot be reconstructed."""
    revision = run.fact("arguments", "model", "revision", default=None)
    try:
        words = shlex.split(str(run.fact("command", default="")))
    except ValueError:  # the recorded command was truncated
        words = []
    recorded, words = words, ["=".join(map(without_directories, word.split("=", 1))) for word in words]
    if words[:1] == [_PROGRAM]:
        notes = []
        if words != recorded:
            notes.append("Files are shown without their directories.")
        if revision and not any(word.partition("=")[0] == "--revision" for word in words):
            notes.append(f"The model's revision was {revision}; add --revision {revision} to use the same.")
        return words, " ".join(notes)
    begin = ["sweep"] if run.is_sweep else _BEGIN.get(run.word)
    if begin is None:
        return [], "This run did not record its command, and it cannot be reconstructed."
    edits, note = _edits(run) if run.is_sweep else ([], "")
    words = [_PROGRAM, *begin, run.model, *edits, *_options(run)]
    words += ["--revision", str(revision)] if revision else []
    return words, f"This run did not record its command; its arguments were used to reconstruct one. {note}".strip()


def _options(run: FinishedRun) -> Iterator[str]:
    text = run.fact("arguments", "text", default={})
    text = text if isinstance(text, Mapping) else {}
    defaults = {"split": "train", "column": "text", "seed": 0}
    for name in ("data", "tokens", "context", "split", "column", "seed", "tokenizer"):
        value = text.get(name)
        if value is not None and value != defaults.get(name):
            yield from (f"--{name}", str(value))
    if text.get("pack") is False:
        yield "--no-pack"
    if isinstance(text.get("bos"), bool):
        yield from ("--bos", "yes" if text["bos"] else "no")
    if isinstance(text.get("shuffle"), bool):
        yield "--shuffle" if text["shuffle"] else "--no-shuffle"
    for name in ("of", "spans", "dtype", "quantize", "device", "batch_size", "blocks"):
        value = run.fact("arguments", name, default=None)
        if value is not None:
            yield from (f"--{name.replace('_', '-')}", str(value))
    for name, word in (
        ("propagation", "--propagation"),
        ("tails", "--tails"),
        ("per_token", "--per-token"),
        ("compiled", "--compile"),
    ):
        if run.fact("arguments", name, default=False) is True:
            yield word


def _quoted(word: str) -> str:
    """Quote a word for bash, with every invisible character escaped."""
    if not any(map(is_hidden, word)):
        return shlex.quote(word)
    text = "".join(
        f"\\U{ord(letter):08x}" if is_hidden(letter) else f"\\{letter}" if letter in "\\'" else letter
        for letter in word
    )
    return f"$'{text}'"


def _edits(run: FinishedRun) -> tuple[list[str], str]:
    frame = run.tables["results"]
    families: list[str] = []
    has_spans = False
    for family in FAMILIES.values():
        rows = frame[frame.edit == family.name]
        families += family.written(map(str, rows.plan), rows.layer, int(frame.depth.iloc[0]))
        has_spans |= family.bounded and len(rows) > 0
    words = ["--edits", ",".join(families)] if families else []
    sources = run.fact("arguments", "sources", default={})
    for name, source in sources.items() if isinstance(sources, Mapping) else ():
        at = f"@{source['revision']}" if source["revision"] else ""
        words += ["--source", f"{name}={without_directories(str(source['name']))}{at}"]
    note = f"If only some layers were edited, add --layers{' or --max-span' * has_spans}."
    if (frame.edit == "plan").any():
        words += ["--plans", "plans.txt"]
        note += " plans.txt stands for a file of the plans in the table, one per line, for example “name: drop 20:24”."
    return words, note


def _facts(run: FinishedRun) -> Iterator[tuple[str, str]]:
    def fact(*names: str) -> Any:
        return run.fact(*names)

    yield "Model", run.model
    yield "Revision", str(fact("arguments", "model", "revision"))
    yield "Weights", _if(fact("arguments", "model", "weights"), "fingerprint {}")
    blocks, parameters = fact("model", "blocks"), fact("model", "parameters")
    yield (
        "Kind",
        ", ".join(
            filter(
                None,
                [str(fact("model", "class")), _if(blocks, "{} blocks"), _if(_grouped(parameters), "{} parameters")],
            )
        ),
    )
    text = fact("arguments", "text", "data")
    yield "Text", ", ".join(filter(None, [str(text), *_text(run)]))
    yield "Tokens", _tokens(run)
    until = fact("until")
    if isinstance(until, Mapping) and "targets" in until:
        yield "Until", f"{until['targets']}, each with {until.get('confidence')} confidence"
    yield "Predictions read at", _if(fact("arguments", "read"), "{}")
    notes = fact("text", "notes")
    yield "Notes on the text", "; ".join(map(str, notes)) if isinstance(notes, list) else str(notes)
    dtype = fact("model", "dtype") or fact("arguments", "dtype")
    quantize = fact("arguments", "quantize")
    dtypes = f"{quantize} and {dtype}" if quantize else str(dtype)
    yield "Ran", " on ".join(filter(None, [dtypes, str(fact("model", "device") or fact("arguments", "device"))]))
    batch, at_once = fact("batch_size"), fact("sequences_at_once")
    yield "At once", _if(batch, "batches of {}") + (_if(at_once, ", {} in memory") if at_once != batch else "")
    yield "Read out by", str(fact("readout"))
    calls, apart = fact("schedule", "block_calls"), fact("schedule", "block_calls_apart")
    yield (
        "Schedule",
        _if(fact("schedule", "order"), "{}")
        + (f", {calls} block calls a batch, {apart} without sharing" if calls and apart else ""),
    )
    compiled = fact("compiled")
    yield "Compiled", "yes" if compiled is True else f"no: {compiled}" if compiled else ""
    seconds = fact("seconds")
    rate = fact("tokens_per_second")
    yield (
        "Took",
        (f"{_grouped(seconds)} s" if seconds else "")
        + (f", {_grouped(rate)} tokens a second" if seconds and rate else ""),
    )
    yield "Versions", ", ".join(f"{name} {number}" for name, number in _pairs(fact("arguments", "versions")))
    machine = ", ".join(f"{name} {value}" for name, value in _pairs(fact("machine")))
    yield "Machine", machine
    yield "No figure", str(fact("figure_error"))
    files = fact("files")
    yield "Files", f"{run.path.name}: {', '.join(map(str, files))}" if isinstance(files, list) else run.path.name


def _text(run: FinishedRun) -> Iterator[str]:
    read = run.fact("text", "read", default=None) or run.fact("read", default=None)
    read = read if isinstance(read, Mapping) else {}
    columns = read.get("columns")
    column = ", ".join(map(str, columns)) if isinstance(columns, list) else None
    for name, words in (
        ("split", "split {}"),
        ("column", "column {}"),
        ("seed", "seed {}"),
        ("tokenizer", "tokenizer of {}"),
    ):
        value = run.fact("arguments", "text", name, default=None)
        value = column or value if name == "column" else value
        if value is not None and (name != "seed" or run.fact("arguments", "text", "shuffle", default=False)):
            yield words.format(value)
    if chats := read.get("conversations"):
        yield f"{_grouped(chats)} conversations in the tokenizer's chat template"
    for name, yes, no in (
        ("pack", "packed", "a document a sequence"),
        ("bos", "with a first token", ""),
        ("shuffle", "shuffled", ""),
    ):
        value = run.fact("arguments", "text", name, default=None)
        if isinstance(value, bool):
            yield yes if value else no


def _tokens(run: FinishedRun) -> str:
    tokens, sequences, length = (run.fact("text", name) for name in ("tokens", "sequences", "length"))
    noun = noun_of(run.facts)
    words = [
        _if(_grouped(tokens), "{}"), _if(_grouped(sequences), f"in {{}} {noun}s"), _if(length, "of up to {}"),
        _if(run.fact("text", "fingerprint"), "(fingerprint {})"),
    ]  # fmt: skip
    return " ".join(filter(None, words))


def _grouped(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else rounded(value, 3)
    return str(value)


def _if(value: Any, words: str) -> str:
    return words.format(value) if value not in ("", None) else ""
