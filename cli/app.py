"""Define the commands: each parses its options, calls one function and prints.

Heavy modules are imported only when a command runs, so that help and completion stay fast.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import completion
from . import option_groups as g
from . import options as o
from .analysis_app import add_analyses
from .expand import expand, runs_alone
from .heal_app import add_healing
from .means_app import add_means
from .share_app import add_sharing
from .terminal.console import Commands, Console, MeasuringConsole, SharingConsole

if TYPE_CHECKING:
    from layersurgery.plans.plan import Plan

app = typer.Typer(
    cls=Commands,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Edit the layers of Hugging Face causal language models and measure the effect. Edited models are written as "
    "plain safetensors checkpoints that any pipeline loads.",
    epilog="Blocks are numbered from 0 and ranges are half-open, as in Python. Start with: layersurgery demo. For "
    "inner activations, wrap the edited model with nnsight or TransformerLens.",
)
_EDIT = "Edit a checkpoint"
_INSPECT = "Inspect"
_MEASURE = "Measure"


class Branch(StrEnum):
    """Branch of a block."""

    attention = "attention"
    mlp = "mlp"


def _print_version(value: bool) -> None:
    if value:
        from layersurgery.version import __version__

        typer.echo(f"layersurgery {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        from .commands.start import show_start

        show_start()


def _edit_command(build: Callable[..., Plan]) -> Callable[..., None]:
    """Make a command from a function that builds a plan.

    The command takes MODEL first, then the function's own options, then the options for writing. Of these, it has
    --source only if the function has it.
    """
    # Plan is imported for type checkers only; at run time any object serves to resolve the name.
    own = list(inspect.signature(build, eval_str=True, locals={"Plan": object}).parameters.values())
    model, *writing = inspect.signature(_write_edit, eval_str=True).parameters.values()

    def command(**values: Any) -> None:
        plan = build(**{parameter.name: values[parameter.name] for parameter in own})
        shared = values.keys() - {parameter.name for parameter in own if parameter.name != "source"}
        _write_edit(plan=plan, **{name: values[name] for name in shared})

    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in (model, *own, *(each for each in writing if each.name not in ("plan", "source")))
        ]
    )
    command.__doc__ = build.__doc__
    return app.command(build.__name__.replace("_", "-"), rich_help_panel=_EDIT)(expand(command))


def _write_edit(
    model: o.Model,
    plan: Any,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    link: o.Link = False,
    verify: o.Verify = True,
    revision: o.Revision = None,
    blocks: o.Blocks = None,
    source: o.BlockSources = None,
    gguf: o.Gguf = False,
    dry_run: o.DryRun = False,
    *,
    console: SharingConsole,
) -> None:
    from layersurgery.plans.block_sources import read_sources

    from .commands.edit import EditOptions, edit

    sources = read_sources(source or ())
    options = EditOptions(output, overwrite, link, verify, revision, blocks, sources, gguf=gguf, dry_run=dry_run)
    edit({None: plan}, model, options, console)


@_edit_command
def swap(
    layer: o.Layer,
    with_: Annotated[
        int | None, typer.Option("--with", help="Block to swap with.", show_default="the next block")
    ] = None,
) -> Plan:
    """Swap two blocks."""
    from layersurgery.plans import plan

    return plan.swap(layer, with_)


@_edit_command
def drop(layer: o.RepeatedLayers = None, layers: o.Range = None) -> Plan:
    """Remove blocks."""
    return _parse_plan("drop", _join_blocks(layer, layers))


@_edit_command
def move(
    layer: o.Layer,
    after: Annotated[int | None, typer.Option("--after", help="Move it directly after this block.")] = None,
    before: Annotated[int | None, typer.Option("--before", help="Move it directly before this block.")] = None,
) -> Plan:
    """Move a block to another position."""
    from layersurgery.plans import plan

    return plan.move(layer, after=after, before=before)


@_edit_command
def repeat(
    layer: o.RepeatedLayers = None,
    layers: o.Range = None,
    times: Annotated[int, typer.Option("--times", help="Total number of passes.")] = 2,
    each: Annotated[bool, typer.Option("--each", help="Repeat every block of the span by itself: 8 8 9 9.")] = False,
) -> Plan:
    """Run a block, or a span as a unit, several times."""
    return _parse_plan("repeat", f"{_join_blocks(layer, layers)}{' each' * each} x{times}")


@_edit_command
def insert_copy(
    layer: o.Layer,
    after: Annotated[int | None, typer.Option("--after", help="Insert it directly after this block.")] = None,
    before: Annotated[int | None, typer.Option("--before", help="Insert it directly before this block.")] = None,
) -> Plan:
    """Insert a copy of a block with zero output projections: the model computes the same, and is deeper."""
    from layersurgery.plans import plan

    return plan.insert_copy(layer, after=after, before=before)


@_edit_command
def replace(
    layer: o.Layer,
    with_: Annotated[int, typer.Option("--with", help="Block to run instead; it keeps its own place, too.")],
) -> Plan:
    """Run another block in the place of a block."""
    from layersurgery.plans import plan

    return plan.replace(layer, with_)


@_edit_command
def reverse(layers: o.Layers) -> Plan:
    """Reverse the order of a span of blocks."""
    return _parse_plan("reverse", layers)


@_edit_command
def reorder(
    order: Annotated[
        str,
        typer.Option(
            "--order",
            help="The complete new order, for example '0:12 13 12 14:32'.",
            metavar="ROUTE",
            show_default=False,
        ),
    ],
) -> Plan:
    """Set the complete order of blocks; blocks may be left out or repeated."""
    return _parse_plan("reorder", order)


@_edit_command
def skip(
    part: Annotated[Branch, typer.Option("--part", "-p", help="Branch to skip.", show_default=False)],
    layer: o.RepeatedLayers = None,
    layers: o.Range = None,
) -> Plan:
    """Skip the attention or the MLP of blocks."""
    return _parse_plan(f"skip-{part.value}", _join_blocks(layer, layers))


@_edit_command
def scale(
    by: Annotated[float, typer.Option("--by", help="Factor; 0 skips, and 1 changes nothing.", show_default=False)],
    layer: o.RepeatedLayers = None,
    layers: o.Range = None,
    part: Annotated[Branch | None, typer.Option("--part", "-p", help="Branch to scale.", show_default="both")] = None,
) -> Plan:
    """Multiply what the attention or the MLP of blocks adds to the stream, or both."""
    branch = "" if part is None else f"-{part.value}"
    return _parse_plan(f"scale{branch}", f"{_join_blocks(layer, layers)} {by!r}")


@_edit_command
def off(
    layer: o.RepeatedLayers = None,
    layers: o.Range = None,
    heads: Annotated[
        str | None, typer.Option("--heads", help="Query heads, for example '0 3' or 0:4.", metavar="NUMBERS")
    ] = None,
    neurons: Annotated[
        str | None,
        typer.Option(
            "--neurons",
            help="Neurons of the MLP, for example 0:100 or 'top 50 suppression' (by kind: prediction, suppression, "
            "partition).",
            metavar="NUMBERS|KIND",
        ),
    ] = None,
) -> Plan:
    """Turn attention heads or neurons of blocks off: their output is zero."""
    from layersurgery.errors import PlanError

    units = {"heads": heads, "neurons": neurons}
    given = [f"{name}-off {numbers} of {_join_blocks(layer, layers)}" for name, numbers in units.items() if numbers]
    if not given:
        raise PlanError("name what to turn off: --heads, --neurons, or both")
    from layersurgery.plans import plan

    return plan.Plan.parse("; ".join(given))


@_edit_command
def take(source: o.BlockSources = None, layer: o.RepeatedLayers = None, layers: o.Range = None) -> Plan:
    """Run blocks of another checkpoint in the place of those with the same numbers."""
    from layersurgery.errors import PlanError
    from layersurgery.plans.block_sources import read_sources

    if len(names := list(read_sources(source or ()))) != 1:
        raise PlanError("name the other checkpoint: --source base=MODEL; several are for edit --plan")
    return _parse_plan("take", f"{_join_blocks(layer, layers)} from {names[0]}")


@app.command(rich_help_panel=_EDIT)
@expand
def edit(
    model: o.OptionalModel = None,
    plan: o.PlanText = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="YAML file with named outputs and their plans.", metavar="FILE")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory to write to; with --recipe, the parent directory of the outputs.",
            metavar="DIR",
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    link: o.Link = False,
    verify: o.Verify = True,
    revision: o.Revision = None,
    blocks: o.Blocks = None,
    source: o.BlockSources = None,
    means: o.MeansFile = None,
    gguf: o.Gguf = False,
    dry_run: o.DryRun = False,
    *,
    console: SharingConsole,
) -> None:
    """Apply any edits, given as a plan or as a recipe file."""
    from layersurgery.plans.block_sources import read_sources
    from layersurgery.plans.plan import Plan

    from .commands.edit import EditOptions
    from .commands.edit import edit as run_edit

    sources = read_sources(source or ())
    options = EditOptions(output, overwrite, link, verify, revision, blocks, sources, means, gguf, dry_run)
    if (plan is None) == (recipe is None):
        raise typer.BadParameter("give exactly one of --plan and --recipe", param_hint="'--plan' / '--recipe'")
    if recipe is not None:
        from .commands.recipe import read_recipe

        recipe_model, plans = read_recipe(recipe)
        if model is None and recipe_model is None:
            raise typer.BadParameter(f"no model given: name it in the command or in {recipe}", param_hint="'MODEL'")
        run_edit(plans, model or recipe_model or "", options, console)
    elif model is None:
        raise typer.BadParameter("no model given; name one", param_hint="'MODEL'")
    else:
        run_edit({None: Plan.parse(plan or "")}, model, options, console)


@app.command(rich_help_panel=_MEASURE)
@expand
def sweep(
    model: o.Model,
    run: g.SweepRun,
    edits: o.Edits = None,
    plans: o.Plans = None,
    layers: o.LayerRange = None,
    max_span: o.MaxSpan = None,
    tasks: o.Tasks = None,
    requests: o.Requests = None,
    limit: o.Limit = None,
    shots: o.Shots = None,
    task_path: o.TaskPath = None,
    estimate: o.Estimate = False,
    output: o.SweepOutput = None,
    overwrite: o.OverwriteResults = False,
    *,
    console: MeasuringConsole,
) -> None:
    """Measure the effect of every edit on a model's predictions, in one pass over the text.

    Interrupted runs resume when you run the same command again.
    """
    wanted, bounds = _edits(edits, plans), {"layers": layers, "max_span": max_span}
    given = {"tasks": _tasks(tasks, requests), "limit": limit, "shots": shots, "task_path": task_path or ()}
    if estimate:
        from .commands.estimate import show_estimate

        show_estimate(model, wanted, bounds, given, run, console)
        return
    from .commands.measure import run_sweep

    run_sweep(model, wanted, bounds, given, run, output, overwrite, console)


@app.command(rich_help_panel=_MEASURE)
@expand
def compare(
    model: o.FirstModel,
    other: Annotated[
        str, typer.Argument(metavar="B", help="Another model with the same vocabulary, or a plan that edits A.")
    ],
    run: g.CompareRun,
    output: Annotated[
        Path | None,
        typer.Option(
            "--per-token",
            help="Also write every metric of every token to this file (.parquet or .csv).",
            metavar="FILE",
        ),
    ] = None,
    *,
    console: Console,
) -> None:
    """Compare the predictions of two models, or of a model with and without an edit, on the same text."""
    from .commands.compare import run_compare

    run_compare(model, other, run, output, console)


@app.command(rich_help_panel=_MEASURE)
@expand
def plot(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Result directories written by sweep, analyze, stages, rank, prune or search.",
            show_default=False,
            autocompletion=completion.results,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write the figures to.", metavar="DIR")
    ] = Path(),
    *,
    console: Console,
) -> None:
    """Plot the results of several sweeps or analyses together."""
    from .commands.plot import run_plot

    run_plot(results, output, console)


@app.command(rich_help_panel=_MEASURE)
@expand
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Result directories, or parent directories of them (searched three levels deep).",
            show_default=False,
            autocompletion=completion.results,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write, or directory to write report.html to.",
            show_default="./report.html",
            metavar="FILE",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file at the output.")] = False,
    *,
    console: Console,
) -> None:
    """Write one self-contained HTML page of results.

    It holds a summary, interactive curves, figures, tables and the commands that reproduce the runs.
    """
    from .commands.report import run_report

    run_report(results, output, overwrite, console)


@app.command(rich_help_panel=_INSPECT)
def plan(
    plan: Annotated[
        str,
        typer.Option(
            "--plan",
            help="Edits, for example 'swap 12 13; drop 20'.",
            metavar="TEXT",
            show_default=False,
            autocompletion=completion.plans,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Model whose layers the plan edits; or give --depth.",
            autocompletion=completion.models,
        ),
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", min=1, help="Number of blocks of the model.")] = None,
    revision: o.Revision = None,
    blocks: o.Blocks = None,
    as_json: o.Json = False,
) -> None:
    """Explain a plan without applying it."""
    if (model is None) == (depth is None):
        raise typer.BadParameter("give exactly one of MODEL and --depth", param_hint="'MODEL' / '--depth'")
    from .commands.inspect import show_plan

    show_plan(plan, model, depth, revision, blocks, Console(as_json=as_json))


@app.command(rich_help_panel=_INSPECT)
def doctor(as_json: o.Json = False) -> None:
    """Show what is installed and what this machine has, and check an edit and a sweep here; for bug reports.

    The exit code is 1 if something that layersurgery needs is missing or does not work.
    """
    from .commands.doctor import run_doctor

    run_doctor(Console(as_json=as_json))


@app.command("inspect", rich_help_panel=_INSPECT)
def inspect_(model: o.Model, revision: o.Revision = None, blocks: o.Blocks = None, as_json: o.Json = False) -> None:
    """Show a model's blocks and tensors, read from its config and file headers alone."""
    from .commands.inspect import show_anatomy

    show_anatomy(model, revision, blocks, Console(as_json=as_json))


@app.command(rich_help_panel=_INSPECT)
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write the edited checkpoint to.", metavar="DIR")
    ] = Path("smollm2-135m-swap-12-13"),
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Swap two layers of the bundled model and compare both models' outputs."""
    from .commands.demo import run_demo

    run_demo(output, overwrite, Console(as_json=as_json))


add_analyses(app)
add_healing(app)
add_means(app)
add_sharing(app)


def _join_blocks(layer: list[str] | None, layers: str | None) -> str:
    blocks = [*(layer or []), *([layers] if layers else [])]
    if not blocks:
        raise typer.BadParameter(
            "name at least one block with --layer or --layers", param_hint="'--layer' / '--layers'"
        )
    return " ".join(blocks)


def _edits(families: str | None, plans: Path | None) -> list[Any]:
    """Return the edits to measure, in the form that `sweep` takes.

    Raises:
        PlanError: the families or the file of plans cannot be read.
    """
    from layersurgery.errors import PlanError
    from layersurgery.plans.variants import parse_edits, read_plans

    if families is not None and runs_alone():
        parse_edits(families)  # a wrong name is refused before torch is imported
    if plans is None:
        return ["swap,drop" if families is None else families]
    try:
        text = plans.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the plans in {plans}: {error}") from error
    by_name = read_plans(text, str(plans))
    return [families, by_name] if families else [by_name]


def _tasks(names: str | None, files: list[Path] | None) -> list[Any] | None:
    """Return the tasks to measure, in the form that `sweep` takes; None for none."""
    if not files:
        return None if names is None else names.split(",")
    from layersurgery.tasks.own_requests import requests

    return [*([] if names is None else names.split(",")), *map(requests, files)]


def _parse_plan(verb: str, arguments: str) -> Plan:
    from layersurgery.plans.plan import Plan

    if set(arguments) & set(";#\n"):
        raise typer.BadParameter(
            f"{arguments!r} is not a list of blocks; for a plan of several edits, use layersurgery edit --plan"
        )
    return Plan.parse(f"{verb} {arguments}")
