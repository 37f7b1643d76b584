"""Heal an edited model by training: from names or loaded models, in one process or several, with an output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..atomic_io import directory_lock
from ..checkpoints.loading import tokenizer_of
from ..checkpoints.model_card import healed_card
from ..errors import MeasurementError, PlanError
from ..library_logs import quiet_libraries
from ..models.anatomy import anatomy
from ..path_names import without_directories
from ..runs.distributed import ProcessGroup, SingleProcess, find_process_group
from ..runs.dry_run import RESUMED, DryRun, state_of_output
from ..runs.options import SWEEP_ONLY, RunOptions
from ..runs.reporter import Reporter
from ..runs.requests import GivenText, read_given_text
from ..runs.run_directory import package_versions
from ..runs.session import ModelSession
from ..runs.session_model import SessionModel
from ..runs.session_text import SessionText
from ..runs.tracking import open_trackers, run_name
from ..runtime.block_runner import BlockRunner
from ..runtime.unembedding import Unembedding
from ..surgery.save import save
from .distillation import find_trainable_readout
from .heal_training import (
    HealingText,
    Training,
    TrainingOptions,
    options_record,
)
from .plan_run import check_target
from .trainable_weights import check_trainable, trainable_weights
from .training_state import SavedState

NOT_FOR_TRAINING = (
    "quantize", "device_map", "max_memory", "offload_folder", "schedule", "compile", "per_token", *SWEEP_ONLY
)  # fmt: skip
_STEP_TOKENS = 4096
_SPARE_SEQUENCES, _LEAST_SEQUENCES = 9, 18


@dataclass(frozen=True, slots=True)
class TrainedHealing:
    """Hold a model that was healed by training.

    Attributes:
        model: the healed model, in evaluation mode.
        steps: one row for each evaluation on the held-out text, before the first step, during training and of the
            healed model: step, kl_nats (of the teacher's predictions), loss_nats, teacher_loss_nats, tokens, and
            training_objective_nats, the mean of what was minimized since the row before.
        text: what was trained on and what was held out, in words.
        written: the healed checkpoint, if one was written.
    """

    model: nn.Module = field(repr=False, compare=False)
    steps: pd.DataFrame = field(compare=False)
    text: str
    written: Path | None = None


def heal(
    checkpoint: Any,
    teacher: Any,
    text: Any = None,
    *,
    steps: int,
    attention_mask: Any = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    how: str = "lora",
    rank: int = 16,
    lr: float | None = None,
    warmup: float = 0.1,
    loss_weight: float = 0.0,
    accumulate: int = 1,
    mixed_precision: str | None = None,
    evaluate_every: int | None = None,
    save_every: int = 25,
    **options: Any,
) -> TrainedHealing:
    """Train an edited model to predict like the unedited one, and measure it on text that is held out.

    What is minimized is KL(teacher || student), mixed with the loss on the true tokens if `loss_weight` is set, with
    AdamW, a warm-up and a cosine, and gradients of at most length 1. No dropout is applied. The result is the model
    after the last step. Started by `accelerate launch` or torchrun, several processes share the sequences of each step.

    Args:
        checkpoint: the edited model: its name, or a loaded model, which is trained in place.
        teacher: the unedited model: its name, or a loaded model. It stays as it is, in its own data type.
        text: the text, in any form that `heal_linear` takes. The last twentieth of the sequences, at least eight, is
            held out. By default as much as the steps need.
        steps: number of steps of the optimizer.
        attention_mask: 1 for a token and 0 for padding, for token ids.
        output: directory to write the healed checkpoint to. The state of the training is in `<output>-healing` until
            then, and the same call resumes from it.
        overwrite: replace the output, and the state of a training with other arguments.
        progress: called with what is done, how much of it, and how much there is in total.
        how: "lora" (matrices of `rank` are added to the blocks' linear layers, and merged at the end) or "full".
        rank: rank of LoRA's matrices.
        lr: largest learning rate; by default 5e-4 for LoRA and 5e-5 for all weights.
        warmup: share of the steps in which the learning rate rises.
        loss_weight: weight of the loss on the true tokens, from 0 to 1; KL has the rest.
        accumulate: number of parts in which the sequences of a step are run, to save memory.
        mixed_precision: "no", "bf16" or "fp16"; by default accelerate's own setting.
        evaluate_every: steps between two evaluations; by default a fifth of the steps.
        save_every: steps between two saved states.
        options: as `layersurgery.runs.options.RunOptions`: tokens, context, batch_size (the sequences of one step; by
            default about 4,096 tokens), dtype (of the edited model), seed and others.

    Returns:
        The healed model and its evaluations.

    Raises:
        PlanError: an option is invalid, the vocabularies differ, or there is too little text.
        UnsupportedEditError: weights are quantized, offloaded or shared by several blocks, or the readout is not a
            linear map.
        SourceError: PEFT is not installed.
        OutputError: the output exists, or the state is that of another training.
        MeasurementError: the loss is not finite.

    Example:
        >>> import layersurgery as ls
        >>> teacher, tokenizer = ls.load("smollm2-135m")
        >>> model = ls.operate_(ls.load("smollm2-135m").model, "drop 20")
        >>> healing = ls.heal(model, teacher, "pydoc", steps=1, context=16, batch_size=2, tokens=256,
        ...                   tokenizer=tokenizer)
        >>> healing.steps.step.tolist()
        [0, 1]
    """
    training = TrainingOptions(
        steps, how, rank, lr, warmup, loss_weight, accumulate, mixed_precision, evaluate_every, save_every
    )
    run_options, given = read_given_text(text, RunOptions.of(options), attention_mask)
    target = None if output is None else Path(output)
    return run_heal(
        checkpoint,
        teacher,
        run_options,
        training,
        target,
        overwrite=overwrite,
        reporter=Reporter(progress),
        given=given,
    )


def state_directory(output: Path) -> Path:
    """Return where the state of a training is kept until its checkpoint is written."""
    return output.with_name(f"{output.name}-healing")


def run_heal(
    model: Any,
    teacher: Any,
    options: RunOptions,
    training: TrainingOptions,
    output: Path | None,
    *,
    overwrite: bool,
    reporter: Reporter,
    given: GivenText | None = None,
) -> TrainedHealing:
    """Train a model, as `heal` does, and report what is done.

    Args:
        model: the edited model.
        teacher: the unedited model.
        options: the text, and where the model runs.
        training: how it is trained.
        output: directory to write the healed checkpoint to.
        overwrite: replace the output, and the state of another training.
        reporter: receives what is said.
        given: text that was given from Python.
    """
    options.refuse(NOT_FOR_TRAINING, "is not for training")
    with ExitStack() as stack:
        on_cpu = options.device == "cpu" or not torch.cuda.is_available()
        group = find_process_group(cpu=on_cpu)
        accelerator = stack.enter_context(_accelerator(training, cpu=on_cpu))
        if group.size > 1 and not isinstance(model, nn.Module):
            options = replace(options, device=str(accelerator.device))
        is_dry = reporter.dry_run
        reporter = reporter if group.rank == 0 else Reporter()
        stack.enter_context(quiet_libraries())
        session = ModelSession(model, options, reporter, SingleProcess(), stack, given)
        teacher_options = RunOptions(trust_remote_code=options.trust_remote_code)
        if not isinstance(teacher, nn.Module):
            teacher_options = replace(teacher_options, device=options.device)
        teacher_model = SessionModel(teacher, teacher_options, reporter, SingleProcess(), stack)
        if output is not None:
            check_target(session, output, overwrite=overwrite, heals=True)
        text = _read_text(session, given, training.steps, group.size * accelerator.gradient_accumulation_steps)
        if len(set(group.gather(text.text.fingerprint))) > 1:
            raise MeasurementError("the processes have read different texts; give all of them the same files")
        _check_tokenizers(session.model, teacher_model, options)
        words = text.describe(training.steps)
        reporter.log(words)
        if is_dry and output is not None:
            is_begun = state_directory(output).exists() and not overwrite
            state = RESUMED if is_begun else state_of_output(output)
            raise DryRun(session.model.label, session.caption(text.text), output, state, "train")
        student, reference = session.model.load(), teacher_model.load()
        check_trainable(student, training.how)
        _check_separate(student, reference)
        saved = None
        if output is not None:
            arguments = {
                "model": session.model.arguments(),
                "teacher": teacher_model.arguments(),
                **session.model.placement.arguments(),
                "text": text.text.fingerprint,
                "trained": text.trained,
                "batch_size": text.batch_size,
                "seed": text.seed,
                **options_record(training),
                "versions": package_versions("accelerate"),
            }
            saved = _open_state(state_directory(output), arguments, group, stack, overwrite=overwrite)
        stack.enter_context(_evaluation_mode(student))
        stack.enter_context(_evaluation_mode(reference))
        readouts = _readouts(student, reference, options.blocks)
        track = None
        if group.rank == 0:
            name = f"{session.model.name}-healed" if output is None else run_name(output)
            config = {
                "model": session.model.label, "teacher": teacher_model.label, "text": words, **options_record(training)
            }  # fmt: skip
            is_resumed = saved is not None and saved.find() is not None
            track = stack.enter_context(open_trackers(session.trackers, name, config, reporter, resumed=is_resumed))
        with trainable_weights(student, training, options.seed) as merge, reporter.count("steps") as count:
            trainer = Training(*readouts, text, training, accelerator, group, reporter.log, count, track)
            _describe_weights(trainer, student, training, reporter)
            try:
                trainer.run(saved)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(_interrupted(saved)) from None
            merge()
        trainer.add_row(trainer.evaluate())
        steps = pd.DataFrame(trainer.progress.rows)
        if (best := steps.loc[steps.kl_nats.idxmin()]).step != training.steps:
            reporter.note(
                f"the result is the model after the last step; after step {int(best.step)} its KL was lower "
                f"({best.kl_nats:.4g} nats). Lower the learning rate, or give more text"
            )
        healing = TrainedHealing(student, steps, words)
        if output is not None and saved is not None:
            if group.rank == 0:
                _write(session, teacher_model, healing, training, output, overwrite=overwrite)
                saved.remove()
            group.broadcast(None)  # the others wait until it is written
            healing = replace(healing, written=output)
    return healing


@contextmanager
def _accelerator(training: TrainingOptions, *, cpu: bool) -> Iterator[Any]:
    """Give an Accelerator, whose settings are forgotten at the end unless the caller's program has one of its own."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    is_ours = not AcceleratorState._shared_state
    # Experts that no token of a step was sent to have no gradient.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = Accelerator(
        cpu=cpu,
        device_placement=False,
        mixed_precision=training.mixed_precision,
        gradient_accumulation_steps=training.accumulate,
        kwargs_handlers=handlers,
    )
    try:
        yield accelerator
    finally:
        accelerator.free_memory()
        if is_ours:
            AcceleratorState._reset_state()


def _read_text(session: ModelSession, given: GivenText | None, steps: int, shares: int) -> HealingText:
    """Read the text, by default as much as the steps need."""
    options, request = session.options, session.texts.request
    batch_size = options.batch_size
    if batch_size is None:
        length = request.context if given is None or given.tokens is None else given.tokens[0].shape[1]
        batch_size = -(-max(1, _STEP_TOKENS // length) // shares) * shares
    if given is None and options.tokens is None:
        sequences = steps * batch_size
        sequences = max(_LEAST_SEQUENCES, sequences + max(_SPARE_SEQUENCES, sequences // 18))
        request = replace(request, tokens=sequences * request.context)
        session.texts = SessionText(request, None, options, session.reporter, session.model)
    return HealingText.split(session.texts.text, batch_size, options.seed)


def _check_tokenizers(model: SessionModel, teacher: SessionModel, options: RunOptions) -> None:
    """Refuse a teacher whose tokenizer has other tokens.

    Raises:
        PlanError: it has.
    """
    if model.source is None or teacher.source is None or options.tokenizer is not None:
        return
    first, second = tokenizer_of(model.source), tokenizer_of(teacher.source)
    if first is not None and second is not None and first.get_vocab() != second.get_vocab():
        raise PlanError(
            f"the tokenizers of {model.label} and of the teacher {teacher.label} have different tokens, so their "
            "predictions cannot be compared; give the model that was edited as the teacher"
        )


def _check_separate(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that would be trained with the student.

    Raises:
        PlanError: they have a weight in common.
    """
    weights = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in weights for parameter in teacher.parameters()):
        raise PlanError(
            "the model and its teacher share weights, so training would change the teacher, too; load the teacher "
            "once more, or name it"
        )


def _readouts(student: nn.Module, teacher: nn.Module, blocks: str | None) -> tuple[Unembedding, Unembedding]:
    """Return the readouts of both models.

    Raises:
        PlanError: the vocabularies differ.
        UnsupportedEditError: a readout is not a linear map.
    """
    first, second = (
        find_trainable_readout(BlockRunner(model, anatomy(model, blocks=blocks))) for model in (student, teacher)
    )
    if first.vocabulary != second.vocabulary:
        raise PlanError(
            f"the model predicts {first.vocabulary:,} tokens and the teacher {second.vocabulary:,}; the teacher must "
            "have the same vocabulary. Give the model that was edited as the teacher"
        )
    return first, second


def _open_state(
    directory: Path, arguments: dict[str, Any], group: ProcessGroup, stack: ExitStack, *, overwrite: bool
) -> SavedState:
    """Open the directory of the state; one process makes and locks it."""
    if group.rank == 0:
        saved = SavedState(directory, arguments, overwrite=overwrite)
        stack.enter_context(directory_lock(directory))
        group.broadcast(None)
        return saved
    group.broadcast(None)
    return SavedState(directory, arguments, overwrite=False)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _describe_weights(trainer: Training, student: nn.Module, training: TrainingOptions, reporter: Reporter) -> None:
    trained = sum(weight.numel() for weight in trainer.weights.values())
    total = sum(weight.numel() for weight in student.parameters())
    kind = f"LoRA of rank {training.rank}" if training.how == "lora" else "all weights"
    processes = f", on {trainer.group.size} processes" if trainer.group.size > 1 else ""
    reporter.log(f"Training {kind}: {trained:,} of {total:,} numbers{processes}")


def _interrupted(saved: SavedState | None) -> str:
    if saved is None or (state := saved.find()) is None:
        return "no state was saved yet"
    return (
        f"the state after {state.name.replace('-', ' ')} is in {saved.directory}; run the same command again to resume"
    )


def _write(
    session: ModelSession,
    teacher: SessionModel,
    healing: TrainedHealing,
    training: TrainingOptions,
    output: Path,
    *,
    overwrite: bool,
) -> None:
    source, options = session.model.source, session.options
    before, after = healing.steps.iloc[0], healing.steps.iloc[-1]
    kind = f"LoRA of rank {training.rank}, merged" if training.how == "lora" else "all weights"
    rows = {
        "teacher": without_directories(teacher.label),
        "trained": kind,
        "text": f"{without_directories(session.texts.request.data)}: {healing.text}",
        "steps": f"{training.steps}, learning rate {training.largest_rate:g}, loss weight {training.loss_weight:g}",
        "KL on held-out text": f"{before.kl_nats:.4g} nats before, {after.kl_nats:.4g} after",
        "loss on held-out text": (
            f"{before.loss_nats:.4g} nats before, {after.loss_nats:.4g} after; teacher {after.teacher_loss_nats:.4g}"
        ),
    }
    base = teacher.label if teacher.source is not None and teacher.source.on_hub else None
    tokenizer = None if source is None else tokenizer_of(source)
    if tokenizer is None and not isinstance(options.tokenizer, str):
        tokenizer = options.tokenizer
    card = healed_card(source, output.name, session.model.label, base, rows)
    save(healing.model, output, tokenizer=tokenizer, overwrite=overwrite, blocks=options.blocks, card=card)
