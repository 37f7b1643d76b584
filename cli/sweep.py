"""`layersurgery sweep` and `layersurgery plot`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layersurgery.errors import PlanError, SourceError
from layersurgery.families import Variant, read_plans, variants
from layersurgery.plan import Plan
from layersurgery.route import Span, parse_items, resolve
from layersurgery.sources import EMBEDDED, Source, find_source, needs_conversion
from layersurgery.weights import fingerprint

from .progress import bar
from .results import draw_one, show
from .talk import Talk, complain, number, size

if TYPE_CHECKING:
    from layersurgery.measuring import Measurer
    from layersurgery.runs import Run
    from layersurgery.text import Asked, Text

_TOKENS, _CONTEXT = "1M", 2048
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
_EMBEDDED_TOKENS, _EMBEDDED_CONTEXT = "4096", 512


@dataclass(frozen=True, slots=True)
class Options:
    """What `sweep` takes beside the model."""

    edits: str | None
    plans: Path | None
    layers: str | None
    data: str | None
    split: str
    column: str
    tokens: str | None
    context: int | None
    seed: int
    shuffle: bool | None
    pack: bool
    bos: bool
    tokenizer: str | None
    batch_size: int | None
    dtype: str
    device: str | None
    compile: bool
    output: Path | None
    overwrite: bool
    per_token: bool
    revision: str | None
    blocks: str | None


def run_sweep(model: str, options: Options, talk: Talk) -> None:
    """Measure, showing what happens, and end with the table. Text is read before the weights are fetched or loaded."""
    asked_edits = _edits(options)
    with talk.step(f"Converting {model} to safetensors (once)" if needs_conversion(model) else f"Looking at {model}"):
        source = find_source(model, revision=options.revision, weights=False)
        depth, positions, vocabulary = _config(source)
    chosen = variants(asked_edits, depth, _layers(options.layers, depth))
    asked = _asked(model, options, positions)
    device, dtype = _place(options, source, talk)
    from layersurgery.runs import open_run
    from layersurgery.table import read_run
    from layersurgery.text import check_data

    check_data(asked)
    tokenizer = _tokenizer(source, options.tokenizer)
    directory = options.output or Path(f"{source.name}-sweep")
    before = read_run(directory) or {}
    # A finished run need not reach the hub again to say so.
    done = before.get("state") == "finished" and asked.from_hub and not options.overwrite
    text = None if done else _text(asked, tokenizer, vocabulary, talk)
    source = find_source(model, revision=options.revision)
    arguments = _arguments(source, options, asked, chosen, device, dtype)
    arguments["text"]["fingerprint"] = (
        text.fingerprint if text else before.get("arguments", {}).get("text", {}).get("fingerprint")
    )
    with open_run(directory, arguments, overwrite=options.overwrite) as run:
        if run.finished or text is None:
            talk.say(f"The sweep in {run.directory} has finished; nothing to do. --overwrite measures it anew")
        else:
            _measure(run, source, chosen, text, tokenizer, options, (device, dtype), talk)
        show(run, talk)


def _edits(options: Options) -> list[Any]:
    if options.plans is None:
        return ["swap,drop" if options.edits is None else options.edits]
    try:
        text = options.plans.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the plans in {options.plans}: {error}") from error
    plans: dict[str, Plan] = read_plans(text, str(options.plans))
    return [options.edits, plans] if options.edits else [plans]


def _layers(text: str | None, depth: int) -> range | None:
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
        raise SourceError(f"transformers cannot read the config of {source.label}: {type(error).__name__}: {error}") from error
    positions, vocabulary = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    return depth, positions if isinstance(positions, int) else None, vocabulary if isinstance(vocabulary, int) else None


def _asked(model: str, options: Options, positions: int | None) -> Asked:
    from layersurgery.text import PILE, PYDOC, Asked, number

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
    tokens = number(options.tokens or (_EMBEDDED_TOKENS if small else _TOKENS))
    given = {name: getattr(options, name) for name in ("split", "column", "pack", "bos", "shuffle", "seed")}
    return Asked(data, tokens, context, **given)


def _tokenizer(source: Source, other: str | None) -> Any:
    from layersurgery.loading import tokenizer_of

    tokenizer = tokenizer_of(find_source(other, weights=False) if other else source)
    if tokenizer is None:
        raise SourceError(f"{other or source.label} brings no tokenizer; say whose to take: --tokenizer MODEL")
    return tokenizer


def _place(options: Options, source: Source, talk: Talk) -> tuple[str, str]:
    """Device and dtype, said out."""
    import json

    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] == "meta":
        raise PlanError("--device meta computes nothing; write cpu or cuda")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SourceError(f"--device {device} cannot be used: {str(error).partition(chr(10))[0]}") from error
    dtype = options.dtype.removeprefix("torch.")
    if dtype == "auto":
        config = json.loads((source.directory / "config.json").read_text("utf-8"))
        inner = config.get("text_config") or {}
        named = (owner.get(name) for owner in (inner, config) for name in ("dtype", "torch_dtype"))
        # Where no config says it, transformers looks at the weights.
        dtype = str(next(filter(None, named), "auto")).removeprefix("torch.")
        if device == "cpu" and dtype == "float16":
            dtype = "float32"
            talk.say(
                "Note: the checkpoint is in float16, which few CPUs multiply at all, so it is loaded in float32; --dtype float16 insists"
            )
    if dtype not in _DTYPES:
        raise PlanError(f"--dtype {options.dtype!r} is not one to run a model in; write float32, bfloat16, float16 or auto")
    return device, dtype


def _arguments(
    source: Source, options: Options, asked: Asked, chosen: Sequence[Variant], device: str, dtype: str
) -> dict[str, Any]:
    from layersurgery.runs import versions

    return {
        "model": {"name": source.label, "revision": source.revision, "weights": fingerprint(source.directory)},
        "edits": [[variant.edit, variant.name, str(variant.route)] for variant in chosen],
        "text": {**dataclasses.asdict(asked), "shuffle": asked.shuffled, "tokenizer": options.tokenizer},
        "dtype": dtype,
        "device": device,
        "compiled": options.compile,
        "batch_size": options.batch_size,
        "per_token": options.per_token,
        "blocks": options.blocks,
        "versions": versions(),
    }


def _text(asked: Asked, tokenizer: Any, vocabulary: int | None, talk: Talk) -> Text:
    from layersurgery.text import read_text

    with talk.step(f"Reading text: {asked.data}"):
        text = read_text(asked, tokenizer)
    most = int(text.ids[text.mask.bool()].max())
    if vocabulary is not None and most >= vocabulary:
        raise SourceError(
            f"the tokenizer gives token {most}, and the model has a vocabulary of {vocabulary}: it is another model's tokenizer"
        )
    sequences, length = text.ids.shape
    talk.say(f"{text.tokens:,} tokens in {sequences} sequences of {'' if asked.pack else 'up to '}{length}")
    for note in text.notes:
        talk.say(f"Note: {note}")
    return text


def _measure(
    run: Run, source: Source, chosen: Sequence[Variant], text: Text, tokenizer: Any, options: Options, where: tuple[str, str], talk: Talk
) -> None:  # fmt: skip
    from layersurgery.loading import load
    from layersurgery.measuring import Measurer
    from layersurgery.performing import perform

    device, dtype = where
    with talk.step(f"Loading {source.label}"), _calm():
        model, _ = load(source.directory, dtype=dtype)
        model = model.to(device)
        measurer = Measurer(model, chosen, blocks=options.blocks, compiled=options.compile)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    talk.say(f"{source.label}: {number(parameters)} parameters in {dtype} on {device}; read out by {measurer.readout.about}")
    _announce(measurer, text, options.batch_size or run.facts.get("batch_size"), talk)
    if run.begun:
        talk.say("Going on with what is measured already")
    try:
        with bar(text, talk) as on_progress, _calm():
            perform(
                run,
                measurer,
                text,
                name=source.label,
                batch_size=options.batch_size,
                per_token=options.per_token,
                tokenizer=tokenizer,
                draw=lambda frame, directory: draw_one(frame, directory, run.arguments["text"]["data"]),
                on_progress=on_progress,
            )
        if measurer.stack.compiler is not None and (why := measurer.stack.compiler.refused):
            talk.say(f"Note: {why}; blocks were run as they are")
    except (KeyboardInterrupt, SystemExit) as stop:
        complain("stopped", f"what was measured is in {run.directory}; the same command goes on with it")
        raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None


@contextmanager
def _calm() -> Iterator[None]:
    """Without other libraries' advice and bars between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _announce(measurer: Measurer, text: Text, batch_size: int | None, talk: Talk) -> None:
    length = text.ids.shape[1]
    batch = min(batch_size or measurer.suggest(length), len(text.ids))
    forecast, schedule = measurer.forecast(batch, length), measurer.schedule
    saved = f"{schedule.calls_apart:,} without sharing"
    talk.say(f"{len(measurer.routes)} edited models; {schedule.calls:,} block calls a batch, {saved}")
    talk.say(
        f"Expecting {size(forecast.total)} of memory for {batch} sequence{'s'[: batch != 1]} at once: weights {size(forecast.weights)}, streams "
        f"{size(forecast.streams)}, a block {size(forecast.block)}, readout {size(forecast.readout)}"
    )
    for plan, reason in measurer.left_out.items():
        talk.say(f"Left out: {plan}: {reason}")
