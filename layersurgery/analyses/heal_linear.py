"""Heal a model without training, from a model's name or a loaded model, and write the healed checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.edit_checkpoint import edit_checkpoint
from ..errors import PlanError
from ..plans.plan import Plan
from ..runs.open_text import open_text
from ..runs.options import SWEEP_ONLY, RunOptions
from ..runs.requests import read_given_text
from .linear_healing import LinearHealing
from .plan_run import check_target, heal_session


def heal_linear(
    model: Any,
    plan: Plan | str,
    text: Any = None,
    *,
    attention_mask: Any = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> LinearHealing:
    """Fit linear maps that heal a model from which blocks are dropped, and measure it with and without them.

    At each cut, a map multiplies what the MLP of the block before it adds to the stream, so that the stream behind the
    cut is as close as possible to that of the unedited model: ridge regression, weighted by the inverse square of the
    stream's norm, from second moments summed in float64. The ridge is chosen on other text, and the model is measured
    on text that neither has seen. The map is folded into the MLP's output projection (ReplaceMe, arXiv 2505.02819):
    the healed model is a plain checkpoint. Nothing is trained.

    Args:
        model: a transformers causal language model, or the name of one; it is not changed.
        plan: the edits that remove blocks, or their text. The blocks that stay must run once and in order.
        text: token ids, (sequences, length); a tokenizer's output; a list of strings or of conversations; a Hugging
            Face dataset; a path; "pydoc"; or the id of a Hub dataset. Default: what the option `data` names.
        attention_mask: 1 for a token and 0 for padding, for token ids.
        output: directory to write the healed checkpoint to, for a model that is given by its name.
        overwrite: replace the output.
        progress: called with what is done, how much of it, and how much there is in total.
        options: as `layersurgery.runs.options.RunOptions`: tokens (how much text), context, batch_size, dtype and
            others. A few hundred tokens for each channel of the model are enough.

    Returns:
        The maps, a table of the cuts, and the metrics of the unedited, the edited and the healed model.
        `healing.operate_(model)` edits and heals a loaded model.

    Raises:
        PlanError: a plan that removes nothing, or too little text.
        UnsupportedEditError: blocks are moved or repeated, a norm follows the MLP's output projection, or the
            projection's weights are quantized or offloaded.
        OutputError: the output exists.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> healing = ls.heal_linear(model, "drop 20:22", "pydoc", tokens=1280, context=64, tokenizer=tokenizer)
        >>> healing.costs.model.tolist()
        ['unedited', 'edited', 'healed']
        >>> model = healing.operate_(model)
        >>> model.config.num_hidden_layers
        28
    """
    if isinstance(plan, str):
        plan = Plan.parse(plan)
    if output is not None and isinstance(model, nn.Module):
        raise PlanError("output needs the model's name; for a loaded model, use healing.operate_ and save")
    run_options = RunOptions.of(options)
    run_options.refuse(["schedule", "compile", "per_token", "track", *SWEEP_ONLY], "is not for heal_linear")
    run_options, given = read_given_text(text, run_options, attention_mask)
    with open_text(model, given, run_options) as (session, _loaded, _tokens):
        if output is not None:
            check_target(session, Path(output), overwrite=overwrite, heals=True)
        healing = heal_session(session, plan, progress)
        if output is None:
            return healing
    written = edit_checkpoint(
        model,
        plan,
        output,
        overwrite=overwrite,
        revision=run_options.revision,
        blocks=run_options.blocks,
        maps=healing.maps,
    )
    return replace(healing, written=written)
