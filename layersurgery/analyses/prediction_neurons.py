"""Count prediction, suppression and partition neurons of each block."""

from __future__ import annotations

import pandas as pd
from torch import nn

from ..models.anatomy import Anatomy
from ..sweeps.neuron_scores import PREDICTION, SUPPRESSION, OnLayer, neuron_scores


def neurons(
    model: nn.Module, *, blocks: str | None = None, anatomy: Anatomy | None = None, progress: OnLayer | None = None
) -> pd.DataFrame:
    """Count prediction, suppression and partition neurons of each block, as in figures 1 and 6 of the paper.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        blocks: path of the list of blocks, if it cannot be found automatically.
        anatomy: the model's anatomy; found if not given.
        progress: called after each block with the number of blocks done and the total.

    Returns:
        One row for each block: layer, relative_depth, neurons, prediction, suppression, partition (numbers of neurons;
        in a mixture of experts, of all experts), prediction_percent and suppression_percent of all neurons of the
        block. The numbers are missing for blocks without an MLP.

    Raises:
        UnsupportedEditError: no output weights of neurons are found, or no unembedding of the stream's width.

    Example:
        >>> import layersurgery as ls
        >>> model, _ = ls.load("smollm2-135m")
        >>> ls.analyses.neurons(model)[["layer", "prediction_percent", "suppression_percent"]].shape
        (30, 3)
    """
    return neurons_per_block(
        neuron_scores(model, blocks=blocks, anatomy=anatomy, progress=progress), type(model).__name__
    )


def neurons_per_block(scores: pd.DataFrame, model: str) -> pd.DataFrame:
    """Build the table of `neurons` from the table of `neuron_scores`."""
    depth = scores.attrs["depth"]
    rows = []
    for layer in range(depth):
        in_block = scores[scores.layer == layer]
        has_neurons = len(in_block) > 0
        row = {"model": model, "layer": layer, "relative_depth": layer / max(1, depth - 1), "neurons": len(in_block)}
        for kind in (PREDICTION, SUPPRESSION):
            row[kind] = int((in_block.kind == kind).sum()) if has_neurons else None
        row["partition"] = int(in_block.partition.sum()) if has_neurons else None
        for kind in (PREDICTION, SUPPRESSION):
            row[f"{kind}_percent"] = 100 * float((in_block.kind == kind).mean()) if has_neurons else None
        rows.append(row)
    integers = dict.fromkeys(("layer", "neurons", PREDICTION, SUPPRESSION, "partition"), "Int64")
    frame = pd.DataFrame(rows).astype(integers | {f"{kind}_percent": "float64" for kind in (PREDICTION, SUPPRESSION)})
    frame.attrs["skipped"] = scores.attrs["skipped"]
    return frame
