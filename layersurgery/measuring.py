"""One batch of text through many edited models at once: trunk, trie, readout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from accelerate.utils import find_executable_batch_size
from torch import nn
from torch.nn import functional

from .blocks import text_config
from .cpu import settled
from .dissection import Anatomy
from .dissection import anatomy as find_anatomy
from .errors import InexpressibleError, MeasurementError, PlanError
from .families import Variant, unedited
from .inputs import followed, model_inputs
from .kernels import chunked, streaming
from .kernels.reference import METRICS
from .metrics import Array
from .readout import find_readout
from .refusals import facts_of, refuse_architecture, refuse_route
from .stack import Stack, Tape
from .trie import Read, Run, schedule

EachToken = Callable[[Sequence[int], torch.Tensor], None]
Tick = Callable[[float], None]
_TOKENS_AT_ONCE = 2048
_SHARE_OF_MEMORY = 0.5
_SHORTEST = 64


@dataclass(frozen=True, slots=True)
class Measured:
    """What one batch gave.

    Attributes:
        counts: positions measured in each sequence.
        values: sums over them, (sequences, rows, len(METRICS)); row 0 is the unedited model, the others are the variants.
        calls: block calls made.
        states_at_peak: residual streams that were alive together.
    """

    counts: list[int]
    values: Array
    calls: int
    states_at_peak: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a batch will take, in bytes.

    Attributes:
        weights: parameters and buffers.
        streams: residual streams alive together at the widest point.
        block: inside the largest block, while it runs.
        readout: what is read of both models, and one tile of logits.
    """

    weights: int
    streams: int
    block: int
    readout: int

    @property
    def total(self) -> int:
        """In all."""
        return self.weights + self.streams + self.block + self.readout


class Measurer:
    """A model, and the edited models to measure beside it. The model is as it was between any two calls.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        variants: the edited models; those of one route are run once.
        blocks: path of the list of blocks, where it cannot be found.
        anatomy: the model's; found by running it on seven tokens if not given.
        own_tail: read with the model's own tail, and not with the fast readout.
        compiled: have torch compile the blocks, and the loop over logits on a CPU.

    Attributes:
        variants: the unedited model, then those measured.
        left_out: plans of families that this architecture cannot run, and why.

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
    ) -> None:
        refuse_architecture(facts_of(text_config(model)))
        self.model = model
        self.stack = Stack(model, anatomy or find_anatomy(model, blocks=blocks), compiled=compiled)
        kept, self.left_out = self._possible(variants)
        self.variants = (unedited(self.stack.depth), *kept)
        self._device = next(model.parameters()).device
        self._unproven = True
        self.routes = list(dict.fromkeys(variant.route for variant in kept))
        self.schedule = schedule(self.routes, self.stack.depth)
        self.readout = find_readout(self.stack, own=own_tail)
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

    def forecast(self, sequences: int, length: int) -> Forecast:
        """What a batch of `sequences` of `length` tokens will take."""
        parameters = list(self.model.parameters())
        held = [*parameters, *self.model.buffers()]
        itemsize, width = parameters[0].element_size(), self.stack.width
        tokens = sequences * length
        config = text_config(self.model)
        heads = getattr(config, "num_attention_heads", 0) if getattr(config, "_attn_implementation", "") == "eager" else 0
        largest = max(_widest(block) for block in self.stack.blocks)
        rows = self.readout.rows or min(tokens, chunked.ROWS)
        tile = (
            min(chunked.TILE_ELEMENTS, rows * self.readout.vocabulary)
            if self.readout.rows is None
            else rows * self.readout.vocabulary
        )
        return Forecast(
            weights=sum(tensor.numel() * tensor.element_size() for tensor in held),
            streams=self.schedule.states_at_peak * tokens * width * itemsize,
            block=tokens * (6 * width + largest + 2 * heads * length) * itemsize,
            readout=tokens * width * 4 * 4 + tile * 4 * 3,
        )  # fmt: skip

    def measure(self, ids: torch.Tensor, mask: torch.Tensor, each: EachToken | None = None, tick: Tick | None = None) -> Measured:
        """Measure one batch.

        Args:
            ids: tokens, (sequences, length).
            mask: 1 for a token and 0 for padding, the same shape.
            each: is called with the rows of the result, and the metrics (len(METRICS), positions) of each single position.
            tick: is called now and then with the share of the work that is done.

        Raises:
            MeasurementError: the unedited model's own predictions are no numbers.
        """
        follow = followed(mask)
        if not bool(follow.any()):
            return Measured([0] * len(ids), np.zeros((len(ids), len(self.variants), len(METRICS))), 0, 0)
        longest = self._length(mask)
        ids, mask, follow = ids[:, :longest], mask[:, :longest], follow[:, : longest - 1]
        counts = follow.sum(-1).tolist()
        target = ids[:, 1:][follow]
        chosen = functional.pad(follow, (0, 1)).flatten().nonzero()[:, 0]
        sums: dict[int, torch.Tensor] = {}

        def note(rows: Sequence[int], metrics: torch.Tensor) -> None:
            if each is not None:
                each(rows, metrics)
            # One sequence at a time, so that its digits do not depend on the others in the batch.
            parts = torch.stack([part.contiguous().sum(-1) for part in torch.split(metrics, counts, -1)])
            sums.update(dict.fromkeys(rows, parts))

        with self.stack.at_rest(), settled() if self._device.type == "cpu" else nullcontext():
            tape = self.stack.record(model_inputs(self.model, ids, mask), self.schedule.kept)
            states = tape.states
            x = self.readout.final(states[self.stack.depth], chosen)
            chosen, target = chosen.to(x.device), target.to(x.device)
            base = streaming.baseline(self.readout, x, target, compiled=self.stack.compiler is not None)
            note([0], streaming.measure_unedited(base))
            if self._unproven:  # later batches say so at their end: a device is not kept waiting for an answer
                _refuse_nonsense(self.model, sums[0])
                self._unproven = False
            if not self.schedule.ends_unedited:
                del states[self.stack.depth]
            calls, peak = self._walk(tape, chosen, base, note, tick)
        _refuse_nonsense(self.model, sums[0])
        values = torch.stack([sums[row] for row in range(len(self.variants))], 1).cpu().numpy()
        return Measured(counts, values, calls, peak)

    def _length(self, mask: torch.Tensor) -> int:
        """Where padding begins in every sequence; rounded up for compiled blocks, which take a while to make for each length."""
        longest = int(mask.any(0).nonzero().max()) + 1
        if self.stack.compiler is None:
            return longest
        return min(mask.shape[1], max(_SHORTEST, 1 << (longest - 1).bit_length()))

    def _walk(
        self, tape: Tape, chosen: torch.Tensor, base: streaming.Baseline, note: EachToken, tick: Tick | None
    ) -> tuple[int, int]:
        states, calls = tape.states, self.stack.depth
        peak = len(self.schedule.kept)
        for done, step in enumerate(self.schedule.steps):
            match step.do:
                case Run(visit, state, result):
                    states[result] = self.stack.run(tape, visit, states[state])
                    calls += 1
                    peak = max(peak, len(states))
                case Read(state, routes):
                    metrics = streaming.measure(self.readout, self.readout.final(states[state], chosen), base)
                    note([row for route in routes for row in self._rows[route]], metrics)
                    if tick is not None:
                        tick((done + 1) / len(self.schedule.steps))
            for state in step.free:
                del states[state]
        assert not states
        return calls, peak

    def suggest(self, length: int) -> int:
        """How many sequences of `length` tokens to try first: a few thousand tokens, or what half of the free memory holds."""
        device = self._device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        one, two = (self.forecast(count, length).total for count in (1, 2))
        fits = int(_SHARE_OF_MEMORY * free / max(1, two - one))
        wanted = _TOKENS_AT_ONCE * (16 if device.type == "cuda" else 1) // length
        return max(1, min(fits, wanted))

    def first(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        start: int,
        each: Callable[[int], EachToken | None] = lambda _: None,
        tick: Callable[[int], Tick | None] = lambda _: None,
    ) -> tuple[int, Measured]:
        """Measure a first batch, of fewer and fewer sequences until memory suffices.

        Args:
            ids: all tokens.
            mask: their mask.
            start: the batch size to try first.
            each: makes `measure`'s argument of a batch size.
            tick: the same.

        Returns:
            The batch size found, and what the batch gave.

        Raises:
            MeasurementError: memory does not suffice for one sequence.
        """

        def attempt(batch_size: int) -> tuple[int, Measured]:
            return batch_size, self.measure(ids[:batch_size], mask[:batch_size], each(batch_size), tick(batch_size))

        sizes = _halved(start)
        try:
            found: tuple[int, Measured] = find_executable_batch_size(
                attempt, starting_batch_size=start, reduce_batch_size_fn=lambda: next(sizes)
            )()
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            raise MeasurementError(
                f"memory does not suffice for one sequence of {ids.shape[1]} tokens: take a shorter --context, fewer edits at once, or "
                "half precision (--dtype bfloat16)"
            ) from error
        return found


def _refuse_nonsense(model: nn.Module, unedited: torch.Tensor) -> None:
    if bool(unedited[:, METRICS.index("kl_nats")].isnan().any()):
        raise MeasurementError(
            f"{type(model).__name__}'s own predictions are no numbers (NaN or infinite), before any edit; in half precision, try bfloat16 or "
            "float32"
        )


def _halved(start: int) -> Iterator[int]:
    while start > 1:
        start //= 2
        yield start
    while True:
        yield 0


def _widest(block: nn.Module) -> int:
    """Numbers a token that the matrices of a block give, the largest three together: what is alive in a gated MLP."""
    widths = sorted((parameter.shape[0] for parameter in block.parameters() if parameter.dim() == 2), reverse=True)
    return sum(widths[:3])
