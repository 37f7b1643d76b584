"""What `sweep` is asked for: which model, which edits, which text."""

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
    """The source, without weights; and its depth, positions and vocabulary."""
    with console.status(
        f"Converting {model} to safetensors (once)" if needs_conversion(model) else f"Looking at {model}"
    ):
        source = find_source(model, revision=options.revision, weights=False)
        return source, *_config(source)


def edits_of(options: MeasureOptions) -> list[Any]:
    """What is to be measured, as `variants` takes it."""
    if options.plans is None:
        return ["swap,drop" if options.edits is None else options.edits]
    try:
        text = options.plans.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the plans in {options.plans}: {error}") from error
    plans: dict[str, Plan] = read_plans(text, str(options.plans))
    return [options.edits, plans] if options.edits else [plans]


def layers_of(text: str | None, depth: int) -> range | None:
    """The blocks that families may touch; None for all."""
    if text is None:
        return None
    items = parse_items(text)
    if len(items) != 1 or not isinstance(items[0].ref, Span) or not (items[0].attention and items[0].mlp):
        raise PlanError(f"--layers takes one half-open range, as in 4:20, not {text!r}")
    blocks = resolve(items[0].ref, depth)
    return range(blocks[0], blocks[-1] + 1)


def _config(source: Source) -> tuple[int, int | None, int | None]:
    """Depth, positions and vocabulary, from config.json."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.directory).get_text_config(decoder=True)
        depth = int(config.num_hidden_layers)
    except Exception as error:  # a config class may raise anything
        raise SourceError(
            f"transformers cannot read the config of {source.label}: {type(error).__name__}: {error}"
        ) from error
    positions, vocabulary = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    return depth, positions if isinstance(positions, int) else None, vocabulary if isinstance(vocabulary, int) else None


def text_request(model: str, options: MeasureOptions, positions: int | None) -> TextRequest:
    """The text that is asked for, with what is usual where nothing is said."""
    from layersurgery.runs.text import PILE, PYDOC, TextRequest, parse_count

    if options.data == "":
        raise PlanError("--data is empty: name a file, a directory, a hub dataset or pydoc")
    data = options.data or (PYDOC if model == EMBEDDED else PILE)
    small = data == PYDOC
    context = options.context
    if context is None:
        context = min(_EMBEDDED_CONTEXT if small else _CONTEXT, positions or _CONTEXT)
    elif positions is not None and context > positions:
        raise PlanError(
            f"--context {context} is more than the {positions} positions that the model knows; give at most {positions}"
        )
    tokens = parse_count(options.tokens or (_EMBEDDED_TOKENS if small else _TOKENS))
    given = {name: getattr(options, name) for name in ("split", "column", "pack", "bos", "shuffle", "seed")}
    return TextRequest(data, tokens, context, **given)
