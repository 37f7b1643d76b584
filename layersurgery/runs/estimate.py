"""Estimate what a sweep of a model needs, without its weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..library_logs import quiet_libraries
from ..plans.block_sources import check_sources, taken_blocks
from ..plans.variants import Variant, variants
from ..runtime.matmul_rate import matmul_rate
from ..sweeps.estimate import Estimate, TextSize
from ..sweeps.estimate import estimate as estimate_config
from .options import RunOptions
from .placement import Placement, choose_placement
from .reporter import Reporter
from .requests import NOT_FOR_TASKS, GivenText, ModelInfo, read_model_info, text_request
from .session_text import tokenizer_of_run
from .sweep import place_tasks, task_request

if TYPE_CHECKING:
    from ..plans.variants import Edits, Layers
    from ..tasks.own_requests import OwnRequests
    from ..tasks.task_request import TaskRequest


def estimate(
    model: str | os.PathLike[str],
    edits: Edits = "swap,drop",
    *,
    layers: Layers = None,
    max_span: int | None = None,
    tasks: str | OwnRequests | Iterable[str | OwnRequests] | None = None,
    limit: int | None = None,
    shots: int | None = None,
    task_path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    **options: Any,
) -> Estimate:
    """Estimate the memory, traffic and arithmetic that a sweep needs, without the model's weights.

    They follow from the model's config; for tasks, their requests are loaded and tokenized, too.

    Args:
        model: the model's name: a Hub ID, a directory, a `.gguf` file, or "smollm2-135m".
        edits: the edits to measure, as for `sweep`.
        layers: for families: only the edits that change no blocks except these; a range, or "4:20".
        max_span: for families of spans and pairs: the longest span, and the largest distance.
        tasks: the tasks to measure, as for `sweep`: alone, or after a text that an option names.
        limit: number of documents of each task.
        shots: number of examples before each document of a task.
        task_path: directories with your own task definitions.
        options: as `layersurgery.runs.options.RunOptions`: tokens, context, batch_size, dtype, device_map and others.

    Returns:
        The estimate: `peak` is the memory of each device in bytes, `flops` the floating-point operations, and `seconds`
        a lower bound of the time on this machine. With `until`, edits stop early: `flops` is the most that is needed,
        and `seconds` is None. `measured` says how many sequences, or requests of tasks, and tokens are measured. For a
        text and tasks, it is that of the text, and `tasks` that of the tasks.

    Raises:
        PlanError: an edit does not fit the model, or an option is invalid.
        SourceError: the model or a task is not found, or transformers cannot build the model.

    Example:
        >>> import layersurgery as ls
        >>> cost = ls.estimate("smollm2-135m", "drop", data="pydoc", tokens=256, context=64)
        >>> cost.readouts
        31
    """
    run_options, reporter = RunOptions.of(options), Reporter()
    run_options, given, beside = place_tasks(task_request(tasks, limit, shots, task_path), run_options, None)
    info = read_model_info(model, run_options.revision, reporter, trust_remote_code=run_options.trust_remote_code)
    edited_models = variants(edits, info.depth, layers, max_span, info.count_heads, info.pick_neurons)
    return estimate_run(model, info, edited_models, run_options, reporter, given, beside)[0]


def estimate_run(
    model: str | os.PathLike[str],
    info: ModelInfo,
    edited_models: Sequence[Variant],
    options: RunOptions,
    reporter: Reporter,
    given: GivenText | None = None,
    beside: TaskRequest | None = None,
) -> tuple[Estimate, Placement]:
    """Estimate the cost of measuring edited models with these options; return it, and where the model would be.

    Args:
        model: the model's name.
        info: what its config says.
        edited_models: the models to measure.
        options: the options.
        reporter: receives what is said.
        given: tasks that are measured instead of the text that the options name.
        beside: tasks that are measured after it.
    """
    # A run imports these modules, so their memory counts in the estimate.
    from ..figures import sweeps  # noqa: F401
    from . import runner  # noqa: F401

    taken_blocks([variant.route for variant in edited_models], check_sources(options.sources))
    placement = choose_placement(options, info.source, reporter)
    cost = _estimate_one(
        model, info, edited_models, options, placement, reporter, None if given is None else given.tasks
    )
    if beside is not None:
        without = options.without(NOT_FOR_TASKS)
        cost = replace(cost, tasks=_estimate_one(model, info, edited_models, without, placement, reporter, beside))
    return cost, placement


def _estimate_one(
    model: str | os.PathLike[str],
    info: ModelInfo,
    edited_models: Sequence[Variant],
    options: RunOptions,
    placement: Placement,
    reporter: Reporter,
    tasks: TaskRequest | None,
) -> Estimate:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(info.source.directory, trust_remote_code=info.source.trust_remote_code)
    size = None if tasks is None else _size_of(tasks, config, info, options, reporter)
    request = text_request(model, options, info.positions)
    dtype = "float32" if placement.dtype == "auto" else placement.dtype
    cost = estimate_config(
        config,
        edited_models,
        tokens=request.tokens,
        context=request.context,
        size=size,
        dtype=dtype,
        device=placement.device,
        device_map=placement.device_map,
        max_memory=placement.max_memory,
        batch_size=options.batch_size,
        order=options.schedule,
        blocks=options.blocks,
        read=options.read_positions,
        quantize=placement.quantize,
        propagation=options.measures_propagation,
    )
    stops = options.precision is not None or (tasks is not None and tasks.until is not None)
    if stops:  # edits that stop early do fewer operations, so no time is a lower bound
        return cost
    return replace(cost, seconds=cost.flops / matmul_rate(placement.device, dtype))


def _size_of(tasks: TaskRequest, config: Any, info: ModelInfo, options: RunOptions, reporter: Reporter) -> TextSize:
    """Load the requests of tasks, and return how much they measure."""
    from ..tasks.harness import Harness

    tokenizer = tokenizer_of_run(
        info.source, options.tokenizer, info.source.label, trust_remote_code=options.trust_remote_code
    )
    with quiet_libraries(), reporter.status(f"Loading tasks: {tasks}"):
        harness = Harness(tasks, config, tokenizer)
    requests, text = set(harness.requests), harness.text
    # A context that requests share may be run once, and nothing needs what follows the last token.
    contexts = {request.context for request in requests}
    positions = sum(map(len, contexts)) + sum(len(request.continuation) - 1 for request in requests)
    sequences, length = text.ids.shape
    return TextSize(sequences, length, int(text.mask.sum()), positions, int(text.scored.sum()), "request")
