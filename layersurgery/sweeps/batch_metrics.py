"""Read the logits at the end of each route for one batch, and sum the metrics of every sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import MeasurementError
from ..metrics import dispatch, tiled
from ..metrics.reference import METRICS
from ..metrics.tails import row_tails
from ..models.numerics import relative_error, tolerance
from ..runtime.block_runner import BlockRunner
from ..runtime.inputs import model_inputs
from ..runtime.unembedding import Readout
from .read_positions import ReadTokens

_CHECKED_TOKENS = 64


class BatchMetrics:
    """Metrics of one batch: every final stream is read as logits and compared with those of the unedited model.

    Args:
        readout: maps streams to logits.
        rows: returns the rows of the result that belong to the route of a number.
        tokens: what is read.
        states: the streams that are in memory, by number; streams are added and removed while the batch runs.
        final_stream: the unedited model's stream after its last block.
        token_metrics: receives the metrics of single positions by rows of the result; None if they are not wanted.
        compiled: use loops that torch compiles.
        tails: also keep what the columns of the tails are made from.

    Attributes:
        sums: for each row of the result, sums over the measured positions, (sequences, len(METRICS)).
        tails: for each row of the result, what `row_tails` returns; empty if it is not wanted.
    """

    def __init__(
        self,
        readout: Readout,
        rows: Callable[[int], Sequence[int]],
        tokens: ReadTokens,
        states: dict[int, torch.Tensor],
        final_stream: torch.Tensor,
        token_metrics: dict[tuple[int, ...], torch.Tensor] | None,
        *,
        compiled: bool = False,
        tails: bool = False,
    ) -> None:
        self.readout, self.rows, self.states, self.token_metrics = readout, rows, states, token_metrics
        self.sums: dict[int, torch.Tensor] = {}
        self.tails: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._counts = tokens.counts
        # On the device before the first readout: each copy makes the CPU wait for the GPU.
        self._positions = tokens.positions.to(final_stream.device)
        x = readout.normalize(final_stream, self._positions)
        self._baseline = dispatch.baseline(readout, x, tokens.targets, compiled=compiled, tails=tails)
        self._add([0], dispatch.measure_unedited(self._baseline))

    def read(self, state: int, routes: Sequence[int]) -> None:
        """Measure the stream of this number, which is the final stream of these routes."""
        rows = [row for route in routes for row in self.rows(route)]
        if rows:
            x = self.readout.normalize(self.states[state], self._positions)
            self._add(rows, dispatch.measure(self.readout, x, self._baseline))

    def _add(self, rows: Sequence[int], metrics: torch.Tensor) -> None:
        """Sum the metrics of all positions by sequence, for these rows of the result.

        They are what `dispatch.measure` returns, (len(METRICS) and more, positions).
        """
        if self.token_metrics is not None:
            self.token_metrics[tuple(rows)] = metrics.cpu()
        if len(metrics) > len(METRICS):
            self.tails.update(dict.fromkeys(rows, row_tails(metrics, self._counts)))
            metrics = metrics[: len(METRICS)]
        # Sum each sequence separately, so that its digits do not depend on the other sequences in the batch.
        sums = torch.stack([sequence.contiguous().sum(-1) for sequence in torch.split(metrics, self._counts, -1)])
        self.sums.update(dict.fromkeys(rows, sums))


def check_readout(runner: BlockRunner, readout: Readout, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Check on real text that reading the stream after the last block gives the model's own logits.

    Args:
        runner: runs the model's blocks.
        readout: maps streams to logits.
        ids: one sequence, (1, length); its first tokens are used.
        mask: 1 for a token and 0 for padding, the same shape.

    Raises:
        MeasurementError: the logits differ by more than the dtype's rounding error.
    """
    start = int(mask[0].nonzero()[0])
    span = slice(start, start + _CHECKED_TOKENS)
    inputs = model_inputs(runner.model, ids[:, span], mask[:, span])
    model_logits = runner.model(**inputs).logits[0]
    final_stream = runner.record(inputs, ()).states[runner.depth]
    x = readout.normalize(final_stream, torch.arange(final_stream.shape[1]))
    read_logits = torch.cat(
        [readout.logits_tile(x[rows], 0, readout.vocabulary) for rows in tiled.rows_of(readout, len(x))]
    )
    # Some models keep the stream in float32, multiply in half precision, and return float32 logits. So the coarsest
    # dtype counts.
    dtypes = {parameter.dtype for parameter in runner.model.parameters() if parameter.is_floating_point()}
    largest_error = tolerance("readout", *dtypes, model_logits.dtype)
    model_logits = model_logits.float()
    # Larger logits mark tokens that the model never predicts.
    comparable = model_logits.abs() < torch.finfo(torch.float16).max
    read_logits, model_logits = (
        torch.where(comparable, logits.to(comparable.device), 0) for logits in (read_logits, model_logits)
    )
    if not relative_error(read_logits, model_logits) <= largest_error:
        raise MeasurementError(
            f"{type(runner.model).__name__}: the logits read from the stream after its last block differ "
            f"from the model's own logits by up to {float((read_logits - model_logits).abs().max()):.3g}, "
            "so its earlier blocks cannot be read in this way"
        )
