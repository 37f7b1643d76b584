"""Read requests of your own: pairs of a context and a continuation, with or without questions that they answer.

>>> import layersurgery as ls
>>> mine = ls.tasks.requests([("The capital of France is", " Paris"), ("The capital of Japan is", " Tokyo")])
>>> mine.name, len(mine.documents)
('mine', 2)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import PlanError, SourceError

_KEYS = ("context", "continuation", "question", "correct")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Document:
    """Hold one pair, or the pairs of one question.

    Attributes:
        contexts: the context of each pair; may be empty.
        continuations: the continuation of each pair; never empty.
        correct: number of the correct continuation; None if the pairs answer no question.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    correct: int | None = None


@dataclass(frozen=True, slots=True)
class OwnRequests:
    """Hold requests of your own, to give as `tasks` of a sweep; made by `requests`.

    Attributes:
        name: their name in the results.
        documents: the pairs, or the questions.
    """

    name: str
    documents: tuple[Document, ...]

    @property
    def has_questions(self) -> bool:
        """Return whether the pairs answer questions."""
        return self.documents[0].correct is not None

    @property
    def fingerprint(self) -> str:
        """Return a hash of the pairs."""
        content = [[each.contexts, each.continuations, each.correct] for each in self.documents]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def requests(pairs: Any, name: str | None = None) -> OwnRequests:
    """Make requests of your own pairs of a context and a continuation, which a sweep measures like a task.

    A sweep gives the mean log-likelihood of the continuations in nats (`task_<name>_log_likelihood`) and the share of
    those that the model would write itself (`task_<name>_greedy`). Pairs with the same `question` are the possible
    answers to it, of which one is `correct`; then there are also `acc` and `acc_norm`, which lm-eval computes as for
    its tasks of multiple choice, and the other two are of the correct continuations.

    Args:
        pairs: a list of tuples (context, continuation), a list of dictionaries, a pandas table, or the path of a
            `.jsonl` file. The keys or columns are context, continuation, and for questions also question (any text or
            whole number) and correct (true or false). The continuation is scored as it is: where a word follows, it
            begins with the space.
        name: the name in the results; by default "mine", or the file's name.

    Returns:
        The requests, for `layersurgery.sweep(..., tasks=...)`.

    Raises:
        PlanError: there are no pairs, or one of them is not as described (the error says which).
        SourceError: the file cannot be read.

    Example:
        >>> import layersurgery as ls
        >>> answers = [("2 + 2 =", " 4", True), ("2 + 2 =", " 5", False)]
        >>> rows = [{"context": a, "continuation": b, "question": 1, "correct": c} for a, b, c in answers]
        >>> ls.tasks.requests(rows, name="sums").has_questions
        True
    """
    is_path = isinstance(pairs, str | os.PathLike)
    default = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(pairs).stem).lstrip("_.-") or "mine" if is_path else "mine"
    name = default if name is None else name
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PlanError(f"a name of requests has letters, digits, '_', '-' and '.' only, not {name!r}")
    entries = [*_checked(_read_file(Path(pairs)) if is_path else _read_list(pairs))]
    if not entries:
        raise PlanError(f"{pairs} has no pairs" if is_path else "there are no pairs; give at least one")
    return OwnRequests(name, tuple(_documents(entries)))


@dataclass(frozen=True, slots=True)
class _Entry:
    where: str
    context: str
    continuation: str
    question: str | float | None
    correct: bool | None


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each entry of a file is, and the entry."""
    if path.suffix != ".jsonl":
        raise PlanError(f"{path} is not a .jsonl file; write each pair as a line of JSON with context and continuation")
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise PlanError(f"{where} is not JSON: {error}") from error


def _read_list(pairs: Any) -> Iterator[tuple[str, Any]]:
    """Yield where each entry of a list or a table is, and the entry."""
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(pairs, pandas.DataFrame):
        pairs = [{name: _plain(value) for name, value in row.items()} for row in pairs.to_dict("records")]
    if isinstance(pairs, Mapping) or not isinstance(pairs, Iterable):
        raise PlanError(
            "pairs are a list of tuples (context, continuation) or of dictionaries, a pandas table or the path of a "
            f".jsonl file, not {type(pairs).__name__}"
        )
    for number, entry in enumerate(pairs):
        is_pair = isinstance(entry, Sequence) and not isinstance(entry, str | bytes) and len(entry) == 2
        yield f"pair {number}", dict(zip(_KEYS, entry, strict=False)) if is_pair else entry


def _plain(value: Any) -> Any:
    """Return a cell of a table as a plain value; None for a missing one."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and value != value else value


def _checked(entries: Iterable[tuple[str, Any]]) -> Iterator[_Entry]:
    """Check entries one by one.

    Raises:
        PlanError: one is not a pair; the error says which, and what is wrong.
    """
    for where, entry in entries:
        if not isinstance(entry, Mapping):
            raise PlanError(f"{where} is neither two texts nor has it keys: {str(entry)[:60]!r}")
        for key in entry:
            if key not in _KEYS:
                near = get_close_matches(str(key), _KEYS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(_KEYS)}"
                raise PlanError(f"{where} has the key {key!r}; {hint}")
        for key in ("context", "continuation"):
            if not isinstance(entry.get(key), str):
                found = f"of the type {type(entry[key]).__name__}, not text" if key in entry else "missing"
                raise PlanError(f"{where}: {key} is {found}")
        if not entry["continuation"]:
            raise PlanError(f"{where}: continuation is empty")
        question, correct = entry.get("question"), entry.get("correct")
        if (question is None) != (correct is None):
            there, missing = ("question", "correct") if correct is None else ("correct", "question")
            raise PlanError(f"{where} has {there} and no {missing}; give both, or neither")
        if question is not None and (isinstance(question, bool) or not isinstance(question, str | int | float)):
            raise PlanError(f"{where}: question is of the type {type(question).__name__}, not text or a number")
        if correct is not None and (not isinstance(correct, int | float) or correct not in (0, 1)):
            raise PlanError(f"{where}: correct is {correct!r}, not true or false")
        flag = None if correct is None else bool(correct)
        yield _Entry(where, entry["context"], entry["continuation"], question, flag)


def _documents(entries: Sequence[_Entry]) -> Iterator[Document]:
    """Yield the pairs, or group them by their question.

    Raises:
        PlanError: only some pairs have a question, or a question has not several answers of which one is correct.
    """
    without = [entry for entry in entries if entry.question is None]
    if len(without) == len(entries):
        yield from (Document((entry.context,), (entry.continuation,)) for entry in entries)
        return
    if without:
        raise PlanError(f"{without[0].where} has no question, and others have; give it to all pairs or to none")
    by_question: dict[str | float | None, list[_Entry]] = {}
    for entry in entries:
        by_question.setdefault(entry.question, []).append(entry)
    for question, answers in by_question.items():
        correct = [number for number, entry in enumerate(answers) if entry.correct]
        if len(answers) < 2 or len(correct) != 1:
            raise PlanError(
                f"the question {question!r} ({answers[0].where}) has {len(answers)} continuations, of which "
                f"{len(correct)} are correct; give at least two, one of them correct"
            )
        contexts, continuations = ([getattr(entry, name) for entry in answers] for name in _KEYS[:2])
        yield Document(tuple(contexts), tuple(continuations), correct[0])
