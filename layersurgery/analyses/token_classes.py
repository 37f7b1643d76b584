"""A class of tokens, and windows of text that go on with a token of it, as many as not: what a probe is trained and judged on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..errors import MeasurementError, PlanError
from ..runs.text import pieces
from .word_windows import rounded

SUFFIX, CONTEXT, SHARED, MIN_WINDOWS = "ing", 24, 12, 16
_STRETCH, _STRETCHES, _SHOWN = 2048, 32, 24
_SPARE = 1.2


@dataclass(frozen=True, slots=True)
class TokenClass:
    """Tokens that are told by their text; special tokens are neither in it nor in the rest, and added ones are in no class.

    Attributes:
        words: by what they are told.
        inside: (vocabulary of the tokenizer,): True for those in the class.
        rest: True for the others.
        examples: texts of some that are in it, the most frequent ones first as far as a tokenizer numbers them so.
    """

    words: str
    inside: np.ndarray
    rest: np.ndarray
    examples: tuple[str, ...]

    @property
    def about(self) -> dict[str, Any]:
        """In words and numbers."""
        counts = {"tokens": int(self.inside.sum()), "of": int(self.inside.sum() + self.rest.sum())}
        return {"class": self.words, **counts, "examples": list(self.examples)}


def check_class(suffix: str | None, regex: str | None) -> re.Pattern[str] | None:
    """The expression, if there is one.

    Raises:
        PlanError: there is a suffix, too, or it is no regular expression.
    """
    if suffix is not None and regex is not None:
        raise PlanError(
            "a class of tokens is told by a suffix or by a regular expression; give one of them: --suffix or --regex"
        )
    try:
        return None if regex is None else re.compile(regex)
    except re.error as error:
        raise PlanError(f"--regex {regex!r} is no regular expression: {error}") from error


def token_class(tokenizer: Any, *, suffix: str | None = None, regex: str | None = None) -> TokenClass:
    """The tokens whose text ends with a suffix, white space and capitals aside; or in which a regular expression is found.

    Args:
        tokenizer: whose tokens.
        suffix: "ing" if neither is given.
        regex: searched for in the text of each token as the tokenizer decodes it by itself, with its white space.

    Raises:
        PlanError: both are given, it is no regular expression, or it picks no token or all.
    """
    pattern = check_class(suffix, regex)
    ending = (SUFFIX if suffix is None else suffix).strip().lower()
    words = f"ends with {ending!r}" if pattern is None else f"matches {regex!r}"

    def belongs(text: str) -> bool:
        return text.strip().lower().endswith(ending) if pattern is None else pattern.search(text) is not None

    added = {int(token): told.special for token, told in tokenizer.added_tokens_decoder.items()}
    special = {*tokenizer.all_special_ids, *(token for token, never in added.items() if never)}
    ids = sorted(token for token in tokenizer.get_vocab().values() if token not in special)
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    inside, rest = np.zeros((2, ids[-1] + 1 if ids else 1), bool)
    for token, text in zip(ids, texts, strict=True):
        (inside if token not in added and belongs(text) else rest)[token] = True
    for chosen, every in ((inside, "no token"), (rest, "every token")):
        if not chosen.any():
            raise PlanError(
                f"of the tokenizer's {len(ids):,} tokens, {every} {words}: nothing could be told apart; choose another class"
            )
    examples = [text for token, text in zip(ids, texts, strict=True) if inside[token]][:_SHOWN]
    return TokenClass(words, inside, rest, tuple(examples))


@dataclass(frozen=True, slots=True)
class BalancedWindows:
    """Windows, in each half as many that go on with a token of the class as with another.

    Attributes:
        ids: the 24 tokens before the one in question, (windows, CONTEXT), int64.
        following: that one, (windows,).
        inside: whether it is of the class.
        held_out: whether the window is of the half that no probe is trained on.
        tokens: how many tokens of text were looked through.
        found: how many of them were of the class, and had a whole window before them.
    """

    ids: torch.Tensor
    following: np.ndarray
    inside: np.ndarray
    held_out: np.ndarray
    tokens: int
    found: int

    @property
    def fingerprint(self) -> str:
        """Of the tokens, their classes and halves."""
        digest = hashlib.sha256(self.ids.numpy().astype("<i8").tobytes())
        digest.update(np.stack([self.following, self.inside, self.held_out]).astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    @property
    def about(self) -> dict[str, int]:
        """Counts, by name."""

        def different(held_out: bool) -> int:
            return len(np.unique(self.following[self.inside & (self.held_out == held_out)]))

        return {
            "tokens": self.tokens,
            "class_windows_found": self.found,
            "training": int((~self.held_out).sum()),
            "held_out": int(self.held_out.sum()),
            "different_class_tokens_training": different(held_out=False),
            "different_class_tokens_held_out": different(held_out=True),
        }


def find_balanced_windows(
    documents: Iterable[str],
    tokenizer: Any,
    chosen: TokenClass,
    *,
    tokens: int = 1_000_000,
    samples: int = 1000,
    seed: int = 0,
    name: str = "the text",
) -> BalancedWindows:
    """Find windows of 24 tokens of one document that go on with a token of a class, and as many that do not, at random.

    Documents, the longer ones in stretches, go to one half or the other. No 12 tokens in a row are in two windows, so that nothing of what a probe
    is judged on was there when it was trained, and no text counts twice, wherever it is repeated.

    Args:
        documents: texts.
        tokenizer: the model's.
        chosen: the class.
        tokens: how many to look through, at most.
        samples: windows of each class, at most: half of them to train on.
        seed: of the choice.
        name: of the text, for errors.

    Raises:
        MeasurementError: fewer than 16 windows of each class in a half; says how much text it would take.
    """
    texts = list(_coded(documents, tokenizer, tokens))
    ids = np.concatenate([np.zeros(0, np.int64), *texts])
    label = np.full(max(len(chosen.inside), 1 + ids.max(initial=0)), -1)
    label[: len(chosen.inside)][chosen.rest], label[: len(chosen.inside)][chosen.inside] = 0, 1
    starts, stretch = _starts([len(text) for text in texts])
    told = label[ids[starts + CONTEXT]]
    picked = np.random.default_rng(seed)
    other = _dealt(np.bincount(stretch, told == 1), picked)[stretch]
    seen: set[tuple[int, ...]] = set()
    halves = []
    for half in (False, True):
        walks = [_apart(ids, picked.permutation(starts[(told == value) & (other == half)]), seen) for value in (1, 0)]
        halves.append(list(islice(zip(*walks, strict=False), samples // 2)))
    _refuse_few(min(map(len, halves)), int((told == 1).sum()), len(ids), chosen, name)
    at = np.array([pair for pairs in halves for pair in pairs])
    return BalancedWindows(
        torch.from_numpy(ids[at.reshape(-1, 1) + np.arange(CONTEXT)]),
        ids[at.flatten() + CONTEXT],
        np.tile([True, False], len(at)),
        np.repeat([False, True], [2 * len(pairs) for pairs in halves]),
        len(ids),
        int((told == 1).sum()),
    )


def _coded(documents: Iterable[str], tokenizer: Any, tokens: int) -> Iterator[np.ndarray]:
    room = tokens
    for document in documents:
        for piece in pieces(document):
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"][:room]
            yield np.array(ids, dtype=np.int64)
            room -= len(ids)
            if room <= 0:
                return


def _starts(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where a window may begin that has a token behind it, in texts laid end to end; and of which stretch of a text each is."""
    most = min(_STRETCH, max(4 * CONTEXT, sum(lengths) // _STRETCHES))
    starts, stretches, begin = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for length in lengths:
        for first in range(0, length, most):
            mine = np.arange(begin + first, begin + min(first + most, length) - CONTEXT)
            starts.append(mine)
            stretches.append(np.full(len(mine), len(stretches) - 1))
        begin += length
    return np.concatenate(starts), np.concatenate(stretches)


def _dealt(counts: np.ndarray, picked: np.random.Generator) -> np.ndarray:
    """For each stretch, in random order, whether it goes to the second half: to the one that has less of the class so far."""
    other, sums = np.zeros(len(counts), bool), [0, 0]
    for number in picked.permutation(len(counts)):
        other[number] = sums[1] < sums[0]
        sums[int(other[number])] += counts[number]
    return other


def _apart(ids: np.ndarray, starts: np.ndarray, seen: set[tuple[int, ...]]) -> Iterator[int]:
    """Those windows that share no text with one that was taken before."""
    for start in starts.tolist():
        window = ids[start : start + CONTEXT].tolist()
        runs = {tuple(window[first : first + SHARED]) for first in range(CONTEXT - SHARED + 1)}
        if seen.isdisjoint(runs):
            seen.update(runs)
            yield start


def _refuse_few(least: int, found: int, read: int, chosen: TokenClass, name: str) -> None:
    if least >= MIN_WINDOWS:
        return
    some = (
        f"{found} of {read:,} tokens of {name} have {CONTEXT} tokens before them and a text that {chosen.words}; apart enough, that makes {least} windows for a half, "
        f"and {MIN_WINDOWS} are needed"
    )
    if not found:
        raise MeasurementError(f"{some}. Give more text, other text, or another class: --data, --tokens, --suffix")
    rate = max(least, found / 8) / read
    raise MeasurementError(
        f"{some}. At this rate it takes about {rounded(_SPARE * MIN_WINDOWS / rate):,} tokens of text: --data, --tokens"
    )
