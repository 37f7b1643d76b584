"""Find windows of text that end in a word: a word of four tokens in one class, of a single token in the other."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any

import numpy as np
import torch

from ..errors import SourceError
from .windows import encode_pieces, fingerprint, too_few_windows

WINDOW, WORD_TOKENS, MIN_WINDOWS = 16, 4, 8
# Letters without another letter, digit, underscore or apostrophe directly before or after them.
_WORD = re.compile(r"(?<![\w'\u2019])[^\W\d_]+(?![\w'\u2019])")
Position = tuple[int, int]
"""Index of a text, and index of the word's last token in it."""


@dataclass(frozen=True, slots=True)
class WordWindows:
    """Windows of both classes, with as many of one as of the other.

    Attributes:
        ids: tokens, (windows, WINDOW), int64.
        multi_token: True if the last four tokens are one word, False if the last token is one, (windows,).
        held_out: True for words of the half that is not used to choose a head, (windows,).
        words: the last word of each window.
        texts: the text of each token.
        tokens: number of tokens of text that were searched.
        found: numbers of windows and of different words of each class in this text.
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
        """Return a hash of the tokens, classes and halves."""
        return fingerprint(self.ids, self.multi_token, self.held_out)

    @property
    def facts(self) -> dict[str, int]:
        """Return counts by name."""
        selected = {}
        for size, in_class in (("four", self.multi_token), ("one", ~self.multi_token)):
            selected[f"{size}_token_windows"] = int(in_class.sum())
            selected[f"{size}_token_words"] = len(set(compress(self.words, in_class)))
        return {"tokens": self.tokens, **selected, **{f"{name}_found": count for name, count in self.found.items()}}


def find_word_windows(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    tokens: int = 1_000_000,
    samples: int = 200,
    seed: int = 0,
    name: str = "the text",
) -> WordWindows:
    """Find windows and select some at random; every word is used once before any word is used again.

    A word is a run of lower-case letters without another letter, digit, underscore or apostrophe directly before or
    after it. The tokenizer determines the number of its tokens. A window is the 16 tokens of one document that end with
    the word.

    Args:
        documents: texts.
        tokenizer: a fast tokenizer, which gives the position of each token in the text.
        tokens: maximum number of tokens to search.
        samples: maximum number of windows of each class.
        seed: random seed of the selection.
        name: name of the text, for errors.

    Raises:
        SourceError: the tokenizer cannot give the positions of its tokens.
        MeasurementError: fewer than 8 windows of one class; the message says how much text is needed.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise SourceError(
            f"{type(tokenizer).__name__} does not give the positions of its tokens in a text, so words "
            "cannot be found; choose a fast tokenizer"
        )
    texts: list[list[int]] = []
    positions: dict[bool, dict[str, list[Position]]] = {True: {}, False: {}}
    read = 0
    for ids, ends in _find_word_ends(documents, tokenizer):
        remaining = tokens - read
        for word, count, end in ends:
            if end < remaining:
                positions[count == WORD_TOKENS].setdefault(word, []).append((len(texts), end))
        texts.append(ids[:remaining])
        read += len(texts[-1])
        if read >= tokens:
            break
    _refuse_few(positions, read, name)
    rng = random.Random(seed)
    count_per_class = min(samples, *(sum(map(len, words.values())) for words in positions.values()))
    selected = [
        (multi_token, word, position, held_out)
        for multi_token in (True, False)
        for word, position, held_out in _select(positions[multi_token], count_per_class, rng)
    ]
    rows = [texts[text][end + 1 - WINDOW : end + 1] for _, _, (text, end), _ in selected]
    vocabulary = {token: tokenizer.decode([token], clean_up_tokenization_spaces=False) for row in rows for token in row}
    return WordWindows(
        torch.tensor(rows),
        np.array([multi_token for multi_token, *_ in selected]),
        np.array([held_out for *_, held_out in selected]),
        [word for _, word, *_ in selected],
        [[vocabulary[token] for token in row] for row in rows],
        read,
        {
            f"{size}_token_{unit}": count
            for size, multi_token in (("four", True), ("one", False))
            for unit, count in (
                ("windows", sum(map(len, positions[multi_token].values()))),
                ("words", len(positions[multi_token])),
            )
        },
    )


def _find_word_ends(documents: Iterable[str], tokenizer: Any) -> Iterator[tuple[list[int], list[tuple[str, int, int]]]]:
    """Yield the tokens of each piece of text, and its words of four tokens or one: word, token count, last index."""
    for piece, encoding in encode_pieces(documents, tokenizer, return_offsets_mapping=True):
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        starts, stops = offsets[:, 0], offsets[:, 1]
        spans = [match.span() for match in _WORD.finditer(piece) if match[0].islower()]
        word_starts, word_stops = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        first = np.searchsorted(stops, word_starts, "right")  # the first token that overlaps the word
        last = np.searchsorted(starts, word_stops, "left") - 1
        count = last + 1 - first
        fits = np.isin(count, (1, WORD_TOKENS)) & (last + 1 >= WINDOW)
        fits[fits] &= stops[last[fits]] == word_stops[fits]
        ends = [
            (piece[word_starts[index] : word_stops[index]], int(count[index]), int(last[index]))
            for index in np.flatnonzero(fits)
            if not piece[starts[first[index]] : word_starts[index]].strip()
        ]
        yield encoding["input_ids"], ends


def _refuse_few(positions: dict[bool, dict[str, list[Position]]], read: int, name: str) -> None:
    for multi_token, words in ((True, "words of four tokens"), (False, "words of a single token")):
        count = sum(map(len, positions[multi_token].values()))
        if count >= MIN_WINDOWS:
            continue
        problem = (
            f"{count} windows that end in {words} ({len(positions[multi_token])} different) in {read:,} tokens of "
            f"{name}; {MIN_WINDOWS} are needed"
        )
        raise too_few_windows(
            problem,
            found=count,
            needed=MIN_WINDOWS,
            read=read,
            advice="Give more text, or text with rarer words (data, tokens)",
        )


def _select(
    positions: dict[str, list[Position]], samples: int, rng: random.Random
) -> Iterator[tuple[str, Position, bool]]:
    """Yield words, positions, and whether each word is held out.

    Each word comes once, then each word that occurs a second time, and so on.
    """
    words = rng.sample(sorted(positions), len(positions))
    shuffled = {word: rng.sample(positions[word], len(positions[word])) for word in words}
    held_out = {word: bool(index % 2) for index, word in enumerate(words)}
    most = max(map(len, shuffled.values()))
    yield from islice(
        (
            (word, shuffled[word][occurrence], held_out[word])
            for occurrence in range(most)
            for word in words
            if occurrence < len(shuffled[word])
        ),
        samples,
    )
