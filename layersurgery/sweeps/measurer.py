"""Measure one batch of text on many edited models: run the unedited model, run the schedule, read the logits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn

from ..errors import MeasurementError, UnsupportedEditError, is_out_of_memory, warn
from ..metrics import tiled
from ..metrics.aggregation import BatchResult, SequenceSums
from ..metrics.reference import METRICS
from ..metrics.tails import Tails
from ..models.anatomy import Anatomy
from ..models.anatomy import anatomy as find_anatomy
from ..models.block_costs import BlockCost, block_costs
from ..models.block_dependencies import refuse_block_by_block
from ..models.block_list import text_config
from ..models.layer_kinds import layer_kinds
from ..models.means import Means
from ..models.quantized import quantized_numbers
from ..models.taken_blocks import TakenBlocks
from ..models.unsupported import refusal_fields, refuse_architecture, refuse_route
from ..plans.route import Route
from ..plans.variants import Variant, unedited
from ..runtime.block_runner import BlockRunner
from ..runtime.cpu_memory import reuse_cpu_memory
from ..runtime.inputs import has_next_token, model_inputs, packed_inputs
from ..runtime.offload import device_of, distinct_tensors, offloaded, offloaded_bytes, own_tensors
from ..runtime.unembedding import find_readout
from .batch_metrics import BatchMetrics, check_readout
from .batches import Batches
from .context_sharing import ContextSharing
from .executor import OnFraction, ScheduleExecutor
from .memory import MemoryModel, MemoryUse, free_memory, suggest_batch_size
from .observer import Observer
from .propagation import Propagation, propagation_bytes, schedule_for_propagation
from .quantities import Observed
from .read_positions import Reads, ReadTokens, ScoredPositions
from .schedule import DEPTH_FIRST, LAYER_MAJOR, Schedule, layer_major, schedule
from .shared_contexts import find_trees
from .supported_variants import select_supported

_SHARE_FOR_BLOCKS = 0.25
_MIN_COMPILED_LENGTH = 64


@dataclass(frozen=True, slots=True)
class _ActiveRows:
    """Hold the rows that are measured, with their schedule.

    Attributes:
        rows: the rows; None for all.
        schedule: the schedule of their routes.
        of_route: the rows of each of these routes.
    """

    rows: tuple[int, ...] | None
    schedule: Schedule
    of_route: list[list[int]]


class Measurer:
    """Measurer of a model and its edited variants, one batch at a time. The model itself is unchanged after each call.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        variants: the edited models. Variants with the same route are run once.
        blocks: path of the list of blocks, if it cannot be found automatically.
        anatomy: the model's anatomy; found by running the model on seven tokens if not given.
        use_model_head: read logits with the model's own head instead of the fast readout.
        compiled: let torch compile the blocks and, on a CPU, the loop over logits.
        order: "depth-first" or "layer-major" (see `schedule`). The default is depth-first, and layer-major if weights
            of blocks are offloaded or if the observer needs additional routes; with propagation, the one that needs
            fewer streams.
        observe: signals to measure on the blocks while they run. Then `variants` may be empty.
        propagation: measure how much what later blocks add changes, in place of `observe`.
        check: check on the first text that reading the stream after the last block gives the model's own logits.
        read: the positions at which predictions are read; None for all.
        taken: the blocks of other checkpoints that the variants take; None for none.
        means: the means of the model's branches, for variants that add them.
        tails: also keep how KL is distributed over tokens, and other columns of the tails; excludes `read`.

    Attributes:
        variants: the unedited model, then the measured variants.
        observer: measures the signals; None if no signal is observed.
        propagation: measures the changes of later blocks; None if they are not measured.
        skipped: reasons by plan, for variants of a family that this architecture cannot run.
        reads_logits: the logits of the unedited model and of every variant are read.
        contexts: packs requests that share a context, if the text is requests.
        max_sequences: number of sequences that fit into memory, set after memory ran out. Batches are then measured in
            parts of this size.

    Raises:
        UnsupportedEditError: blocks of this architecture cannot be run in another order, or a branch cannot be skipped.
        PlanError: a route does not fit the model, or adds means that are not given.
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
        observe: Observed | None = None,
        propagation: bool = False,
        check: bool = False,
        read: Reads | None = None,
        taken: TakenBlocks | None = None,
        means: Means | None = None,
        tails: bool = False,
    ) -> None:
        refuse_architecture(refusal_fields(text_config(model)))
        assert read is None or not tails
        self.model, self.read, self.tails = model, read, tails
        known = anatomy or find_anatomy(model, blocks=blocks)
        self.runner = BlockRunner(model, known, compiled=compiled, taken=taken, means=means)
        if observe is not None and observe.route is not None:
            refuse_route(refusal_fields(text_config(model)), observe.route, live=True)
            refuse_block_by_block(refusal_fields(text_config(model)), observe.route)
        self.observer = None if observe is None else Observer(self.runner, observe)
        self.reads_logits = bool(variants) or check
        supported, self.skipped = select_supported(self.runner, variants)
        if not supported and (variants or (self.observer is None and not self.reads_logits)):
            raise UnsupportedEditError(next(iter(self.skipped.values()), "there is no edit to measure"))
        assert observe is None or not propagation
        self.propagation = Propagation(self.runner, supported) if propagation else None
        self.variants = (unedited(self.runner.depth), *supported)
        self.max_sequences: int | None = None
        self._device = device_of(model)
        self._is_first_batch, self._check_pending = True, check
        self.routes = list(dict.fromkeys(variant.route for variant in supported))
        self._offloaded_bytes = [offloaded_bytes(offloaded(block)) for block in self.runner.blocks]
        self.schedule = self._make_schedule(order, self.routes)
        self.readout = find_readout(self.runner, use_model_head=use_model_head)
        by_position = any(visit.start for route in self.routes for visit in route)
        self.contexts = ContextSharing(self.runner, self.readout, by_position=by_position)
        self._memory_model = MemoryModel.from_model(
            model,
            self.runner.blocks,
            width=self.runner.width,
            vocabulary=self.readout.vocabulary,
            head_rows=self.readout.tokens_at_once,
            tile_elements=tiled.tile_elements(self._device),
            observed=self._observed_bytes(),
        )
        self._active = _ActiveRows(None, self.schedule, self._rows_of(self.routes))

    @cached_property
    def layer_kinds(self) -> tuple[str, ...]:
        """Return the kind of each layer in words; an empty tuple if all layers are of one kind."""
        return layer_kinds(self.model, self.runner.anatomy)

    @cached_property
    def block_costs(self) -> list[BlockCost]:
        """Return what each block and each of its branches cost."""
        return block_costs(self.model, self.runner.anatomy)

    @property
    def block_observer(self) -> Observer | Propagation | None:
        """Return what is called around every block call; None if nothing is."""
        return self.observer or self.propagation

    def _observed_bytes(self) -> int:
        """Return the bytes of activations that are kept for each token in addition to the streams."""
        if self.propagation is not None:
            return propagation_bytes(self.schedule, self.runner.width)
        return 0 if self.observer is None else self.observer.bytes_per_token

    def _rows_of(self, routes: Sequence[Route], rows: Sequence[int] | None = None) -> list[list[int]]:
        """Return the rows of the result that belong to each route, of all rows or of these."""
        chosen = range(1, len(self.variants)) if rows is None else [row for row in rows if row]
        return [[row for row in chosen if self.variants[row].route == route] for route in routes]

    def _activate(self, rows: tuple[int, ...] | None) -> None:
        """Schedule only the routes of these rows; all if None."""
        assert rows is None or self.propagation is None, "propagation is measured on all rows"
        if rows != self._active.rows:
            chosen = range(len(self.variants)) if rows is None else rows
            routes = list(dict.fromkeys(self.variants[row].route for row in chosen if row))
            plan = self.schedule if rows is None else self._make_schedule(self.schedule.name, routes)
            self._active = _ActiveRows(rows, plan, self._rows_of(routes, rows))

    def calls_for(self, rows: tuple[int, ...] | None) -> int:
        """Return the number of block calls that a batch takes on these rows; all if None."""
        self._activate(rows)
        return self._active.schedule.calls

    def _make_schedule(self, order: str | None, routes: Sequence[Route]) -> Schedule:
        # Routes that the observer needs are run, but their logits are not read.
        observed = () if self.observer is None else self.observer.routes
        run_only = [route for route in observed if route not in routes]
        if order is None and self.propagation is not None and not any(self._offloaded_bytes):
            return schedule_for_propagation(routes, self.runner.depth)
        if (order or (LAYER_MAJOR if any(self._offloaded_bytes) or run_only else DEPTH_FIRST)) == DEPTH_FIRST:
            return schedule(routes, self.runner.depth, run_only)
        fitting = int(_SHARE_FOR_BLOCKS * free_memory(self._device)) // max(1, *self._offloaded_bytes)
        max_resident = max(2 if run_only else 1, min(fitting, self.runner.depth))
        return layer_major(routes, self.runner.depth, max_resident, run_only)

    @property
    def bytes_to_read(self) -> int:
        """Return the bytes of offloaded weights that one batch loads; 0 if no weights are offloaded."""
        return self.schedule.bytes_read(
            self._offloaded_bytes,
            offloaded_bytes(tensor for module in self.runner.offloaded_outside for tensor in own_tensors(module)),
        )

    @property
    def parameters(self) -> int:
        """Return the model's number of parameters, with tied parameters counted once."""
        return _count_parameters(self.model)

    @property
    def block_parameters(self) -> list[int]:
        """Return the number of parameters of each block."""
        return list(map(_count_parameters, self.runner.blocks))

    def memory_use(self, sequences: int, length: int) -> MemoryUse:
        """Predict the memory for a batch of `sequences` sequences of `length` tokens.

        Of the offloaded weights, only those that are in memory together are counted: the resident blocks and the
        prefetched one.
        """
        memory = self._memory_model.predict(self.schedule, sequences, length)
        in_flight = self.schedule.bytes_in_flight(self._offloaded_bytes)
        return replace(memory, weights=memory.weights - max(0, sum(self._offloaded_bytes) - in_flight))

    def measure_batch(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        span: slice,
        rows: tuple[int, ...] | None = None,
        *,
        per_token: bool = False,
        on_fraction: OnFraction | None = None,
    ) -> BatchResult:
        """Measure one batch of a text.

        Args:
            ids: tokens of the text, (sequences, length).
            mask: 1 for a token and 0 for padding, the same shape.
            span: the sequences of the batch.
            rows: the rows of the result to measure, with 0 for the unedited model; all if None.
            per_token: keep the metrics at each position.
            on_fraction: called from time to time with the fraction of the batch that is done.

        Raises:
            MeasurementError: as for `measure`.
        """
        return self.measure(ids[span], mask[span], rows, first=span.start, per_token=per_token, on_fraction=on_fraction)

    def measure(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        rows: tuple[int, ...] | None = None,
        *,
        first: int = 0,
        per_token: bool = False,
        on_fraction: OnFraction | None = None,
    ) -> BatchResult:
        """Measure some sequences. If memory runs out, halve the number of sequences and continue, as often as needed.

        Args:
            ids: tokens, (sequences, length).
            mask: 1 for a token and 0 for padding, the same shape.
            rows: the rows of the result to measure, with 0 for the unedited model; all if None.
            first: the first sequence's number in the text.
            per_token: keep the metrics at each position.
            on_fraction: called from time to time with the fraction of the work that is done.

        Returns:
            The sums of the sequences.

        Raises:
            MeasurementError: the unedited model returns NaN or infinite logits, or memory is too small for one
                sequence.
        """
        self._activate(rows)
        results: list[BatchResult] = []
        start, started = 0, time.perf_counter()
        while start < len(ids):
            span = slice(start, start + (self.max_sequences or len(ids)))
            result = self._try_measure(ids, mask, span, first, per_token, on_fraction)
            if result is None:
                self._halve(len(ids[span]), ids.shape[1])
                continue
            results.append(result)
            start = span.stop
        return replace(
            BatchResult.concatenate(results),
            first=first,
            seconds=time.perf_counter() - started,
            max_sequences=self.max_sequences,
            rows=rows,
        )

    def _try_measure(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        span: slice,
        first: int,
        per_token: bool,
        on_fraction: OnFraction | None,
    ) -> BatchResult | None:
        """Measure some sequences of a batch; return None if memory ran out."""
        start, share = span.start / len(ids), len(ids[span]) / len(ids)
        try:
            return self._measure(
                ids[span],
                mask[span],
                first + span.start,
                {} if per_token else None,
                None if on_fraction is None else lambda fraction: on_fraction(start + fraction * share),
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Return outside the handler: the exception keeps the tensors alive that filled the memory.
        return None

    def _halve(self, sequences: int, length: int) -> None:
        """Halve the number of sequences that are measured at once, after memory ran out."""
        clear_device_cache(garbage_collection=True)
        if sequences == 1:
            another_order = ""
            if self.propagation is not None:
                another_order = ", no propagation"
            elif self._active.schedule.during_trunk and (self.observer is None or not self.observer.routes):
                another_order = ", the schedule depth-first, which keeps fewer streams in memory"
            raise MeasurementError(
                f"memory is too small for one sequence of {length} tokens: use a shorter context, fewer edits at once"
                f"{another_order}, or half precision (`dtype` bfloat16)"
            )
        self.max_sequences = sequences // 2
        warn(f"memory ran out with {sequences} sequences at once; continuing with {self.max_sequences}")

    def _measure(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        first: int,
        token_metrics: dict[tuple[int, ...], torch.Tensor] | None,
        on_fraction: OnFraction | None,
    ) -> BatchResult:
        """Measure all these sequences at once, and store the metrics at each position in `token_metrics` if given."""
        has_next, plan, observer = has_next_token(mask), self._active.schedule, self.block_observer
        if not bool(has_next.any()):
            size = 0 if observer is None else observer.size
            values = np.zeros((len(ids), len(self.variants), len(METRICS)))
            tails = Tails.empty(len(ids), len(self.variants)) if self.tails else None
            return BatchResult(0, [0] * len(ids), values, np.zeros((len(ids), size)), tails=tails)
        length = self._trimmed_length(mask)
        ids, mask, has_next = ids[:, :length], mask[:, :length], has_next[:, : length - 1]
        bytes_read_before = self.runner.offloaded.bytes_read
        observed = np.zeros((len(ids), 0))
        reads = has_next if self.read is None else self.read.choose(has_next, first)
        with self.runner.inference_mode(), reuse_cpu_memory() if self._device.type == "cpu" else nullcontext():
            if self._check_pending:
                check_readout(self.runner, self.readout, ids[has_next.any(-1)][:1], mask[has_next.any(-1)][:1])
                self._check_pending = False
            inputs, tokens = self._inputs(ids, mask, reads)
            with nullcontext() if observer is None else observer.observing(mask):
                executor = ScheduleExecutor(self.runner, plan, on_fraction, observer)
                with executor.cleanup():
                    record = self.runner.record(inputs, plan.saved_states, executor.around_block)
                    executor.track_peak(record.states)
                    metrics = self._read_unedited(tokens, record.states, token_metrics) if self.reads_logits else None
                    if not plan.needs_final_state:
                        del record.states[self.runner.depth]
                    executor.run_steps(plan.steps, record, _no_output if metrics is None else metrics.read)
                    assert not record.states
                if observer is not None:
                    observed = observer.sums()
        counts = (has_next if self.read is None or self.read.scaled else reads).sum(-1).tolist()
        values, tails = np.zeros((len(ids), 1, len(METRICS))), None
        if metrics is not None:
            _refuse_non_finite(self.model, metrics.sums[0])
            missing = torch.full_like(metrics.sums[0], torch.nan)
            values = torch.stack([metrics.sums.get(row, missing) for row in range(len(self.variants))], 1).cpu().numpy()
            if self.read is not None and self.read.scaled:
                values = values * (has_next.sum(-1).double() / reads.sum(-1).clamp(min=1)).numpy()[:, None, None]
            tails = Tails.stack(metrics.tails, len(ids), len(self.variants)) if self.tails else None
        bytes_read = self.runner.offloaded.bytes_read - bytes_read_before
        return BatchResult(
            0, counts, values, observed, calls=executor.calls, states_at_peak=executor.peak, bytes_read=bytes_read,
            token_metrics=token_metrics, tails=tails,
        )  # fmt: skip

    def _inputs(self, ids: torch.Tensor, mask: torch.Tensor, reads: torch.Tensor) -> tuple[dict[str, Any], ReadTokens]:
        """Return the arguments of the model's forward, and what is read of its positions."""
        if isinstance(self.read, ScoredPositions) and self.block_observer is None:
            packed = self.contexts.pack(ids, mask, reads)
            if packed is not None:
                return packed_inputs(self.model, packed.ids, packed.positions, packed.visible), packed.reads
        # A text that scores some tokens only may be one token longer than the model's positions.
        run = slice(None, None if self.read is None or self.read.scaled else -1)
        inputs = model_inputs(self.model, ids[:, run], mask[:, run])
        return inputs, ReadTokens.of(ids, reads, ids[:, run].shape[1])

    def _read_unedited(
        self,
        tokens: ReadTokens,
        states: dict[int, torch.Tensor],
        token_metrics: dict[tuple[int, ...], torch.Tensor] | None,
    ) -> BatchMetrics:
        """Read the unedited model's logits; return the metrics to which the edited models are added."""
        compiled = self.runner.compiler is not None
        metrics = BatchMetrics(
            self.readout,
            self.rows,
            tokens,
            states,
            states[self.runner.depth],
            token_metrics,
            compiled=compiled,
            tails=self.tails,
        )
        # Refuse an unusable model early, in the first batch only: the check makes the CPU wait for the GPU. Later
        # batches are checked at their end.
        if self._is_first_batch:
            _refuse_non_finite(self.model, metrics.sums[0])
            self._is_first_batch = False
        return metrics

    def rows(self, route: int) -> list[int]:
        """Return the rows of the result that belong to the route of this number in the schedule that runs."""
        return self._active.of_route[route]

    def _trimmed_length(self, mask: torch.Tensor) -> int:
        """Return the length of the longest sequence without the padding at its end.

        For compiled blocks it is rounded up, because torch compiles them again for each new length.
        """
        longest = int(mask.any(0).nonzero().max()) + 1
        if self.runner.compiler is None:
            return longest
        return min(mask.shape[1], max(_MIN_COMPILED_LENGTH, 1 << (longest - 1).bit_length()))

    def names_of_non_finite(self, sums: SequenceSums) -> list[str]:
        """Return the plans, and the quantities of the observer, whose sums are infinite or not a number."""
        finite = np.isfinite(sums.values).all(2)
        wrong = np.flatnonzero(~(finite if sums.used is None else finite | ~sums.used).all(0))
        names = [self.variants[row].plan or self.variants[row].name for row in wrong.tolist()]
        if self.block_observer is not None:
            of_column = self.block_observer.names
            columns = np.flatnonzero(~np.isfinite(sums.observed).all(0))
            names += dict.fromkeys(of_column[column] for column in columns.tolist())
        return names

    def suggest(self, length: int, *, stops: bool = False) -> int:
        """Suggest how many sequences of `length` tokens to measure in one batch.

        A batch holds a few thousand tokens, or fewer if they would not fit into half of the free memory. If rows may
        stop after each batch (`stops`), it holds a quarter of these.
        """
        size = suggest_batch_size(self._memory_model, self.schedule, length, self._device)
        return max(1, size // 4) if stops else size

    def batches(self, ids: torch.Tensor, mask: torch.Tensor, size: int, *, fixed: bool) -> Batches:
        """Divide a text into batches.

        Args:
            ids: tokens of the text, (sequences, length).
            mask: 1 for a token and 0 for padding, the same shape.
            size: number of sequences in a batch.
            fixed: whether every batch has so many sequences. Otherwise, if they are requests, it has as many tokens as
                `size` of the longest one, and requests with one context stay together. Compiled blocks need batches
                of one shape.
        """
        if fixed or self.runner.compiler is not None or not isinstance(self.read, ScoredPositions):
            return Batches.of(len(ids), size)
        lengths = mask.sum(-1)
        trees = find_trees(ids, lengths, self.read.choose(has_next_token(mask), 0))
        return Batches.of_groups(lengths.tolist(), [len(tree.requests) for tree in trees], size * ids.shape[1])


def _count_parameters(module: nn.Module) -> int:
    stored = (tensor.numel() for tensor in distinct_tensors(module) if isinstance(tensor, nn.Parameter))
    quantized, packed = quantized_numbers(module)
    return sum(stored) + quantized - packed


def _no_output(_state: int, _routes: Sequence[int]) -> None:
    """Do nothing: this schedule has no outputs to measure."""


def _refuse_non_finite(model: nn.Module, sums: torch.Tensor) -> None:
    """Raise an error if the unedited model's sums, (sequences, len(METRICS)), contain NaN."""
    if bool(sums[:, METRICS.index("kl_nats")].isnan().any()):
        raise MeasurementError(
            f"{type(model).__name__}, unedited, returns NaN or infinite logits for this text; "
            "if it runs in half precision, try bfloat16 or float32"
        )
