"""Rank layers on a text or on a task, in memory or into a directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import PlanError, warn
from ..runs.frames import ResultFrame, as_result
from ..runs.open_text import open_text
from ..runs.processes import run_session
from ..runs.reporter import Reporter
from ..runs.requests import read_given_text
from ..runs.tables import as_records, read_results
from .analyze import refuse_ignored, split_options
from .measurements import rank_measurement, run_rank
from .plan_run import measure_in_memory
from .removable_parts import BLOCKS, check_kind
from .task_criterion import given_task, is_task


def rank(
    model: Any,
    text: Any = None,
    *,
    of: str = BLOCKS,
    by: str | None = None,
    spans: int | None = None,
    lowest: int | None = None,
    limit: int | None = None,
    shots: int | None = None,
    task_path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    attention_mask: Any = None,
    directory: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> ResultFrame:
    """Rank layers by the cost of their removal: measured, and estimated by two cheap scores, in one pass over the data.

    Measured: KL from the unedited model when the block is dropped, and the other metrics of a sweep. Estimated: block
    influence, 1 - cosine between the stream before and after the block (ShortGPT, arXiv 2403.03853), and the angular
    distance over spans of blocks, arccos(cosine) / pi (The Unreasonable Ineffectiveness of the Deeper Layers, arXiv
    2403.17887). Both scores are means over all real tokens. The authors of the second use only the last token of each
    sequence; this value is given as well, as angular_distance_last.

    With `of`, branches are ranked instead of blocks: attentions, MLPs, or all of both together. Each is measured by
    skipping it. Its block influence and its angular distance compare the stream before and after the branch: the stream
    that the branch is added to, and their sum. Where attention and MLP read the same stream (parallel residual), it is
    the stream before the block for both.

    Args:
        model: a transformers causal language model, or the name of one; it is not changed.
        text: token ids, (sequences, length); a tokenizer's output; a list of strings or of conversations; a Hugging
            Face dataset; a path; "pydoc"; or the id of a Hub dataset. Default: what the option `data` names.
        of: "blocks", "attention", "mlp" or "branches" (attentions and MLPs together).
        by: "task:arc_easy" to rank by a task of lm-eval instead: by how far its first metric (acc if it has one) falls
            when the block is dropped, or rises if lower values of it are better. Its requests are measured instead of a
            text, and the two scores are not.
        spans: longest span of blocks to measure angular distances over; half of the model's depth if not given. Only of
            blocks.
        lowest: find so many layers (or branches) with the lowest KL by a race: each is measured until it is sure, with
            an error probability of 5 %, whether it is one of them. By default each is measured on all text.
        limit: by a task: number of its documents; by default all.
        shots: by a task: number of examples before each document; by default the task's own number.
        task_path: by a task: directories with your own task definitions.
        attention_mask: 1 for a token and 0 for padding, for token ids.
        directory: where to write tables, figures and a record of the run. A run that was interrupted resumes there,
            and a finished one is read. Default: nothing is written.
        overwrite: discard what another run has left in the directory, and measure again.
        progress: called after each batch with the number of sequences done and the total.
        options: as `layersurgery.runs.options.RunOptions`.

    Returns:
        One row for each block: layer, relative_depth, tokens, sequences, kl_nats, agreement, loss_change_nats,
        entropy_change_bits (all four for the model without the block), block_influence, angular_distance (over the
        block alone), angular_distance_last, each with a standard error over sequences; and kl_rank, influence_rank,
        angular_rank, loss_rank (1 is removed first). Of branches, a row for each branch, which is named in `part`.
        After a race, `race` says what is sure of a layer ("lowest", "higher" or "open"), layers that are surely higher
        rank last, and kl_tokens says on how much text its KL was measured; the two scores are of all text that the race
        took, and losses are not ranked. `analyses.spans(frame)` returns the angular distances over longer spans.

        By a task: the columns of the dropped model as in a `sweep` of the task's requests, with the task's own columns
        (`task_arc_easy_acc`), and by, metric, cost (the fall of the metric) with its standard error and 95 % interval
        over documents, answer_log_likelihood (mean over documents, of the correct answers), cost_rank and kl_rank.
        Equal costs, which are frequent, are ranked by answer_log_likelihood; where lm-eval's samples do not say which
        answer is correct, the column is missing and they are ranked by kl_nats.

    Raises:
        PlanError: text or a task that cannot be measured.
        SourceError: the model, the text or the task cannot be found, or lm-eval is not installed.
        UnsupportedEditError: the model's blocks cannot be run in another order.
        MeasurementError: predictions that are NaN or infinite, or too little memory.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> ranks = ls.rank(model, tokens)
        >>> len(ranks.sort_values("kl_rank").layer.head(6))
        6
    """
    refuse_ignored("rank", text, options)
    run_options, _ = split_options(options, rank)
    check_ranking(by)
    check_kind(of)
    task = given_task(by, limit, shots, task_path, run_options, has_text=text is not None)
    run_options, given = read_given_text(text, run_options, attention_mask)
    if directory is not None:
        run_session(
            model,
            run_options,
            lambda session: run_rank(session, Path(directory), overwrite=overwrite, spans=spans, lowest=lowest, of=of),
            reporter=Reporter(None if progress is None else lambda _, done, total: progress(done, total)),
            given=task or given,
        )
        return read_results(directory)
    with open_text(model, task or given, run_options) as (session, loaded, tokens):
        measure = measure_in_memory(
            session, loaded, tokens, None if progress is None else lambda _, done, total: progress(done, total)
        )
        tables = measure(rank_measurement(session, spans, lowest, of), "rank", "ranking layers")
        frame = as_result(tables["rank"], "rank", session.caption(tokens))
    if skipped := frame.attrs["skipped"]:
        name, reason = next(iter(skipped.items()))
        warn(f"{name} was skipped: {reason} ({len(skipped)} skipped in total, see frame.attrs['skipped'])")
    if "spans" in tables:
        frame.attrs["spans"] = as_records(tables["spans"])
    return frame


def check_ranking(by: str | None) -> None:
    """Refuse a criterion that is not a task; the others are always measured.

    Raises:
        PlanError: it is another one.
    """
    if by is not None and not is_task(by):
        raise PlanError(
            f"`by` is task:NAME for rank, not {by!r}; ranks by KL and by two scores are in its table anyway"
        )
