"""Estimate what a sweep of a model needs, from the config alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..plans.variants import Variant, variants
from ..runtime.matmul_rate import matmul_rate
from ..sweeps.estimate import Estimate
from ..sweeps.estimate import estimate as estimate_config
from .options import RunOptions
from .placement import Placement, choose_placement
from .reporter import Reporter
from .requests import ModelInfo, read_model_info, text_request

if TYPE_CHECKING:
    from ..plans.variants import Edits, Layers


def estimate(
    model: str | os.PathLike[str], edits: Edits = "swap,drop", *, layers: Layers = None, max_span: int | None = None,
    **options: Any,
) -> Estimate:  # fmt: skip
    """Estimate the memory, traffic and arithmetic that a sweep needs, from the model's config alone.

    Args:
        model: the model's name: a Hub ID, a directory, a `.gguf` file, or "smollm2-135m".
        edits: the edits to measure, as for `sweep`.
        layers: for families: only the edits that change no blocks except these; a range, or "4:20".
        max_span: for families of spans and pairs: the longest span, and the largest distance.
        options: as `layersurgery.runs.options.RunOptions`: tokens, context, batch_size, dtype, device_map and others.

    Returns:
        The estimate: `peak` is the memory of each device in bytes, `flops` the floating-point operations, and `seconds`
        a lower bound of the time on this machine. With `until`, edits stop early: `flops` is the most that is needed,
        and `seconds` is None.

    Raises:
        PlanError: an edit does not fit the model, or an option is invalid.
        SourceError: the model is not found, or transformers cannot build it.

    Example:
        >>> import layersurgery as ls
        >>> cost = ls.estimate("smollm2-135m", "drop", data="pydoc", tokens=256, context=64)
        >>> cost.readouts
        31
    """
    run_options, reporter = RunOptions.of(options), Reporter()
    info = read_model_info(model, run_options.revision, reporter, trust_remote_code=run_options.trust_remote_code)
    return estimate_run(model, info, variants(edits, info.depth, layers, max_span), run_options, reporter)[0]


def estimate_run(
    model: str | os.PathLike[str],
    info: ModelInfo,
    edited_models: Sequence[Variant],
    options: RunOptions,
    reporter: Reporter,
) -> tuple[Estimate, Placement]:
    """Estimate the cost of measuring edited models with these options; return it, and where the model would be."""
    from transformers import AutoConfig

    # A run imports these modules, so their memory counts in the estimate.
    from ..figures import sweeps  # noqa: F401
    from . import runner  # noqa: F401

    request = text_request(model, options, info.positions)
    placement = choose_placement(options, info.source, reporter)
    cost = estimate_config(
        AutoConfig.from_pretrained(info.source.directory, trust_remote_code=info.source.trust_remote_code),
        edited_models,
        tokens=request.tokens,
        context=request.context,
        dtype="float32" if placement.dtype == "auto" else placement.dtype,
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
    if options.precision is not None:  # edits that stop early do fewer operations, so no time is a lower bound
        return cost, placement
    rate = matmul_rate(placement.device, "float32" if placement.dtype == "auto" else placement.dtype)
    return replace(cost, seconds=cost.flops / rate), placement
