"""The commands: each parses, calls one function and prints. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .analysis_app import add_analyses
from .terminal.console import Commands, Console

if TYPE_CHECKING:
    from layersurgery.plans.plan import Plan

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Surgery on the layers of Hugging Face causal language models. Writes plain safetensors that any pipeline loads.",
    epilog="Blocks are numbered from 0 and ranges are half-open, as in Python. Start with: layersurgery demo",
)
_EDIT = "Edit a checkpoint"
_LOOK = "Look first"
_MEASURE = "Measure"


class Branch(StrEnum):
    """A branch of a block."""

    attention = "attention"
    mlp = "mlp"


def _version(value: bool) -> None:
    if value:
        from layersurgery.version import __version__

        typer.echo(f"layersurgery {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def _edits(build: Callable[..., Plan]) -> Callable[..., None]:
    """Make a command of a function that builds a plan: MODEL in front, and the options of writing behind."""
    # Plan is imported for type checkers only; at run time its name may stand for anything.
    own = inspect.signature(build, eval_str=True, locals={"Plan": object}).parameters
    shared = inspect.signature(_edit, eval_str=True).parameters
    rest = [parameter for name, parameter in shared.items() if name not in ("plan", "model")]

    @wraps(build)
    def command(**given: Any) -> None:
        plan = build(**{name: given.pop(name) for name in own})
        _edit(plan=plan, **given)

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (shared["model"], *own.values(), *rest)
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return app.command(rich_help_panel=_EDIT)(command)


def _edit(
    plan: Any,
    model: o.Model,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    link: o.Link = False,
    verify: o.Verify = True,
    revision: o.Revision = None,
    blocks: o.Blocks = None,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    from .commands.edit import EditOptions, edit

    edit(
        {None: plan},
        model,
        EditOptions(output, overwrite, link, verify, revision, blocks),
        Console(quiet=quiet, as_json=as_json),
    )


@_edits
def swap(
    layer: o.Layer,
    with_: Annotated[int | None, typer.Option("--with", help="The other block.", show_default="the next one")] = None,
) -> Plan:
    """Exchange two blocks."""
    from layersurgery.plans import plan

    return plan.swap(layer, with_)


@_edits
def drop(layer: o.SomeLayers = None, layers: o.Range = None) -> Plan:
    """Take blocks out."""
    return _parsed("drop", _named(layer, layers))


@_edits
def move(
    layer: o.Layer,
    after: Annotated[int | None, typer.Option("--after", help="Put it right behind this block.")] = None,
    before: Annotated[int | None, typer.Option("--before", help="Put it right in front of this block.")] = None,
) -> Plan:
    """Put a block elsewhere."""
    from layersurgery.plans import plan

    return plan.move(layer, after=after, before=before)


@_edits
def repeat(
    layer: o.SomeLayers = None,
    layers: o.Range = None,
    times: Annotated[int, typer.Option("--times", help="Passes in all.")] = 2,
) -> Plan:
    """Pass several times through a block or, as a whole, a span."""
    return _parsed("repeat", f"{_named(layer, layers)} x{times}")


@_edits
def reverse(layers: o.Layers) -> Plan:
    """Turn the order of a span around."""
    return _parsed("reverse", layers)


@_edits
def reorder(
    order: Annotated[
        str,
        typer.Option(
            "--order", help="The whole new order, as in '0:12 13 12 14:32'.", metavar="ROUTE", show_default=False
        ),
    ],
) -> Plan:
    """Write the whole order anew, with omissions and repeats."""
    return _parsed("reorder", order)


@_edits
def skip(
    part: Annotated[Branch, typer.Option("--part", "-p", help="Which branch.", show_default=False)],
    layer: o.SomeLayers = None,
    layers: o.Range = None,
) -> Plan:
    """Silence the attention or the MLP of blocks."""
    return _parsed(f"skip-{part.value}", _named(layer, layers))


@app.command(rich_help_panel=_EDIT)
def edit(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As elsewhere; a recipe may name it instead.")
    ] = None,
    plan: Annotated[
        str | None, typer.Option("--plan", help="Edits, as in 'swap 12 13; drop 20'.", metavar="TEXT")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="YAML file of named outputs and their plans.", metavar="FILE")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Directory to write; with --recipe, the one that outputs are put in.", metavar="DIR"
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    link: o.Link = False,
    verify: o.Verify = True,
    revision: o.Revision = None,
    blocks: o.Blocks = None,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Make any edits, from a plan's text or a recipe."""
    from layersurgery.plans.plan import Plan

    from .commands.edit import EditOptions
    from .commands.edit import edit as run_edit

    console = Console(quiet=quiet, as_json=as_json)
    options = EditOptions(output, overwrite, link, verify, revision, blocks)
    if (plan is None) == (recipe is None):
        raise typer.BadParameter("give either --plan or --recipe", param_hint="'--plan' / '--recipe'")
    if recipe is not None:
        from .commands.recipe import read_recipe

        named, plans = read_recipe(recipe)
        if model is None and named is None:
            raise typer.BadParameter(f"neither the command nor {recipe} names a model", param_hint="'MODEL'")
        run_edit(plans, model or named or "", options, console)
    elif model is None:
        raise typer.BadParameter("which model?", param_hint="'MODEL'")
    else:
        run_edit({None: Plan.parse(plan or "")}, model, options, console)


@app.command(rich_help_panel=_MEASURE)
def sweep(
    model: o.Model,
    edits: o.Edits = None,
    plans: o.Plans = None,
    layers: o.LayerRange = None,
    data: o.Data = None,
    split: o.Split = "train",
    column: o.Column = "text",
    tokens: o.Tokens = None,
    context: o.Context = None,
    pack: o.Pack = True,
    bos: o.Bos = False,
    shuffle: o.Shuffle = None,
    seed: o.Seed = 0,
    tokenizer: o.Tokenizer = None,
    batch_size: o.BatchSize = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    device_map: o.DeviceMap = None,
    max_memory: o.MaxMemory = None,
    offload_folder: o.OffloadFolder = None,
    schedule: o.Order = None,
    estimate: o.Estimate = False,
    compile: o.Compile = False,
    revision: o.Revision = None,
    blocks: o.BlockList = None,
    output: o.SweepOutput = None,
    overwrite: o.OverwriteResults = False,
    per_token: o.PerToken = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Measure what every edit does to a model, in one pass over the data. Stopped, it goes on where it was."""
    from .commands.sweep import run_sweep
    from .session.run_options import MeasureOptions

    given = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
    run_sweep(model, MeasureOptions(**given), Console(quiet=quiet, as_json=as_json))


@app.command(rich_help_panel=_MEASURE)
def plot(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Directories that sweep, analyze or stages wrote.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of figures.", metavar="DIR")] = Path(),
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Draw the results of several sweeps, or of several models' analyses, together."""
    from .commands.plot import run_plot

    run_plot(results, output, Console(quiet=quiet, as_json=as_json))


@app.command(rich_help_panel=_MEASURE)
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Directories of results, or of such directories, three levels down.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write, or directory to write report.html into.",
            show_default="./report.html",
            metavar="FILE",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a page that exists at the output.")] = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Make one self-contained page of results: in words, curves with values on hover, figures, tables, and how to repeat it."""
    from .commands.report import run_report

    run_report(results, output, overwrite, Console(quiet=quiet, as_json=as_json))


@app.command(rich_help_panel=_LOOK)
def plan(
    plan: Annotated[
        str, typer.Option("--plan", help="Edits, as in 'swap 12 13; drop 20'.", metavar="TEXT", show_default=False)
    ],
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Whose layers; or give --depth.")] = None,
    depth: Annotated[int | None, typer.Option("--depth", min=1, help="Blocks of the model.")] = None,
    revision: o.Revision = None,
    blocks: o.Blocks = None,
    as_json: o.Json = False,
) -> None:
    """Explain a plan, and touch nothing."""
    if (model is None) == (depth is None):
        raise typer.BadParameter("give either a MODEL or --depth", param_hint="'MODEL' / '--depth'")
    from .commands.inspect import show_plan

    show_plan(plan, model, depth, revision, blocks, Console(as_json=as_json))


@app.command("inspect", rich_help_panel=_LOOK)
def inspect_(model: o.Model, revision: o.Revision = None, blocks: o.Blocks = None, as_json: o.Json = False) -> None:
    """Show a model's anatomy, from its config and headers alone."""
    from .commands.inspect import show_anatomy

    show_anatomy(model, revision, blocks, Console(as_json=as_json))


@app.command(rich_help_panel=_LOOK)
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.", metavar="DIR")] = Path(
        "smollm2-135m-swap-12-13"
    ),
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Swap two layers of the embedded model, and compare what both models say."""
    from .commands.demo import run_demo

    run_demo(output, overwrite, Console(as_json=as_json))


add_analyses(app)


def _named(layer: list[str] | None, layers: str | None) -> str:
    words = [*(layer or []), *([layers] if layers else [])]
    if not words:
        raise typer.BadParameter(
            "name at least one block with --layer or --layers", param_hint="'--layer' / '--layers'"
        )
    return " ".join(words)


def _parsed(verb: str, rest: str) -> Plan:
    from layersurgery.plans.plan import Plan

    if set(rest) & set(";#\n"):
        raise typer.BadParameter(f"{rest!r} names no blocks; a plan of several edits goes to: layersurgery edit --plan")
    return Plan.parse(f"{verb} {rest}")
