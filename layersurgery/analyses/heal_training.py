"""Train an edited model to predict like its teacher: how it is trained, on which text, and the steps.

Everything that a step depends on is a function of its number and the seed, so a run that was killed continues from its
last saved state as if nothing had happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import MeasurementError, PlanError
from ..runtime.inputs import has_next_token
from ..runtime.unembedding import Unembedding
from .distillation import distillation_loss, held_out_sums, read_tokens
from .training_state import SavedState

if TYPE_CHECKING:
    from ..runs.distributed import ProcessGroup
    from ..runs.text import TokenizedText

HOW = ("lora", "full")
_HELD_OUT_SHARE, _LEAST_HELD_OUT, _LEAST_TRAINED = 20, 8, 8
_LEARNING_RATES = {"lora": 5e-4, "full": 5e-5}
_LARGEST_GRADIENT = 1.0
_HELD_OUT = ("kl_nats", "loss_nats", "teacher_loss_nats")


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Set how a model is trained.

    Attributes:
        steps: number of steps of the optimizer.
        how: "lora" (a product of two small matrices is added to each linear layer of the blocks, and merged at the end)
            or "full" (all weights).
        rank: width of the small matrices.
        lr: largest learning rate; None for 5e-4 with LoRA and 5e-5 for all weights. It rises during `warmup` and then
            falls to 0 as a cosine.
        warmup: share of the steps.
        loss_weight: weight of the loss on the true tokens; that of KL is the rest to 1.
        accumulate: number of parts in which the sequences of a step are run, one after another.
        mixed_precision: "no", "bf16" or "fp16"; None for accelerate's own setting.
        evaluate_every: steps between two evaluations on the held-out text; None for a fifth of the steps.
        save_every: steps between two saved states.
    """

    steps: int
    how: str = "lora"
    rank: int = 16
    lr: float | None = None
    warmup: float = 0.1
    loss_weight: float = 0.0
    accumulate: int = 1
    mixed_precision: str | None = None
    evaluate_every: int | None = None
    save_every: int = 25

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise PlanError(f"`how` {self.how!r} is unknown; use {' or '.join(HOW)}")
        for name in ("steps", "rank", "accumulate", "evaluate_every", "save_every"):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise PlanError(f"`{name}` is a whole number of at least 1, not {number!r}")
        for name in ("warmup", "loss_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise PlanError(f"`{name}` is a number from 0 to 1, not {getattr(self, name)!r}")
        if not self.largest_rate > 0:
            raise PlanError(f"`lr` is a number above 0, not {self.lr!r}")
        if self.mixed_precision not in (None, "no", "bf16", "fp16"):
            raise PlanError(f"`mixed_precision` {self.mixed_precision!r} is unknown; use no, bf16 or fp16")

    @property
    def largest_rate(self) -> float:
        """Return the largest learning rate."""
        return _LEARNING_RATES[self.how] if self.lr is None else self.lr

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.largest_rate * (step + 1) / (warm + 1)
        return self.largest_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def evaluates(self, step: int) -> bool:
        """Return whether the model is evaluated after so many steps; after the last one it is, in any case."""
        every = self.evaluate_every or max(1, self.steps // 5)
        return step < self.steps and step % every == 0


@dataclass(frozen=True, slots=True)
class HealingText:
    """Hold the sequences that are trained on, and those that are held out: the last twentieth, at least eight.

    Attributes:
        text: all sequences.
        trained: number of the sequences that are trained on, the first ones.
        batch_size: sequences of one step.
        seed: seed of their order.
    """

    text: TokenizedText
    trained: int
    batch_size: int
    seed: int

    @classmethod
    def split(cls, text: TokenizedText, batch_size: int, seed: int) -> HealingText:
        """Split a text.

        Raises:
            PlanError: it has too few sequences.
        """
        sequences = len(text.ids)
        trained = sequences - max(_LEAST_HELD_OUT, sequences // _HELD_OUT_SHARE)
        if trained < _LEAST_TRAINED:
            raise PlanError(
                f"training needs at least {_LEAST_HELD_OUT + _LEAST_TRAINED} sequences of text, of which "
                f"{_LEAST_HELD_OUT} are held out, and there are {sequences}; give more text (`tokens`) or shorter "
                "sequences (`context`)"
            )
        return cls(text, trained, batch_size, seed)

    def of_step(self, step: int) -> torch.Tensor:
        """Return the numbers of the sequences of a step: each pass over the text has its own random order."""
        order, numbers = -1, []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            if position // self.trained != order:
                order = position // self.trained
                generator = torch.Generator().manual_seed(self.seed + order)
                permutation = torch.randperm(self.trained, generator=generator)
            numbers.append(permutation[position % self.trained])
        return torch.stack(numbers)

    def describe(self, steps: int) -> str:
        """Say what is trained on and what is held out."""
        held, passes = len(self.text.ids) - self.trained, steps * self.batch_size / self.trained
        return (
            f"Training on {self.text.count(self.trained)} ({passes:.2g} passes), {self.batch_size} in each step; the "
            f"last {self.text.count(held)} are held out"
        )


class _Student(nn.Module):
    """Compute the loss inside of a module's forward, where accelerate synchronizes gradients and sets the precision."""

    def __init__(self, model: nn.Module, readout: Unembedding, teacher: Unembedding, loss_weight: float) -> None:
        super().__init__()
        self.model = model
        # Not modules, so the teacher's weights are not found among the student's.
        self.readout, self.teacher, self.loss_weight = readout, teacher, loss_weight

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the sum of the loss over the tokens of some sequences."""
        read = read_tokens(self.readout, ids, mask)
        with torch.no_grad():
            teacher_read = read_tokens(self.teacher, ids, mask)
        return distillation_loss(self.readout, read, self.teacher, teacher_read, self.loss_weight)


class _Progress:
    """Hold what accelerate does not save: the step, the evaluations and the trained weights."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        self.weights = weights
        self.step = 0
        self.rows: list[dict[str, float]] = []
        self.objective: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        weights = {name: weight.detach().cpu() for name, weight in self.weights.items()}
        return {"step": self.step, "rows": self.rows, "objective": self.objective, "weights": weights}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the state."""
        self.step, self.rows, self.objective = state["step"], state["rows"], state["objective"]
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])


class Training:
    """Train a student on a text.

    Args:
        student: the student's readout; its model's weights that require gradients are trained.
        teacher: the teacher's readout.
        text: the sequences.
        options: how it is trained.
        accelerator: accelerate's Accelerator.
        group: the processes that train together.
        log: called with lines that say what happens.
        count: called with how many steps are done, and how many there are.
        track: called with numbers by name, and the step that they are of; None for nobody.
    """

    def __init__(
        self,
        student: Unembedding,
        teacher: Unembedding,
        text: HealingText,
        options: TrainingOptions,
        accelerator: Any,
        group: ProcessGroup,
        log: Callable[[str], None],
        count: Callable[[int, int], None] | None,
        track: Callable[[Mapping[str, float], int], None] | None = None,
    ) -> None:
        self.student, self.teacher, self.text, self.options = student, teacher, text, options
        self.accelerator, self.group, self.log, self.count, self.track = accelerator, group, log, count, track
        self.parts = accelerator.gradient_accumulation_steps
        if text.batch_size % (group.size * self.parts):
            raise PlanError(
                f"{text.batch_size} sequences in a step (`batch_size`) are not divided evenly among {group.size} "
                f"process{'es'[: 2 * (group.size > 1)]} and {self.parts} part{'s'[: self.parts != 1]} (`accumulate`)"
            )
        model = student.runner.model
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        optimizer = torch.optim.AdamW(self.weights.values(), lr=options.largest_rate, weight_decay=0.0)
        module = _Student(model, student, teacher, options.loss_weight)
        self.module, self.optimizer = accelerator.prepare(module, optimizer, device_placement=[False, False])
        self.progress = _Progress(self.weights)
        accelerator.register_for_checkpointing(self.progress)
        # The models' weights are not saved: of these, only the trained ones change, and `_Progress` has them.
        accelerator.register_save_state_pre_hook(lambda _models, weights, _directory: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, _directory: models.clear())

    def run(self, saved: SavedState | None) -> list[dict[str, float]]:
        """Run all steps that are not done; return a row for each evaluation.

        Args:
            saved: where the state is kept; None to keep none.

        Raises:
            MeasurementError: the loss is not finite.
        """
        options, progress = self.options, self.progress
        if saved is not None and (state := saved.find()) is not None:
            self.accelerator.load_state(str(state))
            self.log(f"Resuming after step {progress.step}")
        elif options.steps:
            self._evaluate_row()
        started, first = time.monotonic(), progress.step
        while progress.step < options.steps:
            progress.objective.append(self._step(progress.step))
            progress.step += 1
            if self.track is not None:
                rate = options.rate(progress.step - 1)
                self.track(
                    {"training/objective_nats": progress.objective[-1], "training/learning_rate": rate}, progress.step
                )
            if options.evaluates(progress.step):
                self._evaluate_row()
                seconds = (time.monotonic() - started) / (progress.step - first)
                self.log(f"  {seconds:.1f} s a step; {seconds * (options.steps - progress.step):,.0f} s left")
            if saved is not None and (progress.step % options.save_every == 0 or progress.step == options.steps):
                saved.save(self.accelerator, progress.step)
            if self.count is not None:
                self.count(progress.step, options.steps)
        return progress.rows

    def _step(self, step: int) -> float:
        """Take a step of the optimizer; return the mean loss of its tokens."""
        text, size = self.text, self.group.size
        numbers = text.of_step(step)
        tokens = int(has_next_token(text.text.mask[numbers]).sum())
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate(step)
        self.optimizer.zero_grad()
        total = 0.0
        parts = numbers[self.group.rank :: size].chunk(self.parts)
        for part, own in enumerate(parts):
            is_last = part == len(parts) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.module):
                loss = self.module(text.text.ids[own], text.text.mask[own])
                total += float(loss.detach())
                # The mean over all tokens of the step, of which accelerate divides by the parts, and averages over the
                # processes.
                self.accelerator.backward(loss * (self.parts * size / tokens))
        mean = self._sum(total) / tokens
        if not math.isfinite(mean):
            raise MeasurementError(
                f"the loss of step {step + 1} is not finite ({mean}); lower the learning rate (`lr`) or use float32"
            )
        self.accelerator.clip_grad_norm_(self.weights.values(), _LARGEST_GRADIENT)
        self.optimizer.step()
        return mean

    def _sum(self, value: float) -> float:
        return self.group.broadcast(math.fsum(self.group.gather(value)))

    def evaluate(self) -> dict[str, float]:
        """Measure the student on the held-out text."""
        text, group = self.text.text, self.group
        held_out = torch.arange(self.text.trained, len(text.ids))[group.rank :: group.size]
        size = max(1, self.text.batch_size // (group.size * self.parts))
        sums = [
            held_out_sums(self.student, self.teacher, text.ids[own], text.mask[own])
            for own in torch.split(held_out, size)
            if len(own)
        ]
        kl, loss, teacher_loss, tokens = (self._sum(math.fsum(row[column] for row in sums)) for column in range(4))
        return {
            "step": self.progress.step,
            "kl_nats": kl / tokens,
            "loss_nats": loss / tokens,
            "teacher_loss_nats": teacher_loss / tokens,
            "tokens": int(tokens),
        }

    def _evaluate_row(self) -> None:
        self.add_row(self.evaluate())

    def add_row(self, row: dict[str, float]) -> None:
        """Add an evaluation and say it; the training loss is the mean since the evaluation before it."""
        progress = self.progress
        since = progress.objective
        row["training_objective_nats"] = math.fsum(since) / len(since) if since else math.nan
        progress.objective = []
        progress.rows.append(row)
        if self.track is not None:
            self.track({f"held_out/{name}": row[name] for name in _HELD_OUT}, int(row["step"]))
        trained = f"; objective while training {row['training_objective_nats']:.3g}" if since else ""
        self.log(
            f"Step {int(row['step'])} of {self.options.steps}: held-out KL {row['kl_nats']:.4g} nats, loss "
            f"{row['loss_nats']:.4g} (teacher {row['teacher_loss_nats']:.4g}){trained}"
        )


def options_record(options: TrainingOptions) -> dict[str, Any]:
    """Return the options that the digits depend on."""
    record = asdict(options)
    del record["save_every"]
    return record | {"lr": options.largest_rate}
