"""Record the activations of neurons, and the model's own predictions, at the last token of each window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import pandas as pd
import torch

from ..errors import MeasurementError
from ..runtime.block_runner import BlockRunner
from ..runtime.inputs import model_inputs
from ..runtime.neuron_activations import Projection, capture_neurons
from ..runtime.unembedding import Readout, find_readout
from .logit_effects import pad_to_vocabulary
from .token_classes import TokenClass
from .windows import OnWindows, in_batches

_ROWS = 256


def record_windows(
    runner: BlockRunner,
    ids: torch.Tensor,
    neurons: pd.DataFrame,
    readable: Iterable[Projection],
    chosen: TokenClass,
    batch_size: int,
    progress: OnWindows | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run the windows, and return what was recorded at the last token of each.

    Args:
        runner: the model's blocks.
        ids: the windows' tokens, (windows, tokens).
        neurons: the neurons to record: layer, weight, neuron.
        readable: projections with a readable input.
        chosen: the class of tokens.
        batch_size: windows per batch.
        progress: called with the number of windows done and the total.

    Returns:
        The neurons' activations, whether the model's top token is of the class, and its log odds of the class.

    Raises:
        MeasurementError: activations or logits that are NaN or infinite.
    """
    readout = find_readout(runner)
    inside = torch.from_numpy(pad_to_vocabulary(chosen.inside, readout.vocabulary))
    neurons_by_projection = {
        projection: neurons[(neurons.layer == projection.layer) & (neurons.weight == projection.weight)]
        for projection in readable
    }
    x_WN = np.full((len(ids), len(neurons)), np.nan)
    top, odds = [], []

    def keep(x_BN: np.ndarray, shape: torch.Size, projection_neurons: pd.DataFrame, value: torch.Tensor) -> None:
        last = value.reshape(*shape, -1)[:, -1]
        x_BN[:, projection_neurons.index] = (
            last[:, torch.tensor(projection_neurons.neuron.to_numpy(int), device=last.device)].double().cpu().numpy()
        )

    for rows in in_batches(len(ids), batch_size, progress):
        batch = ids[rows]
        keep_batch = partial(keep, x_WN[rows], batch.shape)
        with runner.inference_mode():
            with capture_neurons(
                runner,
                {
                    projection: partial(keep_batch, projection_neurons)
                    for projection, projection_neurons in neurons_by_projection.items()
                    if len(projection_neurons)
                },
            ):
                record = runner.record(model_inputs(runner.model, batch, torch.ones_like(batch)), {runner.depth})
            for logits in _logits(readout, record.states[runner.depth]):
                in_class = inside.to(logits.device)
                top.append(in_class[logits.argmax(-1)].cpu())
                class_logsumexp, rest_logsumexp = (
                    logits.double().masked_fill(mask, -torch.inf).logsumexp(-1) for mask in (~in_class, in_class)
                )
                odds.append((class_logsumexp - rest_logsumexp).cpu())
    odds_W = torch.cat(odds).numpy()
    if not np.isfinite(x_WN).all() or not np.isfinite(odds_W).all():
        raise MeasurementError("activations or logits are NaN or infinite; in half precision, try bfloat16 or float32")
    return x_WN, torch.cat(top).numpy(), odds_W


def _logits(readout: Readout, stream: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the model's logits at the last tokens, in tiles of (windows, vocabulary), float32."""
    last = torch.arange(1, len(stream) + 1) * stream.shape[1] - 1
    for x_TD in torch.split(readout.normalize(stream, last), readout.tokens_at_once or _ROWS):
        yield readout.logits_tile(x_TD, 0, readout.vocabulary)
