"""Windows of running text that end in a word: a word of four tokens in one class, of a single token in the other."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..errors import MeasurementError, SourceError
from ..runs.text import pieces

WINDOW, WORD_TOKENS, MIN_WINDOWS = 16, 4, 8
_SPARE = 1.2
# Letters with no letter, digit, underscore or apostrophe beside them.
_WORD = re.compile(r"(?<![\w'\u2019])[^\W\d_]+(?![\w'\u2019])")
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class WordWindows:
    """Windows of both classes, as many of one as of the other.

    Attributes:
        ids: tokens, (windows, WINDOW), int64.
        joined: (windows,): True where the last four tokens are one word, False where the last token is one.
        other: (windows,): True for words of the half that no head is chosen by.
        words: the last word of each.
        texts: the text of each token.
        tokens: how many tokens of text were looked through.
        found: how many windows of each class there were in them, and of how many words.
    """

    ids: torch.Tensor
    multi_token: np.ndarray
    held_out: np.ndarray
    words: list[str]
    texts: list[list[str]]
    tokens: int
    found: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """Of the tokens and their classes."""
        digest = hashlib.sha256(self.ids.numpy().astype("<i8").tobytes())
        digest.update(np.stack([self.multi_token, self.held_out]).astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    @property
    def about(self) -> dict[str, int]:
        """Counts, by name."""
        taken = {
            "four_token_windows": int(self.multi_token.sum()),
            "four_token_words": len(
                {word for word, joined in zip(self.words, self.multi_token, strict=True) if joined}
            ),
            "one_token_windows": int((~self.multi_token).sum()),
            "one_token_words": len(
                {word for word, joined in zip(self.words, self.multi_token, strict=True) if not joined}
            ),
        }
        return {"tokens": self.tokens, **taken, **{f"{name}_found": count for name, count in self.found.items()}}


def find_word_windows(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    tokens: int = 1_000_000,
    samples: int = 200,
    seed: int = 0,
    name: str = "the text",
) -> WordWindows:
    """Find windows, and take some at random, no word a second time before every other has been taken once.

    A word is letters, all small, with no other letter, digit, underscore or apostrophe beside them. The tokenizer decides of how many tokens
    it is. A window is the 16 tokens of one document that end with it.

    Args:
        documents: texts.
        tokenizer: a fast one, which says where in the text its tokens are.
        tokens: how many to look through, at most.
        samples: windows of each class, at most.
        seed: of the choice.
        name: of the text, for errors.

    Raises:
        SourceError: the tokenizer cannot say where its tokens are.
        MeasurementError: fewer than 8 windows of one class; says how much text it would take.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise SourceError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens are, so words cannot be told; take a fast tokenizer with --tokenizer"
        )
    texts: list[list[int]] = []
    places: dict[bool, dict[str, list[Place]]] = {True: {}, False: {}}
    read = 0
    for ids, ends in _ends(documents, tokenizer):
        room = tokens - read
        for word, count, end in ends:
            if end < room:
                places[count == WORD_TOKENS].setdefault(word, []).append((len(texts), end))
        texts.append(ids[:room])
        read += len(texts[-1])
        if read >= tokens:
            break
    _refuse_few(places, read, name)
    picked = random.Random(seed)
    each = min(samples, *(sum(map(len, words.values())) for words in places.values()))
    chosen = [
        (joined, word, place, other)
        for joined in (True, False)
        for word, place, other in _chosen(places[joined], each, picked)
    ]
    rows = [texts[number][end + 1 - WINDOW : end + 1] for _, _, (number, end), _ in chosen]
    vocabulary = {token: tokenizer.decode([token], clean_up_tokenization_spaces=False) for row in rows for token in row}
    return WordWindows(
        torch.tensor(rows),
        np.array([joined for joined, *_ in chosen]),
        np.array([other for *_, other in chosen]),
        [word for _, word, *_ in chosen],
        [[vocabulary[token] for token in row] for row in rows],
        read,
        {
            f"{size}_token_{what}": count
            for size, joined in (("four", True), ("one", False))
            for what, count in (("windows", sum(map(len, places[joined].values()))), ("words", len(places[joined])))
        },
    )


def _ends(documents: Iterable[str], tokenizer: Any) -> Iterator[tuple[list[int], list[tuple[str, int, int]]]]:
    """Of each piece of text its tokens and, of each word of four tokens or one, the word, the number and the last token's place."""
    for document in documents:
        for piece in pieces(document):
            coded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets = np.array(coded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
            starts, stops = offsets[:, 0], offsets[:, 1]
            spans = [found.span() for found in _WORD.finditer(piece) if found[0].islower()]
            begins, finishes = np.array(spans, dtype=np.int64).reshape(-1, 2).T
            first = np.searchsorted(stops, begins, "right")  # the first token that reaches into the word
            last = np.searchsorted(starts, finishes, "left") - 1
            count = last + 1 - first
            fits = np.isin(count, (1, WORD_TOKENS)) & (last + 1 >= WINDOW)
            fits[fits] &= stops[last[fits]] == finishes[fits]
            ends = [
                (piece[begins[place] : finishes[place]], int(count[place]), int(last[place]))
                for place in np.flatnonzero(fits)
                if not piece[starts[first[place]] : begins[place]].strip()
            ]
            yield coded["input_ids"], ends


def _refuse_few(places: dict[bool, dict[str, list[Place]]], read: int, name: str) -> None:
    for joined, words in ((True, "words of four tokens"), (False, "words of a single token")):
        found = sum(map(len, places[joined].values()))
        if found >= MIN_WINDOWS:
            continue
        some = f"{found} windows that end in {words} ({len(places[joined])} different) among {read:,} tokens of {name}; {MIN_WINDOWS} are needed"
        if not found:
            raise MeasurementError(f"{some}. Give more text, or text with rarer words: --data, --tokens")
        raise MeasurementError(
            f"{some}. At this rate it takes about {rounded(_SPARE * read * MIN_WINDOWS / found):,} tokens of text: --data, --tokens"
        )


def rounded(tokens: float) -> int:
    """Two digits, upwards."""
    step: int = 10 ** max(0, len(str(int(tokens))) - 2)
    return math.ceil(tokens / step) * step


def _chosen(places: dict[str, list[Place]], samples: int, picked: random.Random) -> Iterator[tuple[str, Place, bool]]:
    """Words, where, and whether they are of the other half: each word once, then those that there are a second time, and so on."""
    words = picked.sample(sorted(places), len(places))
    turns = {word: picked.sample(places[word], len(places[word])) for word in words}
    halves = {word: bool(number % 2) for number, word in enumerate(words)}
    longest = max(map(len, turns.values()))
    yield from islice(
        (
            (word, turns[word][turn], halves[word])
            for turn in range(longest)
            for word in words
            if turn < len(turns[word])
        ),
        samples,
    )
