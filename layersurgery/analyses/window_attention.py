"""Read the attention of each window's last token, and sum it by class of windows and half of the words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ..errors import MeasurementError
from ..runtime.attention_weights import LastTokenAttention, PreviousTokenAttention
from ..runtime.block_runner import BlockRunner
from ..runtime.contributions import capture_contributions
from ..runtime.inputs import model_inputs
from .windows import OnWindows, in_batches
from .word_windows import WINDOW, WORD_TOKENS, WordWindows

_EARLIER = slice(WINDOW - WORD_TOKENS, WINDOW - 1)  # the first three tokens of a four-token word


@dataclass(slots=True)
class AttentionSums:
    """Sums over the windows of one layer, by class and half of the words.

    The score of a window is the attention to the first three of its last four tokens.

    Attributes:
        counts: numbers of windows.
        weights: sums of attention, (heads, WINDOW).
        squares: sums of squared scores, (heads,).
        examples: attention in the example windows, by row.
    """

    counts: dict[tuple[bool, bool], int] = field(default_factory=dict)
    weights: dict[tuple[bool, bool], np.ndarray] = field(default_factory=dict)
    squares: dict[tuple[bool, bool], np.ndarray] = field(default_factory=dict)
    examples: dict[int, np.ndarray] = field(default_factory=dict)

    def add(self, weights_BHK: np.ndarray, rows: np.ndarray, windows: WordWindows, example_rows: Sequence[int]) -> None:
        """Add the attention in a batch of windows.

        Args:
            weights_BHK: attention of the last tokens, (batch, heads, WINDOW).
            rows: the batch's rows of the windows.
            windows: all windows.
            example_rows: windows to keep as they are.
        """
        for multi_token in (True, False):
            for held_out in (True, False):
                selected = weights_BHK[
                    (windows.multi_token[rows] == multi_token) & (windows.held_out[rows] == held_out)
                ]
                key = multi_token, held_out
                self.counts[key] = self.counts.get(key, 0) + len(selected)
                self.weights[key] = self.weights.get(key, 0) + selected.sum(0)
                self.squares[key] = self.squares.get(key, 0) + (selected[..., _EARLIER].sum(-1) ** 2).sum(0)
        for row in set(rows.tolist()) & set(example_rows):
            self.examples[row] = weights_BHK[row - rows[0]]

    def score_moments(self, multi_token: bool, halves: tuple[bool, ...]) -> tuple[int, np.ndarray, np.ndarray]:
        """Return the number of windows of a class and some halves, and mean and variance of their scores, (heads,)."""
        keys = [(multi_token, held_out) for held_out in halves]
        count = sum(self.counts[key] for key in keys)
        total = sum(self.weights[key][:, _EARLIER].sum(-1) for key in keys)
        squares = sum(self.squares[key] for key in keys)
        mean = total / count
        return count, mean, np.maximum(squares / count - mean**2, 0) * (count / max(1, count - 1))

    def mean_attention(self, multi_token: bool) -> tuple[int, np.ndarray]:
        """Return the number of windows of a class, and their mean attention, (heads, WINDOW)."""
        count = self.counts[multi_token, True] + self.counts[multi_token, False]
        return count, (self.weights[multi_token, True] + self.weights[multi_token, False]) / count


def sum_attention(
    runner: BlockRunner,
    ids: torch.Tensor,
    windows: WordWindows,
    mixers: Mapping[int, tuple[str, ...]],
    example_rows: Sequence[int],
    batch_size: int,
    progress: OnWindows | None,
) -> dict[int, AttentionSums]:
    """Run the windows, and return the sums of each layer.

    Args:
        runner: the model's blocks.
        ids: the windows' tokens, with the token before them if there is one.
        windows: the windows.
        mixers: the layers to read, and the paths of the attention modules within each block.
        example_rows: windows whose attention is kept as it is.
        batch_size: windows per batch.
        progress: called with the number of windows done and the total.

    Raises:
        MeasurementError: attention that is NaN or infinite, or that cannot be read on this text.
    """
    sums = {layer: AttentionSums() for layer in mixers}
    for batch in in_batches(len(ids), batch_size, progress):
        rows = np.arange(batch.start, batch.stop)
        for layer, weights_BHK in _read_attention(runner, ids[batch], mixers):
            sums[layer].add(weights_BHK, rows, windows, example_rows)
    return sums


def _read_attention(
    runner: BlockRunner, ids: torch.Tensor, mixers: Mapping[int, tuple[str, ...]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each layer and the attention of each window's last token, (windows, heads, WINDOW), float64."""
    captured: dict[int, list[torch.Tensor]] = {layer: [] for layer in mixers}

    def keep(layer: int, recorder: PreviousTokenAttention) -> None:
        assert isinstance(recorder, LastTokenAttention)
        if recorder.unreadable_kernels:
            raise MeasurementError(
                f"block {layer}: attention on this text ran in a kernel "
                f"({', '.join(sorted(recorder.unreadable_kernels))}) that cannot be read; load the model with "
                "attn_implementation='eager'"
            )
        captured[layer] += [
            weights.reshape(len(ids), -1, weights.shape[-1])[..., -WINDOW:] for weights in recorder.last_token_BHT
        ]

    with runner.inference_mode(), ExitStack() as stack:
        for layer, paths in mixers.items():
            stack.enter_context(
                capture_contributions(
                    runner.blocks[layer], [], paths, partial(keep, layer), ids.shape, LastTokenAttention
                )
            )
        runner.record(model_inputs(runner.model, ids, torch.ones_like(ids)), ())
    for layer, pieces in captured.items():
        if not pieces:
            raise MeasurementError(
                f"block {layer}: its attention took another path than on the seven tokens of the check and was "
                "not recorded; try attn_implementation='eager'"
            )
        weights = torch.cat([piece.cpu() for piece in pieces], 1).double().numpy()
        if not np.isfinite(weights).all():
            raise MeasurementError(
                f"block {layer}: its attention is NaN or infinite; in half precision, try bfloat16 or float32"
            )
        yield layer, weights
