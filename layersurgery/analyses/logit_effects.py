"""Which neurons speak of a class of tokens, by their weights alone: what one adds to the logits of the class, less what to those of the rest."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..errors import UnsupportedEditError
from ..runtime.block_runner import BlockRunner
from ..runtime.neuron_activations import Projection
from .prediction_neurons import PREDICTION, SUPPRESSION, output_rows, unembedding
from .token_classes import TokenClass

RANDOM = "random"
SHOWN, BINS = 36, 60


def select_neurons(
    runner: BlockRunner,
    scores: pd.DataFrame,
    readable: Collection[Projection],
    chosen: TokenClass,
    *,
    count: int,
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The neurons of either kind with the greatest effect on a class, and others at random, as a control.

    The effect of a neuron is the mean of W_U w_out over the class less the mean over the rest: w_out are its output weights, behind norms of the
    MLP's output, and W_U the unembedding with the final norm's scale folded in; both centred as for the scores.

    Args:
        runner: the model's blocks.
        scores: of all its neurons (`neuron_scores`).
        readable: projections whose input can be read; other neurons are not chosen.
        chosen: the class.
        count: neurons of each kind, at most.
        seed: of the random ones, of neither kind's chosen and from blocks that these are from.

    Returns:
        Neurons: layer, weight, neuron, kind ("prediction", "suppression" or "random"), effect; the greatest effect of each kind first. And
        histograms of the up to 36 of the two kinds with the greatest effect: layer, neuron, kind, rank, effect, and for each of 60 bins of
        equal width low, high, and how many tokens (class_tokens, rest_tokens) have W_U w_out in it.

    Raises:
        UnsupportedEditError: no prediction or suppression neuron can be read.
    """
    with runner.inference_mode():
        u_VD = unembedding(runner, unit=False)
        inside, rest = (
            torch.from_numpy(pad_to_vocabulary(mask, len(u_VD))).to(u_VD.device)
            for mask in (chosen.inside, chosen.rest)
        )
        direction_D = u_VD[inside].double().mean(0) - u_VD[rest].double().mean(0)
        effects = [
            (rows_ND.to(direction_D.device).double() @ direction_D).cpu()
            for _, _, parts in output_rows(runner, {})
            for rows_ND in parts
        ]
        where = {(one.layer, one.weight) for one in readable}
        scores = scores.assign(effect=torch.cat(effects).numpy())
        scores = scores[[place in where for place in zip(scores.layer, scores.weight, strict=True)]]
        kinds = [_greatest(scores[scores.kind == kind], count) for kind in (PREDICTION, SUPPRESSION)]
        found = pd.concat(kinds)
        if found.empty:
            raise UnsupportedEditError(
                f"{type(runner.model).__name__} has no prediction and no suppression neurons among the {len(scores):,} whose activations can be "
                "read, so there is nothing to probe"
            )
        found = pd.concat([found, _others(scores, found, count, seed)])
        found = found[["layer", "weight", "neuron", "kind", "effect"]].reset_index(drop=True)
        shown = _greatest(found[found.kind != RANDOM], SHOWN)
        return found, _histograms(runner, shown, u_VD, inside.cpu().numpy(), rest.cpu().numpy())


def pad_to_vocabulary(mask: np.ndarray, size: int) -> np.ndarray:
    """Over the model's own vocabulary, which may have rows for no token, or fewer than the tokenizer knows."""
    return np.pad(mask[:size], (0, max(0, size - len(mask))))


def _greatest(neurons: pd.DataFrame, count: int) -> pd.DataFrame:
    return neurons.iloc[np.argsort(-neurons.effect.abs().to_numpy(), kind="stable")[:count]]


def _others(scores: pd.DataFrame, chosen: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Neurons at random from the blocks of those chosen, as many of a block in the mean."""
    picked = np.random.default_rng(seed)
    left = scores.drop(chosen.index)
    layers = picked.permutation(chosen.layer.to_numpy(int))[:count]
    taken = [
        picked.choice(left.index[left.layer == layer], min(int(times), int((left.layer == layer).sum())), replace=False)
        for layer, times in zip(*np.unique(layers, return_counts=True), strict=True)
    ]
    return left.loc[np.concatenate(taken)].assign(kind=RANDOM)


def _histograms(
    runner: BlockRunner, shown: pd.DataFrame, u_VD: torch.Tensor, inside: np.ndarray, rest: np.ndarray
) -> pd.DataFrame:
    rows: dict[Any, np.ndarray] = {}
    for layer, weight, parts in output_rows(runner, {}, layers=set(shown.layer.astype(int))):
        mine = shown[(shown.layer == layer) & (shown.weight == weight)]
        if len(mine):
            w_ND = torch.cat(list(parts))[mine.neuron.to_numpy(int)].to(u_VD.device)
            rows |= dict(zip(mine.index, (w_ND @ u_VD.T).double().cpu().numpy(), strict=True))
    frames = []
    for rank, (index, one) in enumerate(shown.iterrows(), 1):
        values = rows[index]
        edges = np.histogram_bin_edges(values[inside | rest], BINS)
        counts = {
            name: np.histogram(values[mask], edges)[0]
            for name, mask in (("class_tokens", inside), ("rest_tokens", rest))
        }
        told = {name: one[name] for name in ("layer", "neuron", "kind", "effect")}
        frames.append(pd.DataFrame({**told, "rank": rank, "low": edges[:-1], "high": edges[1:], **counts}))
    return pd.concat(frames, ignore_index=True).astype({"layer": "Int64", "neuron": "Int64", "rank": "Int64"})
