"""Choose layers to remove by a second-order estimate of the KL, and compare the choice with the other criteria.

A gate g_b multiplies what block b adds to the stream by 1 - g_b. To second order in the gates, the KL from the unedited
model is g^T M g, with M half of the gates' Fisher matrix. With y_t drawn from the model's own prediction at each
position t, given the text, the scores d log p(y_t) / d g_b of different positions are independent with the mean 0. So
with S_b the derivative of sum_t log p(y_t), which takes one backward, M[b, c] = E[S_b S_c] / (2 positions), for all
pairs.

The layers are chosen on one half of the text. What removing them costs is measured on the other half.
"""

from __future__ import annotations

from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import nn

import layersurgery as ls
from layersurgery.models.anatomy import anatomy
from layersurgery.plans.visit import Visit
from layersurgery.runtime.block_runner import BlockRunner
from layersurgery.runtime.inputs import model_inputs
from layersurgery.runtime.unembedding import head_logits

from .timing import append_results, make_table, wide_console

Array = npt.NDArray[np.float64]
_TOKENS_AT_ONCE = 512
_HEAD_TOKENS = 64


def gate_scores(model: nn.Module, ids: torch.Tensor, draws: int, seed: int = 0) -> Array:
    """Return the scores of the gates of all blocks, (draws, sequences, blocks).

    Streams are kept between blocks. Going backward, each block runs once more, with a graph, for all draws.

    Args:
        model: a transformers causal language model whose parameters ask for no gradient.
        ids: tokens, (sequences, length), without padding.
        draws: number of tokens drawn at each position that has a next token.
        seed: seed of the draws.
    """
    runner, generator = BlockRunner(model, anatomy(model)), torch.Generator().manual_seed(seed)
    parts = []
    size = max(1, _TOKENS_AT_ONCE // ids.shape[1])
    for start in range(0, len(ids), size):
        rows = ids[start : start + size]
        scores = np.zeros((draws, len(rows), runner.depth))
        with runner.inference_mode():
            record = runner.record(model_inputs(model, rows, torch.ones_like(rows)), range(runner.depth + 1))
            states = record.states
            gradients = _at_the_end(runner, states[runner.depth], draws, generator)
            for block in reversed(range(runner.depth)):
                added = states[block + 1] - states[block]
                with torch.enable_grad():
                    before = states[block].detach().requires_grad_()
                    after = runner.run(record, Visit(block), before)
                for draw, gradient in enumerate(gradients):
                    scores[draw, :, block] = -(gradient * added).sum((1, 2)).double().numpy()
                    (gradients[draw],) = torch.autograd.grad(after, before, gradient, retain_graph=True)
        parts.append(scores)
    return np.concatenate(parts, 1)


def _at_the_end(
    runner: BlockRunner, stream: torch.Tensor, draws: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Return the gradient of log p(y) with respect to the final stream for each draw; some tokens at a time."""
    gradients = [torch.zeros_like(stream) for _ in range(draws)]
    for sequence in range(len(stream)):
        for start in range(0, stream.shape[1] - 1, _HEAD_TOKENS):
            span = slice(start, min(start + _HEAD_TOKENS, stream.shape[1] - 1))
            with torch.enable_grad():
                leaf = stream[sequence, span].detach().requires_grad_()
                log_p = head_logits(runner, leaf[None])[0].log_softmax(-1)
            drawn = torch.multinomial(log_p.detach().exp(), draws, replacement=True, generator=generator)
            for draw, gradient in enumerate(gradients):
                with torch.enable_grad():
                    total = log_p.gather(1, drawn[:, draw, None]).sum()
                (gradient[sequence, span],) = torch.autograd.grad(total, leaf, retain_graph=True)
    return gradients


def interactions(scores: Array, positions: int) -> Array:
    """Return M, (blocks, blocks): the estimated KL of a set of blocks is its sum over all pairs, nats per position.

    Args:
        scores: of the gates, (draws, sequences, blocks).
        positions: number of positions of all sequences.
    """
    return np.asarray(np.einsum("dsb,dsc->bc", scores, scores) / (2 * len(scores) * positions))


def greedy_order(pairs: Array, count: int) -> list[int]:
    """Choose blocks one at a time, each the one that adds least to the estimate with its interactions."""
    chosen: list[int] = []
    for _ in range(count):
        added = np.diag(pairs) + 2 * pairs[:, chosen].sum(1)
        added[chosen] = np.inf
        chosen.append(int(added.argmin()))
    return chosen


def measure(
    model_name: str, tokens: int, context: int, draws: int, sizes: tuple[int, ...], *, as_json: bool, name: str
) -> list[dict[str, Any]]:
    """Choose layers by each criterion on one text, and measure what removing them costs on another."""
    model, tokenizer = ls.load(model_name, dtype="float32")
    model.requires_grad_(False)
    choosing, other = _texts(tokenizer, tokens, context)
    ranks = ls.rank(model, choosing, spans=max(sizes))
    kl = ranks.kl_nats.to_numpy(float)
    pairs = interactions(gate_scores(model, choosing, draws), choosing[:, 1:].numel())
    spans = ls.analyses.spans(ranks)
    lowest = {
        "second order, with pairs": greedy_order(pairs, max(sizes)),
        "second order": list(np.argsort(np.diag(pairs), kind="stable")),
        "block influence": list(np.argsort(ranks.block_influence, kind="stable")),
        "measured KL": list(np.argsort(kl, kind="stable")),
    }
    choices: dict[str, Callable[[int], list[int]]] = {
        criterion: lambda count, order=order: [int(block) for block in order[:count]]  # type: ignore[misc]
        for criterion, order in lowest.items()
    }
    choices["angular distance"] = lambda count: _span(spans, count)
    scores = {
        "second order": np.diag(pairs), "block influence": ranks.block_influence,
        "angular distance": ranks.angular_distance,
    }  # fmt: skip
    chosen = {(criterion, count): choose(count) for criterion, choose in choices.items() for count in sizes}
    plans = {key: f"drop {' '.join(map(str, sorted(blocks)))}" for key, blocks in chosen.items()}
    costs = ls.sweep(model, list(dict.fromkeys(plans.values())), other).set_index("plan")
    rows = [
        {
            "criterion": criterion, "removed": count, "layers": " ".join(map(str, chosen[criterion, count])),
            "kl_nats": float(costs.kl_nats[plan]), "kl_nats_sem": float(costs.kl_nats_sem[plan]),
            "perplexity": float(np.exp(costs.loss_nats[plan])),
            "spearman": float(spearmanr(scores[criterion], kl)[0]) if criterion in scores else None,
            "draws": draws, "tokens": choosing.numel(), "model": model_name,
        }
        for (criterion, count), plan in plans.items()
    ]  # fmt: skip
    table = make_table(
        f"KL and perplexity after removing layers, on other text than they were chosen on ({model_name}, "
        f"{choosing.numel()} tokens each, {draws} draws)",
        "criterion", *(f"{count} layers" for count in sizes), "rank corr.",
    )  # fmt: skip
    for criterion in choices:
        cells = [row for row in rows if row["criterion"] == criterion]
        rho = cells[0]["spearman"]
        table.add_row(
            criterion,
            *(f"{row['kl_nats']:.3f} ±{row['kl_nats_sem']:.3f} / {row['perplexity']:.1f}" for row in cells),
            "" if rho is None else f"{rho:.2f}",
        )
    console = wide_console(stderr=as_json)
    console.print(table)
    console.print(f"Appended to {append_results(name, rows)}")
    return rows


def _texts(tokenizer: Any, tokens: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two texts of sequences from all of Python's help, in turn."""
    ids = tokenizer("\n\n".join(topics[topic] for topic in sorted(topics)), return_tensors="pt").input_ids[0]
    sequences = ids[: len(ids) // context * context].view(-1, context)
    step, count = max(1, len(sequences) // (2 * (tokens // context))), tokens // context
    return sequences[:: 2 * step][:count], sequences[step :: 2 * step][:count]


def _span(spans: pd.DataFrame, count: int) -> list[int]:
    """Return the span of so many blocks with the lowest angular distance."""
    candidates = spans[spans.span == count]
    first = int(candidates.layer[candidates.angular_distance.idxmin()])
    return list(range(first, first + count))
