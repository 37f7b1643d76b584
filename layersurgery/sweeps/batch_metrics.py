"""Measuring one batch: what was summed up over it, and the readout of streams at the ends of routes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from ..errors import MeasurementError
from ..metrics import dispatch, tiled
from ..metrics.aggregation import Array
from ..runtime.block_runner import BlockRunner
from ..runtime.inputs import model_inputs
from ..runtime.unembedding import TOLERANCE, Readout

_PROOF = 64  # tokens


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What one batch gave.

    Attributes:
        counts: positions measured in each sequence.
        values: sums over them, (sequences, rows, len(METRICS)); row 0 is the unedited model, the others are the variants.
        observed: what the observer has summed up, (sequences, its size).
        calls: block calls made.
        states_at_peak: residual streams that were alive together.
        bytes_read: weights that were brought in from elsewhere.
    """

    counts: list[int]
    values: Array
    observed: Array
    calls: int = 0
    states_at_peak: int = 0
    bytes_read: int = 0

    @classmethod
    def of(cls, parts: Sequence[BatchResult]) -> BatchResult:
        """Several parts of a batch as one."""
        return cls(
            [count for part in parts for count in part.counts],
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.observed for part in parts]),
            sum(part.calls for part in parts),
            max(part.states_at_peak for part in parts),
            sum(part.bytes_read for part in parts),
        )


class BatchMetrics:
    """Streams of one batch, read and measured against the unedited model's end.

    Args:
        readout: how streams become logits.
        rows: rows of the result that the route of a number fills.
        ids: tokens, (sequences, length).
        follow: positions that have a next token, (sequences, length - 1).
        states: streams by number, as they come and go.
        end: the unedited model's last one.
        kept: takes the metrics of single positions, if they are wanted.
        compiled: use loops that torch compiles.

    Attributes:
        sums: for each row of the result, (sequences, len(METRICS)).
    """

    def __init__(
        self,
        readout: Readout,
        rows: Callable[[int], Sequence[int]],
        ids: torch.Tensor,
        follow: torch.Tensor,
        states: dict[int, torch.Tensor],
        end: torch.Tensor,
        kept: dict[tuple[int, ...], torch.Tensor] | None,
        *,
        compiled: bool = False,
    ) -> None:
        self.readout, self.rows, self.states, self.kept = readout, rows, states, kept
        self.sums: dict[int, torch.Tensor] = {}
        self._counts = follow.sum(-1).tolist()
        chosen = functional.pad(follow, (0, 1)).flatten().nonzero()[:, 0]
        x = readout.normalize(end, chosen)
        self._chosen = chosen.to(x.device)
        target = ids[:, 1:][follow].to(x.device)
        self._base = dispatch.baseline(readout, x, target, compiled=compiled)
        self._note([0], dispatch.measure_unedited(self._base))

    def read(self, state: int, routes: Sequence[int]) -> None:
        """Measure a stream, which is the end of these routes."""
        rows = [row for route in routes for row in self.rows(route)]
        if rows:
            self._note(
                rows,
                dispatch.measure(self.readout, self.readout.normalize(self.states[state], self._chosen), self._base),
            )

    def _note(self, rows: Sequence[int], metrics: torch.Tensor) -> None:
        if self.kept is not None:
            self.kept[tuple(rows)] = metrics.cpu()
        # One sequence at a time, so that its digits do not depend on the others in the batch.
        parts = torch.stack([part.contiguous().sum(-1) for part in torch.split(metrics, self._counts, -1)])
        self.sums.update(dict.fromkeys(rows, parts))


def check_readout(runner: BlockRunner, readout: Readout, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Show on real text that the stream behind the last block, as it is read here, is what the model itself predicts.

    Args:
        runner: the blocks.
        readout: how streams become logits.
        ids: one sequence, (1, length); its first tokens are taken.
        mask: 1 for a token and 0 for padding, the same shape.

    Raises:
        MeasurementError: it is not.
    """
    real = int(mask[0].nonzero()[0])
    span = slice(real, real + _PROOF)
    inputs = model_inputs(runner.model, ids[:, span], mask[:, span])
    own = runner.model(**inputs).logits[0]
    end = runner.record(inputs, ()).states[runner.depth]
    x = readout.normalize(end, torch.arange(end.shape[1]))
    read = torch.cat([readout.logits_tile(x[rows], 0, readout.vocabulary) for rows in tiled.rows_of(readout, len(x))])
    # Some return float32 logits of half-precision products, of a stream that is kept in float32.
    dtypes = {parameter.dtype for parameter in runner.model.parameters() if parameter.is_floating_point()} | {own.dtype}
    tolerance = max(TOLERANCE.get(dtype, 3e-2) for dtype in dtypes)
    own = own.float()
    finite = own.abs() < torch.finfo(torch.float16).max  # others stand for words that are ruled out
    off = torch.where(finite, read.to(own.device) - own, 0).abs().amax(-1)
    if bool((off > tolerance * torch.where(finite, own, 0).abs().amax(-1)).any()):
        raise MeasurementError(
            f"{type(runner.model).__name__}: what is read behind its last block differs from its own logits by up to {float(off.max()):.3g}, so "
            "its earlier blocks cannot be read that way"
        )
