"""Compare two models, or a model with an edit of itself, given as models or by their names."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from ..library_logs import quiet_libraries
from ..plans.edits import VERBS
from ..plans.plan import Plan
from ..sweeps.compare import Comparison, compare_tokens
from .distributed import SingleProcess
from .open_text import open_text
from .options import NOT_FOR_COMPARE, RunOptions
from .placement import choose_placement, load_model
from .reporter import Reporter
from .requests import read_given_text, read_model_info


def compare(
    model: Any, other: Any, text: Any = None, *, attention_mask: Any = None, per_token: bool = False, **options: Any
) -> Comparison:
    """Compare two models, or a model with an edit of itself, on the same text.

    Logits are converted to float64 before they are summed. The logits of one whole batch are in memory at a time, so
    this is for small amounts of text; `sweep` measures more, and many edits at once.

    Args:
        model: a causal language model, or the name of one: p.
        other: another model with the same vocabulary, or the name of one that exists here, or an edit of `model` (a
            plan, its text or a route): q.
        text: token ids, (sequences, length); a tokenizer's output; a list of strings or of conversations; a Hugging
            Face dataset; a path; "pydoc"; or the id of a Hub dataset. Default: what the option `data` names.
        attention_mask: 1 for a token and 0 for padding, for token ids.
        per_token: also return the metrics of every position.
        options: as `layersurgery.runs.options.RunOptions`: tokens, context, tokenizer, batch_size, dtype, device and
            others. The default batch size is 1. With `tails`, the comparison also has the columns of
            `layersurgery.registry.TAILS`.

    Returns:
        The means of all metrics over all positions that have a next token.

    Raises:
        PlanError: no position has a next token, the vocabularies differ, or the plan does not fit the model.
        SourceError: a model or the text cannot be found or read.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> text = ["The capital of France is Paris."]
        >>> comparison = ls.compare(model, "drop 20", text, tokenizer=tokenizer, per_token=True)
        >>> comparison.kl_nats > 0, len(comparison.positions) == comparison.tokens
        (True, True)
    """
    run_options = RunOptions.of(options)
    run_options.refuse(["schedule", "compile", "track", *NOT_FOR_COMPARE], "is for sweep; compare does not take it")
    run_options, given = read_given_text(text, run_options, attention_mask)
    with ExitStack() as exit_stack:
        session, first, tokens = exit_stack.enter_context(open_text(model, given, run_options))
        second: Any = other if isinstance(other, nn.Module) or _is_model_name(other) else _resolved(other, first)
        if _is_model_name(other) or isinstance(other, nn.Module):
            run_options.refuse(["sources"], "is for an edit of the first model, and the second is a model of its own")
        if _is_model_name(other):
            with quiet_libraries():
                reporter = Reporter()
                info = read_model_info(other, None, reporter, trust_remote_code=run_options.trust_remote_code)
                placement = choose_placement(run_options, info.source, reporter)
                second = exit_stack.enter_context(load_model(info.source, placement, SingleProcess()))
        return compare_tokens(
            first,
            second,
            tokens.ids,
            tokens.mask,
            batch_size=run_options.batch_size or 1,
            blocks=run_options.blocks,
            tokenizer=session.texts.tokenizer_or_none() if per_token else None,
            per_token=per_token,
            sources=run_options.sources,
            tails=run_options.tails,
        )


def _resolved(edit: Any, model: nn.Module) -> Any:
    """Return an edit with the numbers of neurons that its plan names by kind."""
    plan = Plan.parse(edit) if isinstance(edit, str) else edit
    if not isinstance(plan, Plan) or not plan.needs_weights:
        return edit
    from ..sweeps.neuron_scores import resolve_neurons

    return resolve_neurons(plan, model)


def _is_model_name(other: Any) -> bool:
    """Return whether this names a model; every edit in a plan has arguments, so a plan's text has spaces."""
    if isinstance(other, str) and other in VERBS:  # an edit without its blocks
        return False
    if isinstance(other, str):
        return not any(mark in other for mark in " ;\n") or Path(other).expanduser().exists()
    return isinstance(other, os.PathLike)
