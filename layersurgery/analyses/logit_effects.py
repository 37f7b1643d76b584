"""Select the neurons that affect the logits of a class of tokens most, from the weights alone.

The effect of a neuron is what it adds to the logits of the class, minus what it adds to those of the other tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..errors import UnsupportedEditError
from ..runtime.block_runner import BlockRunner
from ..runtime.neuron_activations import Projection
from ..sweeps.neuron_scores import PREDICTION, SUPPRESSION, output_rows, unembedding
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
    """Select the prediction and suppression neurons with the largest effect on a class, and random control neurons.

    The effect of a neuron is the mean of W_U w_out over the class minus the mean over the other tokens. w_out are its
    output weights, with norms of the MLP's output folded in; W_U is the unembedding with the final norm's scale folded
    in. Both are centered as for the scores.

    Args:
        runner: the model's blocks.
        scores: scores of all neurons (`neuron_scores`).
        readable: projections with a readable input; neurons of other projections are not selected.
        chosen: the class.
        count: maximum number of neurons of each kind.
        seed: random seed for the random neurons. These come from the same blocks as the selected neurons, but are not
            among
        them.

    Returns:
        Neurons: layer, weight, neuron, kind ("prediction", "suppression" or "random"), effect; the largest effect of
        each kind first. And histograms of up to 36 prediction and suppression neurons with the largest effects: layer,
        neuron, kind, rank, effect, and for each of 60 bins of equal width: low, high, and the number of tokens with W_U
        w_out in the bin (class_tokens, rest_tokens).

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
            for _, _, tiles in output_rows(runner, {})
            for rows_ND in tiles
        ]
        readable_weights = {(projection.layer, projection.weight) for projection in readable}
        scores = scores.assign(effect=torch.cat(effects).numpy())
        scores = scores[[key in readable_weights for key in zip(scores.layer, scores.weight, strict=True)]]
        kinds = [_largest_effects(scores[scores.kind == kind], count) for kind in (PREDICTION, SUPPRESSION)]
        selected = pd.concat(kinds)
        if selected.empty:
            raise UnsupportedEditError(
                f"{type(runner.model).__name__} has no prediction or suppression neurons among the {len(scores):,} "
                "neurons with readable activations, so there is nothing to probe"
            )
        selected = pd.concat([selected, _random_neurons(scores, selected, count, seed)])
        selected = selected[["layer", "weight", "neuron", "kind", "effect"]].reset_index(drop=True)
        shown = _largest_effects(selected[selected.kind != RANDOM], SHOWN)
        return selected, _histograms(runner, shown, u_VD, inside.cpu().numpy(), rest.cpu().numpy())


def pad_to_vocabulary(mask: np.ndarray, size: int) -> np.ndarray:
    """Fit a mask over the tokenizer's tokens to the model's vocabulary.

    The model may have rows without a token, or fewer rows than the tokenizer has tokens.
    """
    return np.pad(mask[:size], (0, max(0, size - len(mask))))


def _largest_effects(neurons: pd.DataFrame, count: int) -> pd.DataFrame:
    return neurons.iloc[np.argsort(-neurons.effect.abs().to_numpy(), kind="stable")[:count]]


def _random_neurons(scores: pd.DataFrame, selected: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Select random neurons from the blocks of the selected ones, on average as many from each block."""
    rng = np.random.default_rng(seed)
    candidates = scores.drop(selected.index)
    layers = rng.permutation(selected.layer.to_numpy(int))[:count]
    indices = [
        rng.choice(
            candidates.index[candidates.layer == layer],
            min(int(times), int((candidates.layer == layer).sum())),
            replace=False,
        )
        for layer, times in zip(*np.unique(layers, return_counts=True), strict=True)
    ]
    return candidates.loc[np.concatenate(indices)].assign(kind=RANDOM)


def _histograms(
    runner: BlockRunner, shown: pd.DataFrame, u_VD: torch.Tensor, inside: np.ndarray, rest: np.ndarray
) -> pd.DataFrame:
    rows: dict[Any, np.ndarray] = {}
    for layer, weight, tiles in output_rows(runner, {}, layers=set(shown.layer.astype(int))):
        of_weight = shown[(shown.layer == layer) & (shown.weight == weight)]
        if len(of_weight):
            w_ND = torch.cat(list(tiles))[of_weight.neuron.to_numpy(int)].to(u_VD.device)
            rows |= dict(zip(of_weight.index, (w_ND @ u_VD.T).double().cpu().numpy(), strict=True))
    frames = []
    for rank, (index, neuron) in enumerate(shown.iterrows(), 1):
        values = rows[index]
        edges = np.histogram_bin_edges(values[inside | rest], BINS)
        counts = {
            name: np.histogram(values[mask], edges)[0]
            for name, mask in (("class_tokens", inside), ("rest_tokens", rest))
        }
        columns = {name: neuron[name] for name in ("layer", "neuron", "kind", "effect")}
        frames.append(pd.DataFrame({**columns, "rank": rank, "low": edges[:-1], "high": edges[1:], **counts}))
    return pd.concat(frames, ignore_index=True).astype({"layer": "Int64", "neuron": "Int64", "rank": "Int64"})
