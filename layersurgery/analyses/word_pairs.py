"""Read pairs of sentences that share a word (Word in Context), and find the tokens of the word.

>>> from layersurgery.analyses.word_pairs import read_pairs
>>> row = {"word": "bank", "idx": "2-1", "sentence1": "the river bank", "sentence2": "A bank lends money", "label": 0}
>>> pair, = read_pairs([row])
>>> [sentence[start:stop] for sentence, (start, stop) in zip(pair.sentences, pair.spans)], pair.same
(['bank', 'bank'], False)
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SourceError
from ..library_logs import quiet_libraries
from ..runs.data_files import describe, file_format, read_rows
from ..runs.text_request import DEFAULT_SPLIT

_NEEDED = ("word", "sentence1", "sentence2", "label")
_INDICES = re.compile(r"(\d+)-(\d+)")
_LABELS = {"t": True, "true": True, "1": True, "f": False, "false": False, "0": False}
Span = tuple[int, int]
"""Index of a word's first character in its sentence, and of the character after its last one."""


@dataclass(frozen=True, slots=True)
class WordPair:
    """Hold a word in two sentences.

    Attributes:
        word: the word, as a dictionary has it.
        sentences: the two sentences.
        spans: where the word is in each of them; it may be inflected there.
        same: whether it has the same meaning in both.
    """

    word: str
    sentences: tuple[str, str]
    spans: tuple[Span, Span]
    same: bool


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Hold pairs as tokens.

    Attributes:
        ids: the tokens of each sentence: both of the first pair, both of the second, and so on.
        positions: index of the word's last token in each of them.
        words: the word of each pair.
        same: whether it has the same meaning in both sentences, (pairs,).
    """

    ids: list[list[int]]
    positions: list[int]
    words: list[str]
    same: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Return a hash of the tokens, positions, words and labels."""
        digest = hashlib.sha256()
        for sentence, position in zip(self.ids, self.positions, strict=True):
            digest.update(np.array([len(sentence), position, *sentence]).astype("<i8").tobytes())
        digest.update("\0".join(self.words).encode() + self.same.tobytes())
        return digest.hexdigest()[:16]

    @property
    def facts(self) -> dict[str, int]:
        """Return counts by name."""
        return {"pairs": len(self.words), "words": len(set(self.words)), "same": int(self.same.sum())}


def read_pairs(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]], split: str = DEFAULT_SPLIT
) -> list[WordPair]:
    """Read pairs of sentences.

    Args:
        source: a file of the public WiC data (`train.data.txt`, with `train.gold.txt` next to it); a table (.jsonl,
            .json, .csv, .tsv with a header, .parquet) or rows with the columns word, sentence1, sentence2, label, and
            start1, end1, start2, end2 (characters) or idx ("2-5": the index of the word in each sentence, counted by
            white space); or the id of a Hub dataset with these columns ("id:configuration").
        split: split of the Hub dataset.

    Raises:
        SourceError: the data cannot be read or is not in this form.
    """
    if not isinstance(source, str | os.PathLike):
        found = [_pair(row, f"row {number}") for number, row in enumerate(source, 1)]
        name = "the given pairs"
    else:
        name, path = str(source), Path(source).expanduser()
        if path.is_file() and file_format(path) == "text":
            rows = _public_rows(path)
        elif path.is_file() and file_format(path):
            rows = read_rows(path, "word")
        elif path.exists() or file_format(path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+)?", name):
            problem = "is not a file of pairs" if path.exists() else "does not exist"
            raise SourceError(
                f"{name} {problem}; give a file of the public WiC data (train.data.txt), a table (.jsonl, .json, "
                ".csv, .tsv, .parquet), or the id of a Hub dataset"
            )
        else:
            rows = _hub_rows(name, split)
        found = [_pair(row, f"{name}, row {number}") for number, row in rows]
    if not found:
        raise SourceError(f"{name} holds no pairs")
    return found


def _public_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a file of the public WiC data: word, part of speech, indices and sentences, with tabs."""
    gold = path.with_name(path.name.replace(".data.", ".gold."))
    if gold == path:
        raise SourceError(f"{path} has no file of labels: name the files of the public WiC data X.data.txt, X.gold.txt")
    try:
        lines, labels = (file.read_text("utf-8-sig").splitlines() for file in (path, gold))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {path} and {gold.name} next to it: {error}") from error
    if len(lines) != len(labels):
        raise SourceError(f"{path} has {len(lines)} lines, and {gold.name} has {len(labels)} labels")
    for number, (line, label) in enumerate(zip(lines, labels, strict=True), 1):
        fields = line.split("\t")
        if len(fields) != 5:
            raise SourceError(
                f"{path}, row {number}: found {len(fields)} fields, not 5 with tabs between them (word, part of "
                "speech, indices such as 2-5, sentence, sentence)"
            )
        word, _, indices, first, second = fields
        yield number, {"word": word, "idx": indices, "sentence1": first, "sentence2": second, "label": label.strip()}


def _hub_rows(name: str, split: str) -> Iterator[tuple[int, Any]]:
    import datasets

    dataset, _, configuration = name.partition(":")
    try:
        with quiet_libraries(logging.CRITICAL):
            rows = datasets.load_dataset(dataset, configuration or None, split=split)
        yield from enumerate(rows, 1)
    except Exception as error:  # the Hub's client may raise any exception
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise SourceError(
            f"cannot read the dataset {name} (split {split}): {first}. Go online, check the spelling, or use a file"
        ) from error


def _pair(row: Any, place: str) -> WordPair:
    if not isinstance(row, Mapping):
        raise SourceError(f"{place}: found {describe(row)}, not an object with {', '.join(_NEEDED)}")
    if missing := [name for name in _NEEDED if row.get(name) is None]:
        raise SourceError(f"{place} has no {missing[0]}; it has {', '.join(map(str, row))}")
    same = _LABELS.get(str(row["label"]).lower())
    if same is None:
        raise SourceError(f"{place}: the label is {row['label']!r}, not true or false (also T or F, 1 or 0)")
    first, second = str(row["sentence1"]), str(row["sentence2"])
    spans = _span(row, first, 1, place), _span(row, second, 2, place)
    return WordPair(str(row["word"]), (first, second), spans, same)


def _span(row: Mapping[str, Any], sentence: str, number: int, place: str) -> Span:
    """Return where a sentence has the word."""
    start, stop = (row.get(f"{name}{number}") for name in ("start", "end"))
    if start is not None and stop is not None:
        span = _as_number(start), _as_number(stop)
        if not 0 <= span[0] < span[1] <= len(sentence):
            raise SourceError(f"{place}: sentence {number} has no characters {start} to {stop}")
        return span
    if not (indices := _INDICES.fullmatch(str(row.get("idx")).strip())):
        raise SourceError(
            f"{place} does not say where the word is: give start{number} and end{number} (characters), or idx with the "
            "word's index in each sentence, such as 2-5"
        )
    parts = list(re.finditer(r"\S+", sentence))
    index = int(indices[number])
    if index >= len(parts):
        raise SourceError(f"{place}: sentence {number} has {len(parts)} words, so none of index {index}")
    bare = re.search(r"\w(.*\w)?", parts[index][0])  # without punctuation around it
    begin = parts[index].start()
    return (begin + bare.start(), begin + bare.end()) if bare else parts[index].span()


def _as_number(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return -1


def encode_pairs(pairs: Sequence[WordPair], tokenizer: Any, first: int | None, most: int | None = None) -> EncodedPairs:
    """Turn pairs into tokens.

    Args:
        pairs: the pairs.
        tokenizer: a fast tokenizer, which gives the position of each token in the text.
        first: token to put before each sentence; none if not given.
        most: largest number of tokens that the model takes; None if it is not known.

    Raises:
        SourceError: the tokenizer cannot give positions, has no token for a word, or a sentence is too long.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise SourceError(
            f"{type(tokenizer).__name__} does not give the positions of its tokens in a text, so words cannot be "
            "found; choose a fast tokenizer"
        )
    begin = [] if first is None else [first]
    ids, positions = [], []
    for number, pair in enumerate(pairs, 1):
        for sentence, (start, stop) in zip(pair.sentences, pair.spans, strict=True):
            encoding = tokenizer(sentence, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            # A character of several tokens is the place of each of them, so the last one ends the word.
            of_word = [place for place, (a, b) in enumerate(encoding["offset_mapping"]) if a < stop and b > start]
            if not of_word:
                raise SourceError(f"pair {number}: the tokenizer has no token for {sentence[start:stop]!r}")
            tokens = [*begin, *encoding["input_ids"]]
            if most is not None and len(tokens) > most:
                raise SourceError(f"pair {number}: a sentence has {len(tokens)} tokens, more than the model's {most}")
            ids.append(tokens)
            positions.append(len(begin) + of_word[-1])
    same = np.array([pair.same for pair in pairs])
    return EncodedPairs(ids, positions, [pair.word.lower() for pair in pairs], same)
