"""Find subjoiner heads: attention heads by which the last token of a word attends to the word's earlier tokens.

After Ferrando and Voita, Information Flow Routes (arXiv 2403.00824), and figure 9 of the paper.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student
from torch import nn

from ..errors import UnsupportedEditError
from ..models.anatomy import Anatomy
from ..models.anatomy import anatomy as find_anatomy
from ..runs.first_token import bos_token_id, uses_bos
from ..runtime.block_runner import BlockRunner
from ..runtime.contributions import find_contributions
from .window_attention import AttentionSums, sum_attention
from .windows import OnWindows, prepend_token
from .word_windows import WINDOW, WORD_TOKENS, WordWindows, find_word_windows

SHOWN, LARGE = 10, 0.8
BACK = [f"back_{back}" for back in range(WINDOW - 1, -1, -1)]


@dataclass(frozen=True, slots=True)
class Subjoiners:
    """Heads, scored by how much more they attend to a word's earlier tokens than to other text at the same positions.

    Attributes:
        heads: one row for each head, the highest score first: layer, head, rank, score (attention of the last token to
            the three tokens before it if these four are one word, minus the same if the last token is a word alone;
            means over windows), score_sem, effect_size (Cohen's d: the score in standard deviations within the
            classes), in_word and elsewhere (the two means), score_low and score_high (95 % interval, Welch's t). Score,
            its error and interval, and effect size are also given for one half of the words (suffix "_chosen") and for
            the other ("_held_out").
        attention: mean attention of the last token, two rows for each head: layer, head, word_tokens (4 or 1), windows,
            and back_15 to back_0 (attention to the token that many positions before the last).
        examples: attention of the head with the highest `score_chosen` in ten windows of each class, held-out words
            first: layer, head, word_tokens, example, back, token (its text) and attention.
        windows: the windows that were measured.
        skipped: blocks with attention that cannot be read, with the reasons.
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
    bos: bool | str = "auto",
    batch_size: int = 128,
    blocks: str | None = None,
    anatomy: Anatomy | None = None,
    progress: OnWindows | None = None,
) -> Subjoiners:
    """Score every head by how much the last token of a four-token word attends to the word's first three tokens.

    Windows of 16 tokens are cut from the text. In one class the last four tokens are a single lower-case word, in the
    other class the last token is one. The head for the examples is chosen on the windows of one half of the words; the
    other half tests it.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokenizer: the model's own tokenizer, a fast one.
        documents: texts.
        tokens: maximum number of tokens to search for windows.
        samples: maximum number of windows of each class.
        seed: random seed for the selection of windows.
        bos: put the beginning-of-text token before every window: True, False, or "auto" for what the tokenizer does.
        batch_size: windows per batch.
        blocks: path of the list of blocks, if it cannot be found automatically.
        anatomy: the model's anatomy; found if not given.
        progress: called with the number of windows done and the total.

    Raises:
        MeasurementError: too few such words (the message says how much text is needed), or attention that is NaN or
            infinite.
        SourceError: the tokenizer cannot give the positions of its tokens.
        UnsupportedEditError: no block has softmax attention in a kernel that can be read.

    Example:
        >>> from pydoc_data.topics import topics
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> found = ls.analyses.subjoiners(model, tokenizer, topics.values(), tokens=20_000, samples=8)
        >>> list(found.heads.columns)[:5]
        ['model', 'layer', 'head', 'rank', 'score']
    """
    windows = find_word_windows(documents, tokenizer, tokens=tokens, samples=samples, seed=seed)
    first = bos_token_id(tokenizer) if uses_bos(bos, tokenizer) else None
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
    """Score every head on given windows.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        windows: windows of both classes.
        first: token to put before each window; none if not given.
        batch_size: windows per batch.
        anatomy: the model's anatomy.
        progress: called with the number of windows done and the total.

    Raises:
        MeasurementError: attention that is NaN or infinite, or that cannot be read on this text.
        UnsupportedEditError: no block has softmax attention in a kernel that can be read.
    """
    runner = BlockRunner(model, anatomy)
    contributions = find_contributions(runner)
    attending = [
        layer for layer, block_contributions in enumerate(contributions) if block_contributions.reads_attention
    ]
    skipped = {
        f"attention of block {layer}": block_contributions.attention_error
        or f"{block_contributions.mixer_names or 'the block'} has no softmax attention"
        for layer, block_contributions in enumerate(contributions)
        if not block_contributions.reads_attention
    }
    if not attending:
        raise UnsupportedEditError(
            f"{type(model).__name__} has no heads to score: {next(iter(skipped.values()), 'it has no blocks')}"
        )
    example_rows = _choose_examples(windows)
    sums = sum_attention(
        runner,
        prepend_token(windows.ids, first),
        windows,
        {layer: contributions[layer].mixers for layer in attending},
        example_rows,
        batch_size,
        progress,
    )
    name = type(model).__name__
    heads = _head_table(sums, name)
    return Subjoiners(
        heads, _attention_table(sums, name), _example_table(sums, heads, windows, example_rows, name), windows, skipped
    )


def best(heads: pd.DataFrame) -> pd.Series:
    """Return the head with the highest score on the words used to choose it."""
    return heads.loc[heads.score_chosen.astype(float).idxmax()]


def is_supported(head: pd.Series) -> bool:
    """Tell whether the held-out words confirm a head.

    They do if the effect is large and the 95 % interval of the score is above zero.
    """
    return bool(head.score_held_out_low > 0 and head.effect_size_held_out >= LARGE)


def describe_subjoiners(heads: pd.DataFrame) -> str:
    """Describe the best head in a few sentences, and whether it is a subjoiner head."""
    head = best(heads)
    held_out = (
        f"On the other half, its score is {head.score_held_out:.3f} (95 %: {head.score_held_out_low:.3f} to "
        f"{head.score_held_out_high:.3f}) and its effect size is {head.effect_size_held_out:.2f}"
    )
    weights = (
        f"Over all words, the last token of a four-token word gives {head.in_word:.2f} of this head's attention to the "
        f"word's first three tokens; where other text is in their place, they get {head.elsewhere:.2f}."
    )
    name = f"layer {head.layer}, head {head['head']}"
    if not is_supported(head):
        return (
            f"No subjoiner head was found. The best head on half of the words is {name}. {held_out}; an effect size of "
            f"at least {LARGE} and an interval above zero are required. {weights}"
        )
    more = int((heads.effect_size_held_out >= LARGE).sum()) - 1
    others = f" There, {more} other heads have an effect size of {LARGE} or more." if more else ""
    return f"Found a subjoiner head: {name}, the best head on half of the words. {held_out}.{others} {weights}"


def _head_table(sums: dict[int, AttentionSums], model: str) -> pd.DataFrame:
    halves_by_suffix = {"": (True, False), "_chosen": (False,), "_held_out": (True,)}
    frames = []
    for layer, layer_sums in sums.items():
        columns: dict[str, Any] = {}
        for suffix, halves in halves_by_suffix.items():
            n, inside, inside_variance = layer_sums.score_moments(multi_token=True, halves=halves)
            m, outside, outside_variance = layer_sums.score_moments(multi_token=False, halves=halves)
            spread = np.sqrt(((n - 1) * inside_variance + (m - 1) * outside_variance) / max(1, n + m - 2))
            score = inside - outside
            margin = _margin(inside_variance / n, n, outside_variance / m, m)
            columns[f"score{suffix}"], columns[f"score{suffix}_sem"] = (
                score,
                np.sqrt(inside_variance / n + outside_variance / m),
            )
            columns[f"score{suffix}_low"], columns[f"score{suffix}_high"] = score - margin, score + margin
            with np.errstate(divide="ignore", invalid="ignore"):  # identical windows have a spread of 0
                columns[f"effect_size{suffix}"] = score / spread
            if not suffix:
                columns |= {"in_word": inside, "elsewhere": outside}
        frames.append(pd.DataFrame({"model": model, "layer": layer, "head": range(len(columns["score"])), **columns}))
    frame = pd.concat(frames, ignore_index=True).sort_values("score", ascending=False, kind="stable", ignore_index=True)
    frame.insert(3, "rank", range(1, len(frame) + 1))
    return frame.astype({"layer": "Int64", "head": "Int64", "rank": "Int64"})


def _margin(first: np.ndarray, n: int, second: np.ndarray, m: int) -> np.ndarray:
    """Return half the width of Welch's 95 % interval for a difference of means with these squared errors."""
    total = first + second
    with np.errstate(invalid="ignore"):
        freedom = total**2 / (first**2 / max(1, n - 1) + second**2 / max(1, m - 1))
    return np.where(total > 0, student.ppf(0.975, freedom) * np.sqrt(total), 0.0)


def _attention_table(sums: dict[int, AttentionSums], model: str) -> pd.DataFrame:
    frames = []
    for layer, layer_sums in sums.items():
        for multi_token in (True, False):
            count, mean_HK = layer_sums.mean_attention(multi_token)
            columns = {
                "model": model,
                "layer": layer,
                "head": range(len(mean_HK)),
                "word_tokens": WORD_TOKENS if multi_token else 1,
                "windows": count,
            }
            frames.append(pd.concat([pd.DataFrame(columns), pd.DataFrame(mean_HK, columns=BACK)], axis=1))
    integers = dict.fromkeys(("layer", "head", "word_tokens", "windows"), "Int64")
    return (
        pd.concat(frames, ignore_index=True)
        .astype(integers)
        .sort_values(["layer", "head"], kind="stable", ignore_index=True)
    )


def _choose_examples(windows: WordWindows) -> list[int]:
    """Choose the windows to show: the first ten of each class, held-out words first."""
    classes = (np.flatnonzero(windows.multi_token).tolist(), np.flatnonzero(~windows.multi_token).tolist())
    return [row for in_class in classes for row in sorted(in_class, key=lambda row: not windows.held_out[row])[:SHOWN]]


def _example_table(
    sums: dict[int, AttentionSums], heads: pd.DataFrame, windows: WordWindows, example_rows: list[int], model: str
) -> pd.DataFrame:
    head = best(heads)
    layer, head_index = int(head.layer), int(head["head"])
    rows = []
    for position, row in enumerate(example_rows):
        multi_token = bool(windows.multi_token[row])
        example = position - (0 if multi_token else sum(windows.multi_token[example_rows]))
        for back, token, weight in zip(
            range(WINDOW - 1, -1, -1), windows.texts[row], sums[layer].examples[row][head_index], strict=True
        ):
            rows.append((model, layer, head_index, WORD_TOKENS if multi_token else 1, example, back, token, weight))
    names = ["model", "layer", "head", "word_tokens", "example", "back", "token", "attention"]
    return pd.DataFrame(rows, columns=names).astype(
        dict.fromkeys(["layer", "head", "word_tokens", "example", "back"], "Int64")
    )
