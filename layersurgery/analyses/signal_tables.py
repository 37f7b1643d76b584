"""Measure the signals of a model in one pass over text, and make tables of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..errors import PlanError, warn
from ..metrics import stream_similarity
from ..metrics.aggregation import Array, SequenceSums, ratio
from ..metrics.reference import METRICS
from ..models.anatomy import Anatomy
from ..models.block_list import find_decoder_blocks
from ..plans.route import Route
from ..plans.variants import Variant, family
from ..runtime.contributions import BRANCHES
from ..sweeps.measurer import Measurer
from ..sweeps.quantities import (
    ATTENTION,
    CHANGE,
    CKA,
    COSINE,
    COUNTS,
    NORMS,
    PARTS,
    SIGNALS,
    SIMILARITY,
    SIMILARITY_KINDS,
    STREAM,
    STREAM_SIGNALS,
    Observed,
)
from ..sweeps.race import Race
from ..sweeps.results import results_table, with_layer_kinds
from ..sweeps.row_progress import StopRule
from ..sweeps.sweep import collect_sums

LENS, DROP = "lens", "drop"
FROM_TEXT = (LENS, *SIGNALS, *STREAM_SIGNALS, DROP)
_HSIC = {CKA: ("hsic", "has_four_tokens"), "cka_without_first": ("hsic_without_first", "has_five_tokens")}
_LENS_METRICS = {"lens_kl_nats": "kl_nats", "lens_entropy_bits": "entropy_bits", "lens_agreement": "agreement"}


def logit_lens_variants(depth: int) -> list[Variant]:
    """Return the logit lens as variants: for each block but the last, the model that ends after this block.

    Each of them is a prefix of the unedited model, so none needs extra block calls.
    """
    return [
        Variant(LENS, f"drop {layer + 1}:", Route.identity(layer + 1), layer, f"lens {layer}")
        for layer in range(depth - 1)
    ]


def signal_variants(signals: Collection[str], depth: int) -> list[Variant]:
    """Return the edited models that the signals need."""
    variants = logit_lens_variants(depth) if LENS in signals else []
    return variants + (family(DROP, depth) if DROP in signals else [])


def make_measurer(
    model: nn.Module, signals: Collection[str], depth: int, *, spans: int = 1, **options: Any
) -> Measurer:
    """Make a measurer of signals.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        signals: from `FROM_TEXT`, or "change".
        depth: number of blocks of the model.
        spans: largest number of consecutive blocks for which the change of the stream is observed.
        options: other arguments of `Measurer`.

    Raises:
        PlanError: no signal, or an unknown one.
    """
    signals = [signals] if isinstance(signals, str) else signals
    if not signals:
        raise PlanError(f"no signal is given; choose from {', '.join(FROM_TEXT)}")
    if unknown := set(signals) - {*FROM_TEXT, CHANGE}:
        raise PlanError(f"unknown signals: {', '.join(sorted(unknown))}; choose from {', '.join(FROM_TEXT)}")
    observed = [signal for signal in (*SIGNALS, *STREAM_SIGNALS, CHANGE) if signal in signals]
    observe = Observed(observed, spans) if observed else None
    return Measurer(model, signal_variants(signals, depth), observe=observe, check=LENS in signals, **options)


@dataclass(frozen=True, slots=True)
class SignalTables:
    """Tables made from the sums of a measurer.

    Attributes:
        measurer: the measurer.
        sums_by_sequence: the sums of each sequence.
        model: name of the model.
        rule: the rule by which rows stopped; None if all text was measured.
    """

    measurer: Measurer
    sums_by_sequence: SequenceSums
    model: str
    rule: StopRule | None = None

    def table(self, signal: str) -> pd.DataFrame:
        """Return the table of one signal; `frame.attrs["skipped"]` names what is missing, with the reasons."""
        frame = {
            LENS: self.lens, ATTENTION: self.attention, NORMS: self.norms, SIMILARITY: self.similarity, DROP: self.drop,
            CHANGE: self.change, CKA: self.cka, COSINE: self.cosine, STREAM: self.stream,
        }[signal]()  # fmt: skip
        if "relative_depth" in frame:
            frame = with_layer_kinds(frame, self.measurer.layer_kinds, 2 if signal == SIMILARITY else 1)
        frame.attrs["skipped"] = self.skipped
        return frame

    @property
    def skipped(self) -> dict[str, str]:
        """Name what could not be measured, with the reasons."""
        observer = self.measurer.observer
        skipped = dict(self.measurer.skipped)
        if observer is not None:
            skipped |= observer.skipped
            if ATTENTION in observer.signals and not self._counts("has_five_previous").any():
                skipped["attention_prev5"] = "no token has five tokens before it; sequences need at least six tokens"
            for name, (_, count) in _HSIC.items() if CKA in observer.signals else ():
                if short := int((self._counts(count) == 0).sum()):
                    skipped[f"{name} of {short} sequence{'s'[: short != 1]}"] = "HSIC needs at least four tokens"
        return skipped

    @property
    def depth(self) -> int:
        """Return the number of blocks of the model."""
        return self.measurer.runner.depth

    def lens(self) -> pd.DataFrame:
        """Return one row per block: the logit lens after it."""
        rows = []
        for layer in range(self.depth):
            # The lens after the last block is the unedited model, variant 0.
            index = next(
                (
                    position
                    for position, variant in enumerate(self.measurer.variants)
                    if variant.edit == LENS and variant.layer == layer
                ),
                0,
            )
            row = self._row(layer, self.sums_by_sequence.counts)
            for name, metric in _LENS_METRICS.items():
                sums = self.sums_by_sequence.values[:, index, METRICS.index(metric)]
                row |= _mean(name, sums, self.sums_by_sequence.counts)
            rows.append(row)
        return _typed(rows)

    def attention(self) -> pd.DataFrame:
        """Return one row per block: attention to the five previous tokens."""
        rows = []
        for layer, contributions in enumerate(self.measurer.observer.contributions):  # type: ignore[union-attr]
            row = self._row(layer, self._counts("has_five_previous")) | {"mixer": contributions.mixer_names}
            for name in ("attention_prev5", "attention_prev5_mean"):
                row |= self._quantity(layer, "attention", name)
            rows.append(row)
        return _typed(rows)

    def norms(self) -> pd.DataFrame:
        """Return one row per block: the norms of its attention's and its MLP's contributions."""
        rows = []
        for layer, contributions in enumerate(self.measurer.observer.contributions):  # type: ignore[union-attr]
            row = self._row(layer, self._counts("tokens")) | {"mixer": contributions.mixer_names}
            for branch in ("attention", "mlp"):
                row |= self._quantity(layer, branch, f"{branch}_norm")
            sums = [self.sums(layer, branch, f"{branch}_norm") for branch in ("attention", "mlp")]
            row |= _mean("attention_to_mlp_ratio", sums[0][0], sums[1][0])
            rows.append(row)
        return _typed(rows)

    def similarity(self) -> pd.DataFrame:
        """Return three rows per swap of adjacent blocks: cosines of contributions of attention, MLP and whole block."""
        rows = []
        for layer in range(self.depth - 1):
            for part in PARTS:
                row = self._row(layer, self._counts("tokens")) | {"part": part}
                for kind in SIMILARITY_KINDS:
                    row |= self._quantity(layer, part, kind)
                rows.append(row)
        empty = [
            "model",
            "layer",
            "relative_depth",
            "tokens",
            "sequences",
            "part",
            *(name for kind in SIMILARITY_KINDS for name in (kind, f"{kind}_sem")),
        ]
        # A model of a single block has no swaps.
        return _typed(rows) if rows else pd.DataFrame(columns=empty).astype({"layer": "Int64"})

    def change(self) -> pd.DataFrame:
        """Return one row per span of blocks on the observed route: how far the residual stream turns across it.

        The column `layer` is the first block of the span.
        """
        observer = self.measurer.observer
        assert observer is not None
        visited = observer.observed_route.blocks
        rows = []
        for span in range(1, min(observer.observed.spans, len(visited)) + 1):
            for first in visited[: len(visited) - span + 1]:
                row = self._row(first, self._counts("tokens")) | {"span": span}
                for name in ("angular_distance", "angular_distance_last"):
                    row |= self._quantity(first, str(span), name)
                influence = self._quantity(first, "1", "block_influence")
                rows.append(row | (influence if span == 1 else dict.fromkeys(influence, np.nan)))
        return _typed(rows)

    def branch_change(self) -> pd.DataFrame:
        """Return two rows per block: how far its attention and its MLP turn the stream that they are added to."""
        rows = []
        for layer in range(self.depth):
            for branch in BRANCHES:
                row = self._row(layer, self._counts("tokens")) | {"part": branch}
                for name in ("block_influence", "angular_distance", "angular_distance_last"):
                    row |= self._quantity(layer, branch, name)
                rows.append(row)
        return _typed(rows)

    def cka(self) -> pd.DataFrame:
        """Return one row per pair of states: the CKA of the residual streams, from HSIC as a mean over sequences."""
        used = {name: self._counts(count) > 0 for name, (_, count) in _HSIC.items()}
        hsic = {
            (name, *pair): self.sums(pair[0], str(pair[1]), _HSIC[name][0])[0][used[name]]
            for name in _HSIC
            for pair in self._pairs()
        }
        rows = []
        for one, two in self._pairs():
            row = self._pair_row(one, two, used[CKA])
            for name in _HSIC:
                value, error = stream_similarity.cka(
                    *(hsic[name, *pair] for pair in ((one, two), (one, one), (two, two)))
                )
                row |= {name: value, f"{name}_sem": error}
            rows.append(row)
        return pd.DataFrame(rows)

    def cosine(self) -> pd.DataFrame:
        """Return one row per pair of states: the mean cosine of each token's residual streams."""
        used = self._counts("tokens") > 0
        return pd.DataFrame(
            [self._pair_row(one, two, used) | self._quantity(one, str(two), COSINE) for one, two in self._pairs()]
        )

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """Yield the pairs of states, a state with itself included."""
        return combinations_with_replacement(range(self.depth + 1), 2)

    def _pair_row(self, one: int, two: int, used: np.ndarray) -> dict[str, Any]:
        return {
            "model": self.model,
            "from": one,
            "to": two,
            "tokens": int(self._counts("tokens")[used].sum()),
            "sequences": int(used.sum()),
        }

    def stream(self) -> pd.DataFrame:
        """Return one row per block: the size of the stream before it, and what is added to it in comparison."""
        rows = []
        for layer in range(self.depth):
            row = self._row(layer, self._counts("tokens"))
            for name in ("stream_norm", "first_token_norm", "stream_variance"):
                row |= self._quantity(layer, "stream", name)
            before, after = (self.sums(state, "stream", "stream_variance")[0] for state in (layer, layer + 1))
            row |= _mean("variance_growth", after, before)
            for branch in BRANCHES:
                for name in (f"{branch}_to_stream", f"{branch}_cosine"):
                    row |= self._quantity(layer, branch, name)
            rows.append(row)
        return _typed(rows)

    def drop(self) -> pd.DataFrame:
        """Return the sweep's table of dropped blocks."""
        return self.edited((DROP,))

    def edited(self, edits: Collection[str]) -> pd.DataFrame:
        """Return the sweep's table of some families; after a race, with what is sure of each in the column `race`."""
        indices = [index for index, variant in enumerate(self.measurer.variants) if variant.edit in ("none", *edits)]
        frame = results_table(
            [self.measurer.variants[index] for index in indices], self.sums_by_sequence.rows(indices), self.model
        )
        if not isinstance(self.rule, Race):
            return frame
        # These intervals would be for a number of sequences that was chosen before.
        ends = [f"{metric}{end}" for metric in METRICS for end in ("_low", "_high")]
        return frame.drop(columns=[*ends, "interval"]).assign(race=[self.rule.outcome(row) for row in indices])

    def sums(self, layer: int, part: str, name: str) -> tuple[Array, Array]:
        """Return the sums and counts of one quantity by sequence.

        Both are NaN where it is not measured.
        """
        observer = self.measurer.observer
        assert observer is not None
        if not observer.quantities.is_measured(layer, part, name):
            missing = np.full(len(self.sums_by_sequence.counts), np.nan)
            return missing, missing
        column = observer.quantities.column(layer, part, name)
        count = observer.quantities.count_column(column)
        return self.sums_by_sequence.observed[:, column], self.sums_by_sequence.observed[:, count]

    def _quantity(self, layer: int, part: str, name: str) -> dict[str, float]:
        return _mean(name, *self.sums(layer, part, name))

    def _counts(self, name: str) -> Array:
        return self.sums_by_sequence.observed[:, COUNTS.index(name)]

    def _row(self, layer: int, counts: Array) -> dict[str, Any]:
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
    """Measure the signals and return their tables; the arguments are those of `measure`."""
    measurer = make_measurer(
        model, signals, len(find_decoder_blocks(model, blocks).blocks), blocks=blocks, anatomy=anatomy
    )
    tables = SignalTables(measurer, collect_sums(measurer, ids, mask, batch_size, progress), type(model).__name__)
    if tables.skipped:
        name, reason = next(iter(tables.skipped.items()))
        warn(f"{name} was skipped: {reason} ({len(tables.skipped)} skipped in total, see frame.attrs['skipped'])")
    return tables
