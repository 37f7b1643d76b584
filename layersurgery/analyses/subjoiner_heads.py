"""Subjoiner heads: heads by which the last token of a word looks at the word's earlier tokens.

After Ferrando and Voita, Information Flow Routes (arXiv 2403.00824), and figure 9 of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from torch import nn

from ..errors import MeasurementError, UnsupportedEditError
from ..models.anatomy import Anatomy
from ..models.anatomy import anatomy as find_anatomy
from ..runs.text import bos_of
from ..runtime.attention_weights import LastTokenAttention, PreviousTokenAttention
from ..runtime.block_runner import BlockRunner
from ..runtime.contributions import capture_contributions, find_contributions
from ..runtime.inputs import model_inputs
from .word_windows import WINDOW, WORD_TOKENS, WordWindows, find_word_windows

SHOWN, LARGE = 10, 0.8
_EARLIER = slice(WINDOW - WORD_TOKENS, WINDOW - 1)  # the word's first three tokens
BACK = [f"back_{back}" for back in range(WINDOW - 1, -1, -1)]
OnWindows = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Subjoiners:
    """Heads by how much more they look at a word's earlier tokens than at other text in their place.

    Attributes:
        heads: one row for each head, the highest score first: layer, head, rank, score (attention of the last token to the three tokens before it,
            where these four are one word, less the same where the last token is a word by itself: means over windows), score_sem,
            effect_size (Cohen's d: the score in standard deviations within the classes), in_word and elsewhere (the two means). Also score_low and score_high
            (95 % interval, Welch's t), and score, its error and interval, and effect size with "_chosen" behind their names from one half of
            the words, with "_held_out" from the other.
        attention: mean attention of the last token, two rows for each head: layer, head, word_tokens (4 or 1), windows, and back_15 to
            back_0, to the token so many before it.
        examples: attention of the head with the highest `score_chosen` in ten windows of each class, the other half's words first: layer,
            head, word_tokens, example, back, token (its text) and attention.
        windows: what was measured on.
        skipped: blocks whose attention cannot be read, and why.
    """

    heads: pd.DataFrame
    attention: pd.DataFrame
    examples: pd.DataFrame
    windows: WordWindows
    skipped: dict[str, str]


def subjoiners(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    *,
    tokens: int = 1_000_000,
    samples: int = 200,
    seed: int = 0,
    bos: bool = False,
    batch_size: int = 128,
    blocks: str | None = None,
    anatomy: Anatomy | None = None,
    progress: OnWindows | None = None,
) -> Subjoiners:
    """Score every head by how much the last token of a four-token word attends to the word's first three.

    Windows of 16 tokens are cut from the text: in one class the last four are a single word of small letters, in the other the last one is.
    The head that is shown is chosen on the windows of one half of the words, and judged on the other half's.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokenizer: its own, a fast one.
        documents: texts.
        tokens: how many to look through, at most.
        samples: windows of each class, at most.
        seed: of their choice.
        bos: put the beginning-of-text token before every window.
        batch_size: windows at once.
        blocks: path of the list of blocks, where it cannot be found.
        anatomy: the model's, found if not given.
        progress: is called with the number of windows done and of all.

    Raises:
        MeasurementError: too few such words, and how much text it would take; or attention that is no numbers.
        SourceError: the tokenizer does not say where its tokens are.
        UnsupportedEditError: no block attends by softmax through a kernel that can be read.

    Example:
        >>> subjoiners(model, tokenizer, documents).heads.head()  # doctest: +SKIP
    """
    windows = find_word_windows(documents, tokenizer, tokens=tokens, samples=samples, seed=seed)
    first = bos_of(tokenizer) if bos else None
    return score_heads(
        model,
        windows,
        first=first,
        batch_size=batch_size,
        anatomy=anatomy or find_anatomy(model, blocks=blocks),
        progress=progress,
    )


def score_heads(
    model: nn.Module,
    windows: WordWindows,
    *,
    first: int | None = None,
    batch_size: int = 128,
    anatomy: Anatomy,
    progress: OnWindows | None = None,
) -> Subjoiners:
    """The same on given windows; `first` is a token to put before each."""
    runner = BlockRunner(model, anatomy)
    found = find_contributions(runner)
    attending = [layer for layer, member in enumerate(found) if member.attends]
    skipped = {
        f"attention of block {layer}": member.attention_error
        or f"{member.names or 'the block'} attends to no tokens by softmax"
        for layer, member in enumerate(found)
        if not member.attends
    }
    if not attending:
        raise UnsupportedEditError(
            f"{type(model).__name__} has no heads to look at: {next(iter(skipped.values()), 'it has no blocks')}"
        )
    ids = windows.ids if first is None else torch.cat([torch.full((len(windows.ids), 1), first), windows.ids], 1)
    shown = _shown(windows)
    sums: dict[int, _Sums] = {layer: _Sums() for layer in attending}
    for start in range(0, len(ids), batch_size):
        rows = np.arange(start, min(start + batch_size, len(ids)))
        for layer, weights_BHK in _looked_at(runner, ids[rows], {layer: found[layer].mixers for layer in attending}):
            sums[layer].add(weights_BHK, rows, windows, shown)
        if progress is not None:
            progress(len(ids[: rows[-1] + 1]), len(ids))
    name = type(model).__name__
    heads = _ranked(sums, name)
    return Subjoiners(heads, _means(sums, name), _examples(sums, heads, windows, shown, name), windows, skipped)


def best(heads: pd.DataFrame) -> pd.Series:
    """The head with the highest score on the half of the words that it is chosen by."""
    return heads.loc[heads.score_chosen.astype(float).idxmax()]


def is_supported(head: pd.Series) -> bool:
    """Whether the other half's words say the same: a large effect, and an interval of the score, of 95 %, above zero."""
    return bool(head.score_held_out_low > 0 and head.effect_size_held_out >= LARGE)


def describe_subjoiners(heads: pd.DataFrame) -> str:
    """What was found, in a sentence or two; that there is no such head is a result."""
    head = best(heads)
    held_out = (
        f"On the other half its score is {head.score_held_out:.3f} (95 %: {head.score_held_out_low:.3f} to {head.score_held_out_high:.3f}) and its "
        f"effect size {head.effect_size_held_out:.2f}"
    )
    weights = (
        f"Over all words, the last token of a four-token word gives the three before it {head.in_word:.2f} of its weight by this head, and where they "
        f"are other words {head.elsewhere:.2f}."
    )
    place = f"layer {head.layer}, head {head['head']}"
    if not is_supported(head):
        return (
            f"No subjoiner head here. The best on half of the words is {place}. {held_out}, where an effect of {LARGE} and an interval above zero "
            f"were asked for. {weights}"
        )
    more = int((heads.effect_size_held_out >= LARGE).sum()) - 1
    others = f" Of the other heads {more} have effect sizes of {LARGE} or more there." if more else ""
    return f"A subjoiner head: {place}, the best on half of the words. {held_out}.{others} {weights}"


@dataclass(slots=True)
class _Sums:
    """Of one layer, by class and half of the words: numbers of windows, sums of attention, and of scores and their squares; and examples."""

    counts: dict[tuple[bool, bool], int] = field(default_factory=dict)
    weights: dict[tuple[bool, bool], np.ndarray] = field(default_factory=dict)
    squares: dict[tuple[bool, bool], np.ndarray] = field(default_factory=dict)
    kept: dict[int, np.ndarray] = field(default_factory=dict)

    def add(self, weights_BHK: np.ndarray, rows: np.ndarray, windows: WordWindows, shown: list[int]) -> None:
        for joined in (True, False):
            for other in (True, False):
                mine = weights_BHK[(windows.multi_token[rows] == joined) & (windows.held_out[rows] == other)]
                key = joined, other
                self.counts[key] = self.counts.get(key, 0) + len(mine)
                self.weights[key] = self.weights.get(key, 0) + mine.sum(0)
                self.squares[key] = self.squares.get(key, 0) + (mine[..., _EARLIER].sum(-1) ** 2).sum(0)
        for row in set(rows.tolist()) & set(shown):
            self.kept[row] = weights_BHK[row - rows[0]]

    def of(self, joined: bool, others: tuple[bool, ...]) -> tuple[int, np.ndarray, np.ndarray]:
        """Windows of a class and some halves: how many, mean and variance of their attention to the three tokens, (heads,)."""
        keys = [(joined, other) for other in others]
        count = sum(self.counts[key] for key in keys)
        total = sum(self.weights[key][:, _EARLIER].sum(-1) for key in keys)
        squares = sum(self.squares[key] for key in keys)
        mean = total / count
        return count, mean, np.maximum(squares / count - mean**2, 0) * (count / max(1, count - 1))

    def mean(self, joined: bool) -> tuple[int, np.ndarray]:
        """Windows of a class: how many, and mean attention, (heads, WINDOW)."""
        count = self.counts[joined, True] + self.counts[joined, False]
        return count, (self.weights[joined, True] + self.weights[joined, False]) / count


def _looked_at(
    runner: BlockRunner, ids: torch.Tensor, mixers: dict[int, tuple[str, ...]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Layers, and what the last token of each window gives to the window's tokens by each head: (windows, heads, WINDOW), float64."""
    caught: dict[int, list[torch.Tensor]] = {layer: [] for layer in mixers}

    def keep(layer: int, seen: PreviousTokenAttention) -> None:
        assert isinstance(seen, LastTokenAttention)
        if seen.unknown:
            raise MeasurementError(
                f"block {layer}: this text's attention ran by a kernel ({', '.join(sorted(seen.unknown))}) that does not tell; "
                "attn_implementation='eager' does"
            )
        caught[layer] += [some.reshape(len(ids), -1, some.shape[-1])[..., -WINDOW:] for some in seen.last_BHT]

    with runner.inference_mode(), ExitStack() as hold:
        for layer, paths in mixers.items():
            hold.enter_context(
                capture_contributions(
                    runner.blocks[layer], [], paths, partial(keep, layer), ids.shape, LastTokenAttention
                )
            )
        runner.record(model_inputs(runner.model, ids, torch.ones_like(ids)), ())
    for layer, parts in caught.items():
        if not parts:
            raise MeasurementError(
                f"block {layer}: its attention ran otherwise than on seven tokens and was not seen; with attn_implementation='eager' it may be"
            )
        weights = torch.cat([part.cpu() for part in parts], 1).double().numpy()
        if not np.isfinite(weights).all():
            raise MeasurementError(
                f"block {layer}: its attention is no numbers (NaN or infinite); in half precision, try bfloat16 or float32"
            )
        yield layer, weights


def _ranked(sums: dict[int, _Sums], model: str) -> pd.DataFrame:
    halves = {"": (True, False), "_chosen": (False,), "_held_out": (True,)}
    frames = []
    for layer, some in sums.items():
        columns: dict[str, Any] = {}
        for name, others in halves.items():
            (n, inside, v), (m, outside, w) = some.of(joined=True, others=others), some.of(joined=False, others=others)
            spread = np.sqrt(((n - 1) * v + (m - 1) * w) / max(1, n + m - 2))
            score = inside - outside
            margin = _margin(v / n, n, w / m, m)
            columns[f"score{name}"], columns[f"score{name}_sem"] = score, np.sqrt(v / n + w / m)
            columns[f"score{name}_low"], columns[f"score{name}_high"] = score - margin, score + margin
            with np.errstate(divide="ignore", invalid="ignore"):  # windows that are all alike have no spread
                columns[f"effect_size{name}"] = score / spread
            if not name:
                columns |= {"in_word": inside, "elsewhere": outside}
        frames.append(pd.DataFrame({"model": model, "layer": layer, "head": range(len(columns["score"])), **columns}))
    frame = pd.concat(frames, ignore_index=True).sort_values("score", ascending=False, kind="stable", ignore_index=True)
    frame.insert(3, "rank", range(1, len(frame) + 1))
    return frame.astype({"layer": "Int64", "head": "Int64", "rank": "Int64"})


def _margin(first: np.ndarray, n: int, second: np.ndarray, m: int) -> np.ndarray:
    """Half the width of the 95 % interval of a difference of two means with these squared errors, after Welch."""
    both = first + second
    with np.errstate(invalid="ignore"):
        freedom = both**2 / (first**2 / max(1, n - 1) + second**2 / max(1, m - 1))
    return np.where(both > 0, student.ppf(0.975, freedom) * np.sqrt(both), 0.0)


def _means(sums: dict[int, _Sums], model: str) -> pd.DataFrame:
    frames = []
    for layer, some in sums.items():
        for joined in (True, False):
            count, mean_HK = some.mean(joined)
            head = {
                "model": model,
                "layer": layer,
                "head": range(len(mean_HK)),
                "word_tokens": WORD_TOKENS if joined else 1,
                "windows": count,
            }
            frames.append(pd.concat([pd.DataFrame(head), pd.DataFrame(mean_HK, columns=BACK)], axis=1))
    whole = dict.fromkeys(("layer", "head", "word_tokens", "windows"), "Int64")
    return (
        pd.concat(frames, ignore_index=True)
        .astype(whole)
        .sort_values(["layer", "head"], kind="stable", ignore_index=True)
    )


def _shown(windows: WordWindows) -> list[int]:
    """Windows to show: the first of each class, those first whose words no head is chosen by."""
    classes = (np.flatnonzero(windows.multi_token).tolist(), np.flatnonzero(~windows.multi_token).tolist())
    return [row for mine in classes for row in sorted(mine, key=lambda row: not windows.held_out[row])[:SHOWN]]


def _examples(
    sums: dict[int, _Sums], heads: pd.DataFrame, windows: WordWindows, shown: list[int], model: str
) -> pd.DataFrame:
    head = best(heads)
    layer, number = int(head.layer), int(head["head"])
    rows = []
    for place, row in enumerate(shown):
        joined = bool(windows.multi_token[row])
        example = place - (0 if joined else sum(windows.multi_token[shown]))
        for back, token, weight in zip(
            range(WINDOW - 1, -1, -1), windows.texts[row], sums[layer].kept[row][number], strict=True
        ):
            rows.append((model, layer, number, WORD_TOKENS if joined else 1, example, back, token, weight))
    names = ["model", "layer", "head", "word_tokens", "example", "back", "token", "attention"]
    return pd.DataFrame(rows, columns=names).astype(
        dict.fromkeys(["layer", "head", "word_tokens", "example", "back"], "Int64")
    )
