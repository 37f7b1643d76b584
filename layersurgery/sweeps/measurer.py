"""One batch of text through many edited models at once: trunk, trie, readout."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from ..errors import MeasurementError, PlanError, UnsupportedEditError
from ..metrics.reference import METRICS
from ..models.anatomy import Anatomy
from ..models.anatomy import anatomy as find_anatomy
from ..models.block_list import text_config
from ..models.unsupported import refusal_fields, refuse_architecture, refuse_route
from ..plans.route import Route, Visit
from ..plans.variants import Variant, unedited
from ..runtime.block_runner import BlockRunner
from ..runtime.cpu_memory import reuse_cpu_memory
from ..runtime.inputs import has_next_token, model_inputs
from ..runtime.offload import bytes_of, device_of, distinct_tensors, offloaded, own_tensors
from ..runtime.unembedding import find_readout
from .batch_metrics import BatchMetrics, BatchResult, check_readout
from .executor import OnFraction, ScheduleExecutor
from .memory import MemoryModel, MemoryUse, free_memory, suggest_batch_size
from .observer import Observer
from .schedule import DEPTH_FIRST, LAYER_MAJOR, Schedule, layer_major, schedule

EachToken = Callable[[Sequence[int], torch.Tensor], None]
_SHARE_FOR_BLOCKS = 0.25
_SHORTEST = 64


class Measurer:
    """A model, and the edited models to measure beside it. The model is as it was between any two calls.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        variants: the edited models; those of one route are run once.
        blocks: path of the list of blocks, where it cannot be found.
        anatomy: the model's; found by running it on seven tokens if not given.
        own_tail: read with the model's own tail, and not with the fast readout.
        compiled: have torch compile the blocks, and the loop over logits on a CPU.
        order: "depth-first" or "layer-major" (see `trie`); by default layer by layer where weights of blocks are kept elsewhere, and
            where swapped blocks are observed.
        observe: signals to read off the blocks while they run (see `observing`); then there need be no variants.
        spans: of changes that are observed, up to how many blocks together.
        along: the route on which changes are observed; the unedited model if not given.
        prove: show first, on some of the text, that what is read off the last block is what the model itself returns.

    Attributes:
        variants: the unedited model, then those measured.
        observer: reads them; None where there are none.
        skipped: plans of families that this architecture cannot run, and why.
        at_once: sequences that memory holds, once it has run out; batches are measured in parts of so many.

    Raises:
        UnsupportedEditError: blocks of this architecture cannot be run in another order, or a branch cannot be skipped.
        PlanError: a route does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        variants: Sequence[Variant],
        *,
        blocks: str | None = None,
        anatomy: Anatomy | None = None,
        use_model_head: bool = False,
        compiled: bool = False,
        order: str | None = None,
        observe: Collection[str] = (),
        spans: int = 1,
        observed_route: Route | None = None,
        check: bool = False,
    ) -> None:
        refuse_architecture(refusal_fields(text_config(model)))
        self.model = model
        self.runner = BlockRunner(model, anatomy or find_anatomy(model, blocks=blocks), compiled=compiled)
        if observed_route is not None:
            refuse_route(refusal_fields(text_config(model)), observed_route, live=True)
        self.observer = Observer(self.runner, observe, spans=spans, observed_route=observed_route) if observe else None
        self._reads = bool(variants) or check
        kept, self.skipped = self._supported(variants)
        self.variants = (unedited(self.runner.depth), *kept)
        self.max_sequences: int | None = None
        self._device = device_of(model)
        self._unproven, self._prove = True, check
        self.routes = list(dict.fromkeys(variant.route for variant in kept))
        assert self.observer is None or all(visit.whole for route in self.routes for visit in route), (
            "a skip is run by a view"
        )
        # Run as well, and not read.
        self._walked = (
            [] if self.observer is None else [route for route in self.observer.routes if route not in self.routes]
        )
        self._away = [bytes_of(offloaded(block)) for block in self.runner.blocks]
        self.schedule = self._make_schedule(order)
        self.readout = find_readout(self.runner, use_model_head=use_model_head)
        self._needs = MemoryModel.of(
            model,
            self.runner.blocks,
            width=self.runner.width,
            vocabulary=self.readout.vocabulary,
            head_rows=self.readout.rows,
        )
        # Rows of the result that each route fills.
        self._rows = [
            [row for row, variant in enumerate(self.variants) if row and variant.route == route]
            for route in self.routes
        ]

    def _supported(self, variants: Sequence[Variant]) -> tuple[list[Variant], dict[str, str]]:
        """Those that can be run, and for the others of a family, why not. A plan of the caller's own is never left out."""
        facts, depth = refusal_fields(text_config(self.model)), self.runner.depth
        trunk = Route(tuple(map(Visit, range(depth))))
        kept: list[Variant] = []
        skipped: dict[str, str] = {}
        for variant in variants:
            if any(visit.block >= depth for visit in variant.route):
                raise PlanError(f"{variant.route} does not fit: the model has {depth} blocks, 0 to {depth - 1}")
            if variant.route == trunk[: len(variant.route)]:  # it is on the way
                kept.append(variant)
                continue
            try:
                refuse_route(facts, variant.route, live=True)
                for visit in variant.route:
                    self.runner.anatomy.skip_specs(visit)
            except UnsupportedEditError as error:
                if variant.edit == "plan":
                    raise
                skipped[variant.plan] = str(error)
            else:
                kept.append(variant)
        if not kept and (variants or (self.observer is None and not self._reads)):
            raise UnsupportedEditError(next(iter(skipped.values()), "there is no edit to measure"))
        return kept, skipped

    def _make_schedule(self, order: str | None) -> Schedule:
        if (order or (LAYER_MAJOR if any(self._away) or self._walked else DEPTH_FIRST)) == DEPTH_FIRST:
            return schedule(self.routes, self.runner.depth, self._walked)
        room = int(_SHARE_FOR_BLOCKS * free_memory(self._device)) // max(1, *self._away)
        return layer_major(
            self.routes, self.runner.depth, max(2 if self._walked else 1, min(room, self.runner.depth)), self._walked
        )

    @property
    def bytes_to_read(self) -> int:
        """Weights that a batch brings in from elsewhere, in bytes; 0 where all are at hand."""
        return self.schedule.bytes_read(
            self._away, bytes_of(part for module in self.runner.offloaded_outside for part in own_tensors(module))
        )

    @property
    def parameters(self) -> int:
        """Numbers that the model has, tied ones counted once."""
        return sum(tensor.numel() for tensor in distinct_tensors(self.model) if isinstance(tensor, nn.Parameter))

    def memory_use(self, sequences: int, length: int) -> MemoryUse:
        """What a batch of `sequences` of `length` tokens will take; of weights kept elsewhere, those at hand together and the next ones."""
        found = self._needs.predict(self.schedule, sequences, length)
        if self.observer is not None:
            found = replace(
                found, streams=found.streams + self.observer.streams * sequences * length * self.runner.width * 4
            )
        return replace(
            found, weights=found.weights - max(0, sum(self._away) - self.schedule.bytes_in_flight(self._away))
        )

    def measure(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        on_token_rows: EachToken | None = None,
        on_fraction: OnFraction | None = None,
    ) -> BatchResult:
        """Measure one batch, in halves and halves of halves where memory does not suffice for all of it at once.

        Args:
            ids: tokens, (sequences, length).
            mask: 1 for a token and 0 for padding, the same shape.
            each: is called with the rows of the result, and the metrics (len(METRICS), positions) of each single position.
            tick: is called now and then with the share of the work that is done.

        Raises:
            MeasurementError: the unedited model's own predictions are no numbers, or memory does not suffice for one sequence.
        """
        parts: list[BatchResult] = []
        rows: dict[tuple[int, ...], list[torch.Tensor]] = {}
        start = 0
        while start < len(ids):
            span = slice(start, start + (self.max_sequences or len(ids)))
            kept: dict[tuple[int, ...], torch.Tensor] = {}
            part = self._measure_or_halve(ids, mask, span, None if on_token_rows is None else kept, on_fraction)
            if part is None:
                self._halve(len(ids[span]), ids.shape[1])
                continue
            parts.append(part)
            for key, metrics in kept.items():
                rows.setdefault(key, []).append(metrics)
            start = span.stop
        if on_token_rows is not None:
            for key, found in rows.items():
                on_token_rows(key, torch.cat(found, -1))
        return BatchResult.of(parts)

    def _measure_or_halve(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        span: slice,
        kept: dict[tuple[int, ...], torch.Tensor] | None,
        tick: OnFraction | None,
    ) -> BatchResult | None:
        """A part of a batch; None where memory ran out."""
        done, all_of_it = span.start / len(ids), len(ids[span]) / len(ids)
        try:
            return self._measure(
                ids[span], mask[span], kept, None if tick is None else lambda share: tick(done + share * all_of_it)
            )
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
        return None  # behind the handler, which holds on to what filled the memory

    def _halve(self, sequences: int, length: int) -> None:
        clear_device_cache(garbage_collection=True)
        if sequences == 1:
            fewer = (
                ", --schedule depth-first, which holds fewer streams"
                if self.schedule.during_trunk and not self._walked
                else ""
            )
            raise MeasurementError(
                f"memory does not suffice for one sequence of {length} tokens: take a shorter --context, fewer edits at once{fewer}, or "
                "half precision (--dtype bfloat16)"
            )
        self.max_sequences = sequences // 2
        warnings.warn(
            f"memory ran out with {sequences} sequences at once; going on with {self.max_sequences}", stacklevel=3
        )

    def _measure(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        kept: dict[tuple[int, ...], torch.Tensor] | None,
        tick: OnFraction | None,
    ) -> BatchResult:
        follow = has_next_token(mask)
        if not bool(follow.any()):
            size = 0 if self.observer is None else self.observer.size
            return BatchResult(
                [0] * len(ids), np.zeros((len(ids), len(self.variants), len(METRICS))), np.zeros((len(ids), size))
            )
        longest = self._length(mask)
        ids, mask, follow = ids[:, :longest], mask[:, :longest], follow[:, : longest - 1]
        already = self.runner.offloaded.bytes_read
        observed = np.zeros((len(ids), 0))
        with self.runner.inference_mode(), reuse_cpu_memory() if self._device.type == "cpu" else nullcontext():
            if self._prove:
                check_readout(self.runner, self.readout, ids[follow.any(-1)][:1], mask[follow.any(-1)][:1])
                self._prove = False
            with nullcontext() if self.observer is None else self.observer.observing(mask):
                walk = ScheduleExecutor(self.runner, self.schedule, tick, self.observer)
                with walk.cleanup():
                    record = self.runner.record(
                        model_inputs(self.model, ids, mask), self.schedule.saved_states, walk.around_block
                    )
                    walk.track_peak(record.states)
                    reading = self._reading(ids, follow, record.states, kept) if self._reads else None
                    if not self.schedule.needs_final_state:
                        del record.states[self.runner.depth]
                    walk.run_steps(self.schedule.steps, record, _no_output if reading is None else reading.read)
                    assert not record.states
                if self.observer is not None:
                    observed = self.observer.sums()
        counts = follow.sum(-1).tolist()
        values = np.zeros((len(ids), 1, len(METRICS)))
        if reading is not None:
            _refuse_non_finite(self.model, reading.sums[0])
            values = torch.stack([reading.sums[row] for row in range(len(self.variants))], 1).cpu().numpy()
        return BatchResult(counts, values, observed, walk.calls, walk.peak, self.runner.offloaded.bytes_read - already)

    def _reading(
        self,
        ids: torch.Tensor,
        follow: torch.Tensor,
        states: dict[int, torch.Tensor],
        kept: dict[tuple[int, ...], torch.Tensor] | None,
    ) -> BatchMetrics:
        """The unedited model's predictions, read, and what is to be done with the edited ones'."""
        compiled = self.runner.compiler is not None
        reading = BatchMetrics(
            self.readout, self.rows, ids, follow, states, states[self.runner.depth], kept, compiled=compiled
        )
        if self._unproven:  # later batches say so at their end: a device is not kept waiting for an answer
            _refuse_non_finite(self.model, reading.sums[0])
            self._unproven = False
        return reading

    def rows(self, route: int) -> list[int]:
        """Rows of the result that the route of this number fills."""
        return self._rows[route]

    def _length(self, mask: torch.Tensor) -> int:
        """Where padding begins in every sequence; rounded up for compiled blocks, which take a while to make for each length."""
        longest = int(mask.any(0).nonzero().max()) + 1
        if self.runner.compiler is None:
            return longest
        return min(mask.shape[1], max(_SHORTEST, 1 << (longest - 1).bit_length()))

    def suggest(self, length: int) -> int:
        """How many sequences of `length` tokens to take at once: a few thousand tokens, or what half of the free memory holds."""
        return suggest_batch_size(self._needs, self.schedule, length, self._device)


def _no_output(_state: int, _routes: Sequence[int]) -> None:
    """Nobody reads."""


def _refuse_non_finite(model: nn.Module, unedited: torch.Tensor) -> None:
    if bool(unedited[:, METRICS.index("kl_nats")].isnan().any()):
        raise MeasurementError(
            f"{type(model).__name__}'s own predictions are no numbers (NaN or infinite), before any edit; in half precision, try bfloat16 or "
            "float32"
        )
