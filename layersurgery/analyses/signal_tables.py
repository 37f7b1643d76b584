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
from ..metrics.aggregation import Array, Sample, ratio
from ..metrics.reference import METRICS
from ..models.anatomy import Anatomy
from ..models.block_list import locate
from ..plans.route import Route
from ..plans.variants import Variant, family
from ..sweeps.measurer import Measurer
from ..sweeps.observer import ATTENTION, CHANGE, COUNTS, KINDS, NORMS, PARTS, SIGNALS, SIMILARITY, counts_of, first_quantity
from ..sweeps.results import results

LENS, DROP = "lens", "drop"
FROM_TEXT = (LENS, *SIGNALS, DROP)
_LENS_METRICS = {"lens_kl_nats": "kl_nats", "lens_entropy_bits": "entropy_bits", "lens_agreement": "agreement"}


def lenses(depth: int) -> list[Variant]:
    """The model cut off behind each of its blocks but the last, and read: the logit lens. They are on the unedited model's way."""
    return [Variant(LENS, f"drop {layer + 1}:", Route.identity(layer + 1), layer, f"lens {layer}") for layer in range(depth - 1)]


def variants_of(signals: Collection[str], depth: int) -> list[Variant]:
    """The edited models that signals need."""
    found = lenses(depth) if LENS in signals else []
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
    return Measurer(model, variants_of(signals, depth), observe=observe, prove=LENS in signals, **options)


def sampled(
    measurer: Measurer, ids: torch.Tensor, mask: torch.Tensor, batch_size: int | None, progress: Callable[[int, int], None] | None
) -> Sample:
    """Go once over all tokens."""
    size = min(batch_size or measurer.suggest(ids.shape[1]), len(ids))
    batches = []
    for first in range(0, len(ids), size):
        measured = measurer.measure(ids[first : first + size], mask[first : first + size])
        batches.append((first, measured.counts, measured.values, measured.observed))
        if progress is not None:
            progress(min(first + size, len(ids)), len(ids))
    return Sample.of(batches)


@dataclass(frozen=True, slots=True)
class Tables:
    """Tables of what a measurer has summed up.

    Attributes:
        measurer: what was measured.
        sample: the sums.
        model: its name.
    """

    measurer: Measurer
    sample: Sample
    model: str

    def of(self, signal: str) -> pd.DataFrame:
        """The table of one signal; `frame.attrs["left_out"]` says what is not in it, and why."""
        frame = {
            LENS: self.lens, ATTENTION: self.attention, NORMS: self.norms, SIMILARITY: self.similarity, DROP: self.drop,
            CHANGE: self.change,
        }[signal]()  # fmt: skip
        frame.attrs["left_out"] = self.left_out
        return frame

    @property
    def left_out(self) -> dict[str, str]:
        """What could not be measured, and why."""
        observer = self.measurer.observer
        found = dict(self.measurer.left_out)
        if observer is not None:
            found |= observer.left_out
            if ATTENTION in observer.signals and not self._counts("late").any():
                found["attention_prev5"] = "no token has five before it; sequences need at least six tokens"
        return found

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        return self.measurer.stack.depth

    def lens(self) -> pd.DataFrame:
        """A row for each block: what the model would say behind it."""
        rows = []
        for layer in range(self.depth):
            place = next(
                (n for n, v in enumerate(self.measurer.variants) if v.edit == LENS and v.layer == layer), 0
            )  # the last is all of it
            row = self._begun(layer, self.sample.counts)
            for name, metric in _LENS_METRICS.items():
                sums = self.sample.values[:, place, METRICS.index(metric)]
                row |= _mean(name, sums, self.sample.counts)
            rows.append(row)
        return _typed(rows)

    def attention(self) -> pd.DataFrame:
        """A row for each block: attention to the five tokens before."""
        rows = []
        for layer, member in enumerate(self.measurer.observer.members):  # type: ignore[union-attr]
            row = self._begun(layer, self._counts("late")) | {"mixer": member.names}
            for name in ("attention_prev5", "attention_prev5_mean"):
                row |= self._quantity(layer, "attention", name)
            rows.append(row)
        return _typed(rows)

    def norms(self) -> pd.DataFrame:
        """A row for each block: the size of what its attention and its MLP add."""
        rows = []
        for layer, member in enumerate(self.measurer.observer.members):  # type: ignore[union-attr]
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
        visited = observer.along.blocks
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
        return results([self.measurer.variants[place] for place in chosen], self.sample.sums(chosen), self.model)

    def sums(self, layer: int, part: str, name: str) -> tuple[Array, Array]:
        """Sums and counts of one quantity by sequence; NaN and zeros where it is not measured."""
        observer = self.measurer.observer
        assert observer is not None
        if not observer.known(layer, part, name):
            nothing = np.full(len(self.sample.counts), np.nan)
            return nothing, nothing
        place = observer.place(layer, part, name)
        count = counts_of(observer.quantities)[place - first_quantity()]
        return self.sample.observed[:, place], self.sample.observed[:, count]

    def _quantity(self, layer: int, part: str, name: str) -> dict[str, float]:
        return _mean(name, *self.sums(layer, part, name))

    def _counts(self, name: str) -> Array:
        return self.sample.observed[:, COUNTS.index(name)]

    def _begun(self, layer: int, counts: Array) -> dict[str, Any]:
        return {
            "model": self.model,
            "layer": layer,
            "relative_depth": layer / max(1, self.depth - 1),
            "tokens": int(counts.sum()),
            "sequences": len(self.sample.counts),
        }


def _mean(name: str, sums: Array, counts: Array) -> dict[str, float]:
    mean, error = ratio(sums, counts)
    return {name: mean, f"{name}_sem": error}


def _typed(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows).astype({"layer": "Int64", "relative_depth": "float64"})


def measured(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor,
    signals: Collection[str],
    batch_size: int | None,
    blocks: str | None,
    anatomy: Anatomy | None,
    progress: Callable[[int, int], None] | None,
) -> Tables:
    """What `measure` makes its tables of; arguments as there."""
    measurer = measurer_of(model, signals, len(locate(model, blocks).blocks), blocks=blocks, anatomy=anatomy)
    tables = Tables(measurer, sampled(measurer, ids, mask, batch_size, progress), type(model).__name__)
    if tables.left_out:
        what, why = next(iter(tables.left_out.items()))
        warnings.warn(f"{what} is left out: {why} ({len(tables.left_out)} such in frame.attrs['left_out'])", stacklevel=3)
    return tables
