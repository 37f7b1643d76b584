"""Resolve the inputs of a measurement from its options: model, edits, layers and text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layersurgery.checkpoints.sources import EMBEDDED, Source, find_source, needs_conversion
from layersurgery.errors import PlanError, SourceError
from layersurgery.plans.plan import Plan
from layersurgery.plans.route import Span, parse_items, resolve
from layersurgery.plans.variants import read_plans

if TYPE_CHECKING:
    from layersurgery.runs.text import TextRequest

    from ..terminal.console import Console
    from .run_options import MeasureOptions

_TOKENS, _CONTEXT = "1M", 2048
_EMBEDDED_TOKENS, _EMBEDDED_CONTEXT = "4096", 512


def read_model_info(
    model: str, options: MeasureOptions, console: Console
) -> tuple[Source, int, int | None, int | None]:
    """Find a model without fetching its weights.

    Returns:
        The source, the number of blocks, and the numbers of positions and of tokens in the vocabulary (None if the
        config does not give them).
    """
    with console.status(
        f"Converting {model} to safetensors (once)" if needs_conversion(model) else f"Reading the config of {model}"
    ):
        source = find_source(model, revision=options.revision, weights=False)
        return source, *_read_config(source)


def edits_of(options: MeasureOptions) -> list[Any]:
    """Return the edits to measure, in the form that `variants` takes.

    Raises:
        PlanError: the file of plans cannot be read.
    """
    if options.plans is None:
        return ["swap,drop" if options.edits is None else options.edits]
    try:
        text = options.plans.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the plans in {options.plans}: {error}") from error
    plans: dict[str, Plan] = read_plans(text, str(options.plans))
    return [options.edits, plans] if options.edits else [plans]


def layers_of(text: str | None, depth: int) -> range | None:
    """Parse --layers: the blocks that families of edits may touch, or None for all.

    Raises:
        PlanError: the text is not one range of the model's blocks.
    """
    if text is None:
        return None
    items = parse_items(text)
    if len(items) != 1 or not isinstance(items[0].ref, Span) or not (items[0].attention and items[0].mlp):
        raise PlanError(f"--layers takes one half-open range, for example 4:20, not {text!r}")
    blocks = resolve(items[0].ref, depth)
    return range(blocks[0], blocks[-1] + 1)


def _read_config(source: Source) -> tuple[int, int | None, int | None]:
    """Read depth, positions and vocabulary size from config.json."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.directory).get_text_config(decoder=True)
        depth = int(config.num_hidden_layers)
    except Exception as error:  # a config class may raise any exception
        raise SourceError(
            f"transformers cannot read the config of {source.label}: {type(error).__name__}: {error}"
        ) from error
    positions, vocabulary = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    return depth, positions if isinstance(positions, int) else None, vocabulary if isinstance(vocabulary, int) else None


def text_request(model: str, options: MeasureOptions, positions: int | None) -> TextRequest:
    """Return the text to read, with defaults for the options that are not set.

    Raises:
        PlanError: --data is empty, or --context is larger than the model's number of positions.
    """
    from layersurgery.runs.text import PILE, PYDOC, TextRequest, parse_count

    if options.data == "":
        raise PlanError("--data is empty: name a file, a directory, a Hub dataset or pydoc")
    data = options.data or (PYDOC if model == EMBEDDED else PILE)
    is_small = data == PYDOC
    context = options.context
    if context is None:
        context = min(_EMBEDDED_CONTEXT if is_small else _CONTEXT, positions or _CONTEXT)
    elif positions is not None and context > positions:
        raise PlanError(f"--context {context} is more than the model's {positions} positions; give at most {positions}")
    tokens = parse_count(options.tokens or (_EMBEDDED_TOKENS if is_small else _TOKENS))
    sampling = {name: getattr(options, name) for name in ("split", "column", "pack", "bos", "shuffle", "seed")}
    return TextRequest(data, tokens, context, **sampling)
