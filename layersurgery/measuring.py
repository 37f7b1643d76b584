"""One batch of text through many edited models at once: trunk, trie, readout."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from torch.nn import functional

from .blocks import text_config
from .cpu import settled
from .dissection import Anatomy
from .dissection import anatomy as find_anatomy
from .errors import InexpressibleError, MeasurementError, PlanError
from .families import Variant, unedited
from .forecasting import Forecast, Needs, free_memory, sequences_at_once
from .inputs import followed, model_inputs
from .kernels import streaming
from .kernels.reference import METRICS
from .metrics import Array
from .readout import find_readout
from .refusals import facts_of, refuse_architecture, refuse_route
from .residence import bytes_of, device_of, distinct, offloaded, own
from .stack import Stack
from .trie import DEPTH_FIRST, LAYER_MAJOR, Schedule, layer_major, schedule
from .walking import Tick, Walk

EachToken = Callable[[Sequence[int], torch.Tensor], None]
_SHARE_FOR_BLOCKS = 0.25
_SHORTEST = 64


@dataclass(frozen=True, slots=True)
class Measured:
    """What one batch gave.

    Attributes:
        counts: positions measured in each sequence.
        values: sums over them, (sequences, rows, len(METRICS)); row 0 is the unedited model, the others are the variants.
        calls: block calls made.
        states_at_peak: residual streams that were alive together.
        bytes_read: weights that were brought in from elsewhere.
    """

    counts: list[int]
    values: Array
    calls: int = 0
    states_at_peak: int = 0
    bytes_read: int = 0

    @classmethod
    def of(cls, parts: Sequence[Measured]) -> Measured:
        """Several parts of a batch as one."""
        return cls(
            [count for part in parts for count in part.counts],
            np.concatenate([part.values for part in parts]),
            sum(part.calls for part in parts),
            max(part.states_at_peak for part in parts),
            sum(part.bytes_read for part in parts),
        )


class Measurer:
    """A model, and the edited models to measure beside it. The model is as it was between any two calls.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        variants: the edited models; those of one route are run once.
        blocks: path of the list of blocks, where it cannot be found.
        anatomy: the model's; found by running it on seven tokens if not given.
        own_tail: read with the model's own tail, and not with the fast readout.
        compiled: have torch compile the blocks, and the loop over logits on a CPU.
        order: "depth-first" or "layer-major" (see `trie`); by default layer by layer where weights of blocks are kept elsewhere.

    Attributes:
        variants: the unedited model, then those measured.
        left_out: plans of families that this architecture cannot run, and why.
        at_once: sequences that memory holds, once it has run out; batches are measured in parts of so many.

    Raises:
        InexpressibleError: blocks of this architecture cannot be run in another order, or a branch cannot be skipped.
        PlanError: a route does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        variants: Sequence[Variant],
        *,
        blocks: str | None = None,
        anatomy: Anatomy | None = None,
        own_tail: bool = False,
        compiled: bool = False,
        order: str | None = None,
    ) -> None:
        refuse_architecture(facts_of(text_config(model)))
        self.model = model
        self.stack = Stack(model, anatomy or find_anatomy(model, blocks=blocks), compiled=compiled)
        kept, self.left_out = self._possible(variants)
        self.variants = (unedited(self.stack.depth), *kept)
        self.at_once: int | None = None
        self._device = device_of(model)
        self._unproven = True
        self.routes = list(dict.fromkeys(variant.route for variant in kept))
        self._away = [bytes_of(offloaded(block)) for block in self.stack.blocks]
        self.schedule = self._scheduled(order)
        self.readout = find_readout(self.stack, own=own_tail)
        self._needs = Needs.of(
            model, self.stack.blocks, width=self.stack.width, vocabulary=self.readout.vocabulary, own_rows=self.readout.rows
        )
        # Rows of the result that each route fills.
        self._rows = [
            [row for row, variant in enumerate(self.variants) if row and variant.route == route] for route in self.routes
        ]

    def _possible(self, variants: Sequence[Variant]) -> tuple[list[Variant], dict[str, str]]:
        """Those that can be run, and for the others of a family, why not. A plan of the caller's own is never left out."""
        facts, depth = facts_of(text_config(self.model)), self.stack.depth
        kept: list[Variant] = []
        left_out: dict[str, str] = {}
        for variant in variants:
            if any(visit.block >= depth for visit in variant.route):
                raise PlanError(f"{variant.route} does not fit: the model has {depth} blocks, 0 to {depth - 1}")
            try:
                refuse_route(facts, variant.route, live=True)
                for visit in variant.route:
                    self.stack.anatomy.stubs(visit)
            except InexpressibleError as error:
                if variant.edit == "plan":
                    raise
                left_out[variant.plan] = str(error)
            else:
                kept.append(variant)
        if not kept:
            raise InexpressibleError(next(iter(left_out.values()), "there is no edit to measure"))
        return kept, left_out

    def _scheduled(self, order: str | None) -> Schedule:
        if (order or (LAYER_MAJOR if any(self._away) else DEPTH_FIRST)) == DEPTH_FIRST:
            return schedule(self.routes, self.stack.depth)
        room = int(_SHARE_FOR_BLOCKS * free_memory(self._device)) // max(1, *self._away)
        return layer_major(self.routes, self.stack.depth, max(1, min(room, self.stack.depth)))

    @property
    def bytes_to_read(self) -> int:
        """Weights that a batch brings in from elsewhere, in bytes; 0 where all are at hand."""
        return self.schedule.bytes_read(self._away, bytes_of(part for module in self.stack.around for part in own(module)))

    @property
    def parameters(self) -> int:
        """Numbers that the model has, tied ones counted once."""
        return sum(tensor.numel() for tensor in distinct(self.model) if isinstance(tensor, nn.Parameter))

    def forecast(self, sequences: int, length: int) -> Forecast:
        """What a batch of `sequences` of `length` tokens will take; of weights kept elsewhere, those at hand together and the next ones."""
        found = self._needs.forecast(self.schedule, sequences, length)
        return replace(found, weights=found.weights - max(0, sum(self._away) - self.schedule.bytes_passing(self._away)))

    def measure(self, ids: torch.Tensor, mask: torch.Tensor, each: EachToken | None = None, tick: Tick | None = None) -> Measured:
        """Measure one batch, in halves and halves of halves where memory does not suffice for all of it at once.

        Args:
            ids: tokens, (sequences, length).
            mask: 1 for a token and 0 for padding, the same shape.
            each: is called with the rows of the result, and the metrics (len(METRICS), positions) of each single position.
            tick: is called now and then with the share of the work that is done.

        Raises:
            MeasurementError: the unedited model's own predictions are no numbers, or memory does not suffice for one sequence.
        """
        parts: list[Measured] = []
        rows: dict[tuple[int, ...], list[torch.Tensor]] = {}
        start = 0
        while start < len(ids):
            span = slice(start, start + (self.at_once or len(ids)))
            kept: dict[tuple[int, ...], torch.Tensor] = {}
            part = self._tried(ids, mask, span, None if each is None else kept, tick)
            if part is None:
                self._halve(len(ids[span]), ids.shape[1])
                continue
            parts.append(part)
            for key, metrics in kept.items():
                rows.setdefault(key, []).append(metrics)
            start = span.stop
        if each is not None:
            for key, found in rows.items():
                each(key, torch.cat(found, -1))
        return Measured.of(parts)

    def _tried(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        span: slice,
        kept: dict[tuple[int, ...], torch.Tensor] | None,
        tick: Tick | None,
    ) -> Measured | None:
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
            fewer = ", --schedule depth-first, which holds fewer streams" if self.schedule.during else ""
            raise MeasurementError(
                f"memory does not suffice for one sequence of {length} tokens: take a shorter --context, fewer edits at once{fewer}, or "
                "half precision (--dtype bfloat16)"
            )
        self.at_once = sequences // 2
        warnings.warn(f"memory ran out with {sequences} sequences at once; going on with {self.at_once}", stacklevel=3)

    def _measure(
        self, ids: torch.Tensor, mask: torch.Tensor, kept: dict[tuple[int, ...], torch.Tensor] | None, tick: Tick | None
    ) -> Measured:
        follow = followed(mask)
        if not bool(follow.any()):
            return Measured([0] * len(ids), np.zeros((len(ids), len(self.variants), len(METRICS))))
        longest = self._length(mask)
        ids, mask, follow = ids[:, :longest], mask[:, :longest], follow[:, : longest - 1]
        counts = follow.sum(-1).tolist()
        target = ids[:, 1:][follow]
        chosen = functional.pad(follow, (0, 1)).flatten().nonzero()[:, 0]
        sums: dict[int, torch.Tensor] = {}

        def note(rows: Sequence[int], metrics: torch.Tensor) -> None:
            if kept is not None:
                kept[tuple(rows)] = metrics.cpu()
            # One sequence at a time, so that its digits do not depend on the others in the batch.
            parts = torch.stack([part.contiguous().sum(-1) for part in torch.split(metrics, counts, -1)])
            sums.update(dict.fromkeys(rows, parts))

        already = self.stack.residence.bytes_read
        with self.stack.at_rest(), settled() if self._device.type == "cpu" else nullcontext():
            walk = Walk(self.stack, self.schedule, tick)
            with walk.whole():
                tape = self.stack.record(model_inputs(self.model, ids, mask), self.schedule.kept, walk.beside)
                states = tape.states
                walk.see(states)
                x = self.readout.final(states[self.stack.depth], chosen)
                chosen, target = chosen.to(x.device), target.to(x.device)
                base = streaming.baseline(self.readout, x, target, compiled=self.stack.compiler is not None)
                note([0], streaming.measure_unedited(base))
                if self._unproven:  # later batches say so at their end: a device is not kept waiting for an answer
                    _refuse_nonsense(self.model, sums[0])
                    self._unproven = False
                if not self.schedule.goes_on:
                    del states[self.stack.depth]

                def read(state: int, routes: Sequence[int]) -> None:
                    metrics = streaming.measure(self.readout, self.readout.final(states[state], chosen), base)
                    note([row for route in routes for row in self._rows[route]], metrics)

                walk.through(self.schedule.steps, tape, read)
                assert not states
        _refuse_nonsense(self.model, sums[0])
        values = torch.stack([sums[row] for row in range(len(self.variants))], 1).cpu().numpy()
        return Measured(counts, values, walk.calls, walk.peak, self.stack.residence.bytes_read - already)

    def _length(self, mask: torch.Tensor) -> int:
        """Where padding begins in every sequence; rounded up for compiled blocks, which take a while to make for each length."""
        longest = int(mask.any(0).nonzero().max()) + 1
        if self.stack.compiler is None:
            return longest
        return min(mask.shape[1], max(_SHORTEST, 1 << (longest - 1).bit_length()))

    def suggest(self, length: int) -> int:
        """How many sequences of `length` tokens to take at once: a few thousand tokens, or what half of the free memory holds."""
        return sequences_at_once(self._needs, self.schedule, length, self._device)


def _refuse_nonsense(model: nn.Module, unedited: torch.Tensor) -> None:
    if bool(unedited[:, METRICS.index("kl_nats")].isnan().any()):
        raise MeasurementError(
            f"{type(model).__name__}'s own predictions are no numbers (NaN or infinite), before any edit; in half precision, try bfloat16 or "
            "float32"
        )
