"""All signals that text tells, in one pass over it, and tables of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..errors import PlanError
from ..metrics.aggregation import Array, SequenceSums, ratio
from ..metrics.reference import METRICS
from ..models.anatomy import Anatomy
from ..models.block_list import find_decoder_blocks
from ..plans.route import Route
from ..plans.variants import Variant, family
from ..sweeps.measurer import Measurer
from ..sweeps.observer import (
    ATTENTION,
    CHANGE,
    COUNTS,
    KINDS,
    NORMS,
    PARTS,
    SIGNALS,
    SIMILARITY,
    counts_of,
    first_quantity,
)
from ..sweeps.results import results_table

LENS, DROP = "lens", "drop"
FROM_TEXT = (LENS, *SIGNALS, DROP)
_LENS_METRICS = {"lens_kl_nats": "kl_nats", "lens_entropy_bits": "entropy_bits", "lens_agreement": "agreement"}


def logit_lens_variants(depth: int) -> list[Variant]:
    """The model cut off behind each of its blocks but the last, and read: the logit lens. They are on the unedited model's way."""
    return [
        Variant(LENS, f"drop {layer + 1}:", Route.identity(layer + 1), layer, f"lens {layer}")
        for layer in range(depth - 1)
    ]


def variants_of(signals: Collection[str], depth: int) -> list[Variant]:
    """The edited models that signals need."""
    found = logit_lens_variants(depth) if LENS in signals else []
    return found + (family(DROP, depth) if DROP in signals else [])


def measurer_of(model: nn.Module, signals: Collection[str], depth: int, **options: Any) -> Measurer:
    """What measures signals.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        signals: of `FROM_TEXT`, or "change".
        depth: blocks of the model.
        options: of `Measurer`.
    """
    signals = [signals] if isinstance(signals, str) else signals
    if not signals:
        raise PlanError(f"no signal is asked for; there are {', '.join(FROM_TEXT)}")
    if unknown := set(signals) - {*FROM_TEXT, CHANGE}:
        raise PlanError(f"{', '.join(sorted(unknown))} is no signal read off text; they are {', '.join(FROM_TEXT)}")
    observe = [signal for signal in (*SIGNALS, CHANGE) if signal in signals]
    return Measurer(model, variants_of(signals, depth), observe=observe, check=LENS in signals, **options)


def collect_sums(
    measurer: Measurer,
    ids: torch.Tensor,
    mask: torch.Tensor,
    batch_size: int | None,
    progress: Callable[[int, int], None] | None,
) -> SequenceSums:
    """Go once over all tokens."""
    size = min(batch_size or measurer.suggest(ids.shape[1]), len(ids))
    batches = []
    for first in range(0, len(ids), size):
        measured = measurer.measure(ids[first : first + size], mask[first : first + size])
        batches.append((first, measured.counts, measured.values, measured.observed))
        if progress is not None:
            progress(min(first + size, len(ids)), len(ids))
    return SequenceSums.of(batches)


@dataclass(frozen=True, slots=True)
class SignalTables:
    """Tables of what a measurer has summed up.

    Attributes:
        measurer: what was measured.
        sample: the sums.
        model: its name.
    """

    measurer: Measurer
    sums_by_sequence: SequenceSums
    model: str

    def of(self, signal: str) -> pd.DataFrame:
        """The table of one signal; `frame.attrs["skipped"]` says what is not in it, and why."""
        frame = {
            LENS: self.lens, ATTENTION: self.attention, NORMS: self.norms, SIMILARITY: self.similarity, DROP: self.drop,
            CHANGE: self.change,
        }[signal]()  # fmt: skip
        frame.attrs["skipped"] = self.skipped
        return frame

    @property
    def skipped(self) -> dict[str, str]:
        """What could not be measured, and why."""
        observer = self.measurer.observer
        found = dict(self.measurer.skipped)
        if observer is not None:
            found |= observer.skipped
            if ATTENTION in observer.signals and not self._counts("has_five_previous").any():
                found["attention_prev5"] = "no token has five before it; sequences need at least six tokens"
        return found

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        return self.measurer.runner.depth

    def lens(self) -> pd.DataFrame:
        """A row for each block: what the model would say behind it."""
        rows = []
        for layer in range(self.depth):
            place = next(
                (n for n, v in enumerate(self.measurer.variants) if v.edit == LENS and v.layer == layer), 0
            )  # the last is all of it
            row = self._begun(layer, self.sums_by_sequence.counts)
            for name, metric in _LENS_METRICS.items():
                sums = self.sums_by_sequence.values[:, place, METRICS.index(metric)]
                row |= _mean(name, sums, self.sums_by_sequence.counts)
            rows.append(row)
        return _typed(rows)

    def attention(self) -> pd.DataFrame:
        """A row for each block: attention to the five tokens before."""
        rows = []
        for layer, member in enumerate(self.measurer.observer.contributions):  # type: ignore[union-attr]
            row = self._begun(layer, self._counts("has_five_previous")) | {"mixer": member.names}
            for name in ("attention_prev5", "attention_prev5_mean"):
                row |= self._quantity(layer, "attention", name)
            rows.append(row)
        return _typed(rows)

    def norms(self) -> pd.DataFrame:
        """A row for each block: the size of what its attention and its MLP add."""
        rows = []
        for layer, member in enumerate(self.measurer.observer.contributions):  # type: ignore[union-attr]
            row = self._begun(layer, self._counts("tokens")) | {"mixer": member.names}
            for part in ("attention", "mlp"):
                row |= self._quantity(layer, part, f"{part}_norm")
            both = [self.sums(layer, part, f"{part}_norm") for part in ("attention", "mlp")]
            row |= _mean("attention_to_mlp_ratio", both[0][0], both[1][0])
            rows.append(row)
        return _typed(rows)

    def similarity(self) -> pd.DataFrame:
        """Three rows for each swap of a block with the next: cosines of what attention, MLP and the whole block add."""
        rows = []
        for layer in range(self.depth - 1):
            for part in PARTS:
                row = self._begun(layer, self._counts("tokens")) | {"part": part}
                for kind in KINDS:
                    row |= self._quantity(layer, part, kind)
                rows.append(row)
        empty = [
            "model",
            "layer",
            "relative_depth",
            "tokens",
            "sequences",
            "part",
            *(n for kind in KINDS for n in (kind, f"{kind}_sem")),
        ]
        return _typed(rows) if rows else pd.DataFrame(columns=empty).astype({"layer": "Int64"})  # a single block

    def change(self) -> pd.DataFrame:
        """A row for each span of blocks on the way that is observed, named by its first block: how far the stream turns in it."""
        observer = self.measurer.observer
        assert observer is not None
        visited = observer.observed_route.blocks
        rows = []
        for span in range(1, min(observer.spans, len(visited)) + 1):
            for first in visited[: len(visited) - span + 1]:
                row = self._begun(first, self._counts("tokens")) | {"span": span}
                for name in ("angular_distance", "angular_distance_last"):
                    row |= self._quantity(first, str(span), name)
                influence = self._quantity(first, "1", "block_influence")
                rows.append(row | (influence if span == 1 else dict.fromkeys(influence, np.nan)))
        return _typed(rows)

    def drop(self) -> pd.DataFrame:
        """The sweep's table of dropped blocks."""
        chosen = [place for place, variant in enumerate(self.measurer.variants) if variant.edit in ("none", DROP)]
        return results_table(
            [self.measurer.variants[place] for place in chosen], self.sums_by_sequence.sums(chosen), self.model
        )

    def sums(self, layer: int, part: str, name: str) -> tuple[Array, Array]:
        """Sums and counts of one quantity by sequence; NaN and zeros where it is not measured."""
        observer = self.measurer.observer
        assert observer is not None
        if not observer.is_measured(layer, part, name):
            nothing = np.full(len(self.sums_by_sequence.counts), np.nan)
            return nothing, nothing
        place = observer.column(layer, part, name)
        count = counts_of(observer.quantities)[place - first_quantity()]
        return self.sums_by_sequence.observed[:, place], self.sums_by_sequence.observed[:, count]

    def _quantity(self, layer: int, part: str, name: str) -> dict[str, float]:
        return _mean(name, *self.sums(layer, part, name))

    def _counts(self, name: str) -> Array:
        return self.sums_by_sequence.observed[:, COUNTS.index(name)]

    def _begun(self, layer: int, counts: Array) -> dict[str, Any]:
        return {
            "model": self.model,
            "layer": layer,
            "relative_depth": layer / max(1, self.depth - 1),
            "tokens": int(counts.sum()),
            "sequences": len(self.sums_by_sequence.counts),
        }


def _mean(name: str, sums: Array, counts: Array) -> dict[str, float]:
    mean, error = ratio(sums, counts)
    return {name: mean, f"{name}_sem": error}


def _typed(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows).astype({"layer": "Int64", "relative_depth": "float64"})


def measure_tables(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor,
    signals: Collection[str],
    batch_size: int | None,
    blocks: str | None,
    anatomy: Anatomy | None,
    progress: Callable[[int, int], None] | None,
) -> SignalTables:
    """What `measure` makes its tables of; arguments as there."""
    measurer = measurer_of(
        model, signals, len(find_decoder_blocks(model, blocks).blocks), blocks=blocks, anatomy=anatomy
    )
    tables = SignalTables(measurer, collect_sums(measurer, ids, mask, batch_size, progress), type(model).__name__)
    if tables.skipped:
        what, why = next(iter(tables.skipped.items()))
        warnings.warn(f"{what} is left out: {why} ({len(tables.skipped)} such in frame.attrs['skipped'])", stacklevel=3)
    return tables
