"""Measure the means of what a model's branches add, from any form of model and text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import MeasurementError, OutputError, PlanError
from ..models.anatomy import Anatomy
from ..models.anatomy import anatomy as find_anatomy
from ..models.block_list import text_config
from ..models.means import Means, as_means
from ..models.unsupported import MEASURE_MEANS, refusal_fields, refuse_architecture
from ..plans.variants import Variant
from ..runtime.block_runner import BlockRunner
from ..runtime.branch_means import BranchSums
from .open_text import open_text
from .options import SWEEP_ONLY, RunOptions
from .requests import read_given_text
from .run_directory import JOURNAL, Run
from .tables import MEANS
from .text import TokenizedText

if TYPE_CHECKING:
    from .session import ModelSession

_BATCH_TOKENS = 2048
LARGEST_TOKENS = 65536
"""How many tokens of the measured text a sweep takes at most, if it measures the means itself."""


def measure_means(
    model: Any,
    text: Any = None,
    *,
    attention_mask: Any = None,
    first_tokens: bool = False,
    output: str | os.PathLike[str] | None = None,
    anatomy: Anatomy | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Means:
    """Measure the mean over tokens of what each attention and each MLP adds to the stream of the unedited model.

    Edits such as `drop 20 mean` and `skip-mlp 20 mean` add these means in the place of what the branches compute.

    Args:
        model: a transformers causal language model, or the name of one; it is not changed.
        text: token ids, (sequences, length); a tokenizer's output; a list of strings or of conversations; a Hugging
            Face dataset; a path; "pydoc"; or the id of a Hub dataset. Default: what the option `data` names.
        attention_mask: 1 for a token and 0 for padding, for token ids.
        first_tokens: also count the first token of each sequence. Many models give it a stream that is much longer than
            all others, and it would change the mean.
        output: file to write the means to (safetensors).
        anatomy: the model's anatomy; found if not given.
        progress: called with the number of sequences done and the number of all sequences.
        options: as `layersurgery.runs.options.RunOptions`: tokens, context, batch_size, dtype and others.

    Returns:
        The means: `means[20, "mlp"]` is a float32 vector, `means.save(path)` writes a file.

    Raises:
        PlanError: the text cannot be read, or has no token to count.
        UnsupportedEditError: the blocks of this architecture cannot be run one by one.
        MeasurementError: a mean is NaN or infinite.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> tokens = tokenizer("The capital of France is Paris.", return_tensors="pt").input_ids
        >>> means = ls.measure_means(model, tokens)
        >>> len(means[20, "mlp"].shape)
        1
        >>> with ls.operate(model, "skip-mlp 20 mean", means=means):
        ...     logits = model(tokens).logits
    """
    run_options = RunOptions.of(options)
    run_options.refuse(["schedule", "compile", "per_token", "track", *SWEEP_ONLY], "is not for measure_means")
    run_options, given = read_given_text(text, run_options, attention_mask)
    with open_text(model, given, run_options) as (session, loaded, tokens):
        means = means_of_text(session, loaded, tokens, first_tokens=first_tokens, anatomy=anatomy, progress=progress)
    if output is not None:
        means.save(output)
    return means


def means_of_text(
    session: ModelSession,
    model: nn.Module,
    text: TokenizedText,
    *,
    first_tokens: bool = False,
    largest: int | None = None,
    anatomy: Anatomy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Means:
    """Measure the means of a session's model on its text, or on the first sequences of it.

    Args:
        session: the session, which names model and text.
        model: its loaded model.
        text: its text.
        first_tokens: also count the first token of each sequence.
        largest: number of tokens after which no further sequence is taken; None to take all.
        anatomy: the model's anatomy; found if not given.
        progress: called with the number of sequences done and the number of all sequences.

    Raises:
        PlanError: there is no token to count.
        UnsupportedEditError: the blocks of this architecture cannot be run one by one.
        MeasurementError: a mean is NaN or infinite.
    """
    refuse_architecture(refusal_fields(text_config(model)))
    options = session.options
    sums = BranchSums(
        BlockRunner(model, anatomy or find_anatomy(model, blocks=options.blocks)), first_tokens=first_tokens
    )
    length = text.ids.shape[1]
    count = len(text.ids) if largest is None else min(len(text.ids), -(-largest // length))
    size = options.batch_size or max(1, _BATCH_TOKENS // length)
    for first in range(0, count, size):
        span = slice(first, min(first + size, count))
        sums.add(text.ids[span], text.mask[span])
        if progress is not None:
            progress(span.stop, count)
    if not sums.tokens:
        raise PlanError("the text has no token behind the first of a sequence, so there is no mean; give longer text")
    facts = {"data": session.texts.request.data, "fingerprint": text.fingerprint, "sequences": count}
    means = sums.means(session.model.label, facts)
    for (block, branch), mean in means.vectors.items():
        if not bool(torch.isfinite(mean.vector).all()):
            raise MeasurementError(f"the mean of block {block}'s {branch} is NaN or infinite on this text")
    return means


def adds_means(variants: Sequence[Variant]) -> bool:
    """Return whether an edited model adds the mean of a branch."""
    return any(visit.mean for variant in variants for visit in variant.route)


def given_means(options: RunOptions, variants: Sequence[Variant], *, has_tasks: bool) -> Means | None:
    """Return the means that the options name; None if there are none, so that they must be measured.

    Args:
        options: the options.
        variants: the edited models.
        has_tasks: whether tasks are measured.

    Raises:
        PlanError: no edit adds means, or tasks are measured without means.
        SourceError: the file of means cannot be read.
    """
    means = as_means(options.means)
    if means is not None and not adds_means(variants):
        raise PlanError(
            "`means` has no effect on these edits; it is for edits such as 'skip-mlp 20 mean' and drop-mean"
        )
    if means is None and has_tasks and adds_means(variants):
        raise PlanError(f"edits that add means are measured on tasks with means of a text; {MEASURE_MEANS}")
    return means


def means_of_run(session: ModelSession, text: TokenizedText, run: Run, given: Means | None) -> Means:
    """Return the means of a sweep that writes to a directory; measure them if they are not given, and keep them there.

    Args:
        session: the session.
        text: its text.
        run: the run; if it is resumed, its own means are read.
        given: means that the caller gave; None to measure them.

    Raises:
        OutputError: the means in the directory are not those that the run began with.
    """
    means, path = given, run.directory / MEANS
    if means is None and run.started and path.exists():
        means = Means.load(path)
    elif means is None:
        session.reporter.log(
            "Measuring the means of attention and MLP on the same text first, without the first token of each sequence"
        )
        means = means_of_text(session, session.model.load(), text, largest=LARGEST_TOKENS)
    facts = {"fingerprint": means.fingerprint, "model": means.model, "tokens": means.tokens, "text": dict(means.text)}
    recorded = run.facts.get("means") if run.started else None
    if recorded is not None and recorded["fingerprint"] != means.fingerprint:
        raise OutputError(
            f"{path} holds other means than those that this run began with; to start again, replace it (`overwrite`)"
        )
    run.start()
    (run.directory / JOURNAL).mkdir(exist_ok=True)  # from here on, the run is one to resume
    if given is None:
        means.save(path)
        run.update({"files": [MEANS]})
    run.update({"means": facts})
    return means
