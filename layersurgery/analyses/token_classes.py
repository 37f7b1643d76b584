"""Define a class of tokens, and find windows of text before tokens of the class and, as many, before other tokens.

Probes are trained and scored on these windows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..errors import PlanError
from .windows import encode_pieces, fingerprint, too_few_windows

SUFFIX, CONTEXT, SHARED, MIN_WINDOWS = "ing", 24, 12, 16
_STRETCH, _STRETCHES, _SHOWN = 2048, 32, 24


@dataclass(frozen=True, slots=True)
class TokenClass:
    """Class of tokens, defined by their text.

    Special tokens are neither in the class nor in the rest. Added tokens that are not special are in the rest.

    Attributes:
        description: the definition in words, such as "ends with 'ing'".
        inside: True for tokens in the class, (tokenizer's vocabulary,).
        rest: True for the other tokens.
        examples: texts of some tokens of the class, by token number, which is by frequency in many tokenizers.
    """

    description: str
    inside: np.ndarray
    rest: np.ndarray
    examples: tuple[str, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """Return the definition, counts and examples, by name."""
        counts = {"tokens": int(self.inside.sum()), "of": int(self.inside.sum() + self.rest.sum())}
        return {"class": self.description, **counts, "examples": list(self.examples)}


def check_class(suffix: str | None, regex: str | None) -> re.Pattern[str] | None:
    """Compile the regular expression, if there is one.

    Raises:
        PlanError: a suffix is given as well, or the expression is not valid.
    """
    if suffix is not None and regex is not None:
        raise PlanError(
            "a class of tokens is defined by a suffix or by a regular expression; give `suffix` or `regex`, not both"
        )
    try:
        return None if regex is None else re.compile(regex)
    except re.error as error:
        raise PlanError(f"`regex` {regex!r} is not a valid regular expression: {error}") from error


def token_class(tokenizer: Any, *, suffix: str | None = None, regex: str | None = None) -> TokenClass:
    """Return the class of tokens whose text ends with a suffix or matches a regular expression.

    Args:
        tokenizer: the tokenizer.
        suffix: the suffix, compared without surrounding white space and in lower case; "ing" if neither is given.
        regex: searched for in the text of each token, decoded alone and with its white space.

    Raises:
        PlanError: both are given, the expression is not valid, or the class has no token or every token.
    """
    pattern = check_class(suffix, regex)
    ending = (SUFFIX if suffix is None else suffix).strip().lower()
    description = f"ends with {ending!r}" if pattern is None else f"matches {regex!r}"

    def belongs(text: str) -> bool:
        return text.strip().lower().endswith(ending) if pattern is None else pattern.search(text) is not None

    added = {int(token): token_info.special for token, token_info in tokenizer.added_tokens_decoder.items()}
    special = {*tokenizer.all_special_ids, *(token for token, is_special in added.items() if is_special)}
    ids = sorted(token for token in tokenizer.get_vocab().values() if token not in special)
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    inside, rest = np.zeros((2, ids[-1] + 1 if ids else 1), bool)
    for token, text in zip(ids, texts, strict=True):
        (inside if token not in added and belongs(text) else rest)[token] = True
    for mask, which in ((inside, "no token"), (rest, "every token")):
        if not mask.any():
            raise PlanError(
                f"of the tokenizer's {len(ids):,} tokens, {which} {description}, so there are no two classes to tell "
                "apart; choose another class"
            )
    examples = [text for token, text in zip(ids, texts, strict=True) if inside[token]][:_SHOWN]
    return TokenClass(description, inside, rest, tuple(examples))


@dataclass(frozen=True, slots=True)
class BalancedWindows:
    """Windows, in each half as many before a token of the class as before another token.

    Attributes:
        ids: the 24 tokens before the following token, (windows, CONTEXT), int64.
        following: the following token, (windows,).
        inside: True if the following token is in the class, (windows,).
        held_out: True for windows of the half that is not used for training, (windows,).
        tokens: number of tokens of text that were searched.
        found: number of tokens of the class in this text with a whole window before them.
    """

    ids: torch.Tensor
    following: np.ndarray
    inside: np.ndarray
    held_out: np.ndarray
    tokens: int
    found: int

    @property
    def fingerprint(self) -> str:
        """Return a hash of the tokens, classes and halves."""
        return fingerprint(self.ids, self.following, self.inside, self.held_out)

    @property
    def facts(self) -> dict[str, int]:
        """Return counts by name."""

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
    """Find windows of 24 tokens of one document before a token of a class, and as many before other tokens, at random.

    Documents go to one half or the other; long documents are split into stretches first. No two windows share 12 tokens
    in a row. So no text of a held-out window was in training, and repeated text counts once.

    Args:
        documents: texts.
        tokenizer: the model's tokenizer.
        chosen: the class.
        tokens: maximum number of tokens to search.
        samples: maximum number of windows of each class; half of them are for training.
        seed: random seed of the selection.
        name: name of the text, for errors.

    Raises:
        MeasurementError: fewer than 16 windows of each class in a half; the message says how much text is needed.
    """
    texts = list(_encode(documents, tokenizer, tokens))
    ids = np.concatenate([np.zeros(0, np.int64), *texts])
    label = np.full(max(len(chosen.inside), 1 + ids.max(initial=0)), -1)
    label[: len(chosen.inside)][chosen.rest], label[: len(chosen.inside)][chosen.inside] = 0, 1
    starts, stretch = _window_starts([len(text) for text in texts])
    next_label = label[ids[starts + CONTEXT]]
    rng = np.random.default_rng(seed)
    second_half = _assign_halves(np.bincount(stretch, next_label == 1), rng)[stretch]
    seen: set[tuple[int, ...]] = set()
    halves = []
    for is_second in (False, True):
        candidates = [
            _without_shared_text(ids, rng.permutation(starts[(next_label == value) & (second_half == is_second)]), seen)
            for value in (1, 0)
        ]
        halves.append(list(islice(zip(*candidates, strict=False), samples // 2)))
    _refuse_few(min(map(len, halves)), int((next_label == 1).sum()), len(ids), chosen, name)
    start_pairs = np.array([pair for pairs in halves for pair in pairs])
    return BalancedWindows(
        torch.from_numpy(ids[start_pairs.reshape(-1, 1) + np.arange(CONTEXT)]),
        ids[start_pairs.flatten() + CONTEXT],
        np.tile([True, False], len(start_pairs)),
        np.repeat([False, True], [2 * len(pairs) for pairs in halves]),
        len(ids),
        int((next_label == 1).sum()),
    )


def _encode(documents: Iterable[str], tokenizer: Any, tokens: int) -> Iterator[np.ndarray]:
    remaining = tokens
    for _, encoding in encode_pieces(documents, tokenizer):
        ids = encoding["input_ids"][:remaining]
        yield np.array(ids, dtype=np.int64)
        remaining -= len(ids)
        if remaining <= 0:
            return


def _window_starts(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return where windows with a following token may start in the joined texts, and the stretch of each start."""
    stretch_length = min(_STRETCH, max(4 * CONTEXT, sum(lengths) // _STRETCHES))
    starts, stretches, begin = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for length in lengths:
        for first in range(0, length, stretch_length):
            in_stretch = np.arange(begin + first, begin + min(first + stretch_length, length) - CONTEXT)
            starts.append(in_stretch)
            stretches.append(np.full(len(in_stretch), len(stretches) - 1))
        begin += length
    return np.concatenate(starts), np.concatenate(stretches)


def _assign_halves(counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return for each stretch whether it goes to the second half.

    Stretches are taken in random order, and each goes to the half with fewer tokens of the class so far.
    """
    second_half, sums = np.zeros(len(counts), bool), [0, 0]
    for index in rng.permutation(len(counts)):
        second_half[index] = sums[1] < sums[0]
        sums[int(second_half[index])] += counts[index]
    return second_half


def _without_shared_text(ids: np.ndarray, starts: np.ndarray, seen: set[tuple[int, ...]]) -> Iterator[int]:
    """Yield the starts of windows that share no run of tokens with an earlier window."""
    for start in starts.tolist():
        window = ids[start : start + CONTEXT].tolist()
        runs = {tuple(window[first : first + SHARED]) for first in range(CONTEXT - SHARED + 1)}
        if seen.isdisjoint(runs):
            seen.update(runs)
            yield start


def _refuse_few(fewest: int, found: int, read: int, chosen: TokenClass, name: str) -> None:
    if fewest >= MIN_WINDOWS:
        return
    problem = (
        f"{found} of {read:,} tokens of {name} have {CONTEXT} tokens before them and a text that {chosen.description}; "
        f"without shared text, this gives {fewest} windows per half, and {MIN_WINDOWS} are needed"
    )
    raise too_few_windows(
        problem,
        found=max(fewest, found / 8),
        needed=MIN_WINDOWS,
        read=read,
        advice="Give more text, other text, or another class (data, tokens, suffix)",
    )
