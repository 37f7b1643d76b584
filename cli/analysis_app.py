"""Define the commands `analyze`, `stages`, `rank`, `prune`, `search` and `reproduce`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from layersurgery.registry import ANALYSES, Analysis

from . import option_groups as g
from . import options as o
from .expand import expand
from .terminal.console import Console, MeasuringConsole

_ANALYZE = "Analyze"
_PRUNE = "Prune"
_RESUMES = "\n\nInterrupted runs resume when you run the same command again."
analyze = typer.Typer(
    no_args_is_help=True,
    help="Measure one signal of every layer of a model; write tables, figures and a record of the run.",
)


def _analysis_command(analysis: Analysis) -> Callable[..., None]:
    """Make the command of an analysis that has no options of its own."""
    group = {"text": g.TextRun, "windows": g.WindowsRun, "weights": g.WeightsRun}[analysis.needs]

    def command(
        model: o.Model,
        run: Any,
        output: o.AnalysisOutput = None,
        overwrite: o.OverwriteResults = False,
        *,
        console: MeasuringConsole,
    ) -> None:
        from .commands.measure import run_analysis

        run_analysis(analysis.name, model, run, output, overwrite, console)

    command.__annotations__ |= {"run": group}
    command.__doc__ = analysis.help
    return expand(command)


_NO_TASKS = dict.fromkeys(("tasks", "limit", "shots")) | {"task_path": ()}


@analyze.command("heads", help=ANALYSES["heads"].help)
@expand
def heads(
    model: o.Model,
    run: g.TextRun,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Measure only the heads of these blocks, for example 4:20.", metavar="A:B"),
    ] = None,
    estimate: o.Estimate = False,
    output: o.AnalysisOutput = None,
    overwrite: o.OverwriteResults = False,
    *,
    console: MeasuringConsole,
) -> None:
    """Measure the model with each attention head off."""
    if estimate:
        from .commands.estimate import show_estimate

        show_estimate(model, "heads", {"layers": layers}, _NO_TASKS, run, console)
        return
    from .commands.measure import run_analysis

    run_analysis("heads", model, run, output, overwrite, console, layers=layers)


@analyze.command("ablate-neurons", help=ANALYSES["ablate-neurons"].help)
@expand
def ablate_neurons(
    model: o.Model,
    run: g.TextRun,
    draws: Annotated[
        int, typer.Option("--draws", min=1, help="Number of draws of random neurons to compare with.", metavar="N")
    ] = 3,
    estimate: o.Estimate = False,
    output: o.AnalysisOutput = None,
    overwrite: o.OverwriteResults = False,
    *,
    console: MeasuringConsole,
) -> None:
    """Turn neurons of one kind off, and as many random ones."""
    if estimate:
        from layersurgery.analyses.neuron_ablation import most_edits

        from .commands.estimate import show_estimate

        why = "a block may have no neuron of a kind"
        show_estimate(model, lambda depth: most_edits(depth, draws), {}, _NO_TASKS, run, console, why)
        return
    from .commands.measure import run_analysis

    run_analysis("ablate-neurons", model, run, output, overwrite, console, draws=draws)


@analyze.command("subjoiners", help=ANALYSES["subjoiners"].help)
@expand
def subjoiners(
    model: o.Model,
    run: g.WindowsRun,
    samples: Annotated[
        int, typer.Option("--samples", min=8, help="Maximum number of windows per class.", metavar="N")
    ] = 200,
    output: o.AnalysisOutput = None,
    overwrite: o.OverwriteResults = False,
    *,
    console: MeasuringConsole,
) -> None:
    """Rank attention heads by how much they attend within words."""
    from .commands.measure import run_analysis

    run_analysis("subjoiners", model, run, output, overwrite, console, samples=samples)


@analyze.command("probe")
@expand
def probe(
    model: o.Model,
    run: g.WindowsRun,
    suffix: Annotated[
        str | None,
        typer.Option(
            "--suffix",
            help="Class: next tokens that end with this text, ignoring white space and case.",
            show_default="ing",
            metavar="TEXT",
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(
            "--regex",
            help="Class: next tokens that match this regular expression, for example '^ [A-Z]'; instead of --suffix.",
            show_default=False,
            metavar="RE",
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", min=32, help="Maximum number of windows per class; half of them are for training.", metavar="N"
        ),
    ] = 1000,
    output: o.AnalysisOutput = None,
    overwrite: o.OverwriteResults = False,
    *,
    console: MeasuringConsole,
) -> None:
    """Predict a class of next tokens (such as -ing) with linear probes on prediction and suppression neurons.

    Probes of one neuron and of several are compared with the model itself.
    """
    from .commands.measure import run_analysis

    run_analysis("probe", model, run, output, overwrite, console, suffix=suffix, regex=regex, samples=samples)


@analyze.command("wic", help=ANALYSES["wic"].help)
@expand
def wic(
    model: o.Model,
    run: g.PairsRun,
    pairs: Annotated[
        str,
        typer.Option(
            "--pairs",
            help="Pairs of sentences: a file of the public WiC data (train.data.txt, with train.gold.txt next to it), "
            "a table with the columns of SuperGLUE's WiC (.jsonl, .json, .csv, .tsv, .parquet), or the id of a Hub "
            "dataset, for example aps/super_glue:wic.",
            show_default=False,
            metavar="FILE|ID",
        ),
    ],
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", min=10, help="Number of pairs to use, chosen at random.", show_default="all", metavar="N"
        ),
    ] = None,
    output: o.AnalysisOutput = None,
    overwrite: o.OverwriteResults = False,
    *,
    console: MeasuringConsole,
) -> None:
    """Predict whether a word means the same in two sentences from the stream after each layer."""
    from .commands.measure import run_analysis

    run_analysis("wic", model, run, output, overwrite, console, pairs=pairs, samples=samples)


@expand
def rank(
    model: o.Model,
    run: g.TextRun,
    of: Annotated[
        o.Of,
        typer.Option("--of", help="Rank layers, their attentions, their MLPs, or all attentions and MLPs together."),
    ] = o.Of.blocks,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            help="Rank by how much the first metric of this task of lm-eval falls when a layer is dropped, for example "
            "task:arc_easy. Its requests are measured instead of a text.",
            show_default="by KL and two scores, on a text",
            metavar="task:NAME",
        ),
    ] = None,
    spans: Annotated[
        int | None,
        typer.Option(
            "--spans",
            min=1,
            help="Longest span, in blocks, for angular distances.",
            show_default="half of the model's blocks",
            metavar="N",
        ),
    ] = None,
    lowest: Annotated[
        int | None,
        typer.Option(
            "--lowest",
            min=1,
            help="Find only the N layers or branches with the lowest KL: measure each until it is sure whether it is "
            "one.",
            show_default="measure every layer on all text",
            metavar="N",
        ),
    ] = None,
    estimate: o.Estimate = False,
    output: o.AnalysisOutput = None,
    overwrite: o.OverwriteResults = False,
    *,
    task: g.TaskCriterion,
    console: MeasuringConsole,
) -> None:
    """Rank layers or branches by the measured cost of removing them, and by block influence and angular distance."""
    if estimate:
        from .commands.estimate import show_removals

        show_removals(model, [of.value], lambda _: (), by, asdict(task), run, console, may_stop=lowest is not None)
        return
    from .commands.measure import run_analysis

    own = {"spans": spans, "lowest": lowest, "of": of.value}
    run_analysis("rank", model, run, output, overwrite, console, by=by, task=asdict(task), **own)


@expand
def prune(
    model: o.Model,
    run: g.TextRun,
    goal: g.RemovalGoal,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="Criterion: kl removes the layers or branches whose removal changes predictions least; loss removes "
            "those whose removal raises the loss least; influence those with the lowest block influence (ShortGPT); "
            "angular removes the span with the smallest angular "
            "distance (Gromov et al.); task:NAME removes those whose removal lowers the first metric of this task of "
            "lm-eval least, for example task:arc_easy (its requests are measured instead of a text).",
            metavar="CRITERION",
        ),
    ] = "kl",
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Measure the remaining layers again after each removal.")
    ] = False,
    race: Annotated[
        bool,
        typer.Option(
            "--race/--no-race",
            help="With kl or loss: measure each layer only until it is sure whether it is among those to remove, or "
            "measure every layer on all text.",
        ),
    ] = True,
    estimate: o.Estimate = False,
    heal: o.Heal = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory to write the pruned checkpoint to.",
            show_default="./<name>-prune-<amount>-<by>",
            metavar="DIR",
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results",
            help="Directory to write the measurements to.",
            show_default="./<output>-results",
            metavar="DIR",
        ),
    ] = None,
    *,
    task: g.TaskCriterion,
    checkpoint: g.Checkpoint,
    console: MeasuringConsole,
) -> None:
    """Remove the least important layers or branches, write the pruned checkpoint and report the cost.

    Give one of --remove, --remove-branches and --budget, or --remove-attention, --remove-mlp or both. Interrupted runs
    resume when you run the same command again.
    """
    from .commands.prune import run_prune

    run_prune(
        model,
        run,
        asdict(goal),
        by,
        greedy,
        race,
        heal,
        asdict(task),
        estimate,
        output,
        results,
        **asdict(checkpoint),
        console=console,
    )


@expand
def search(
    model: o.Model,
    run: g.TextRun,
    depth: Annotated[
        int | None,
        typer.Option(
            "--depth",
            help="Number of blocks of the edited model: fewer than the model's to remove layers, more to repeat some.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[
        int | None,
        typer.Option(
            "--remove", help="Number of layers to remove; instead of --depth.", metavar="N", show_default=False
        ),
    ] = None,
    repeat: Annotated[
        int | None,
        typer.Option(
            "--repeat", help="Number of layers to add by repeats; instead of --depth.", metavar="N", show_default=False
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="What to minimize: kl, the KL from the unedited model; loss, the change in loss; or task:NAME, the "
            "fall of the first metric of this task of lm-eval, whose requests are measured instead of a text.",
            metavar="kl|loss|task:NAME",
        ),
    ] = "kl",
    beam: Annotated[
        int, typer.Option("--beam", min=1, help="Number of routes of each length to continue from.", metavar="K")
    ] = 4,
    max_span: Annotated[
        int | None,
        typer.Option(
            "--max-span",
            help="Largest number of adjacent blocks to drop or repeat at once.",
            metavar="K",
            show_default="1 to remove layers; to repeat, the number of layers to add, at most 8",
        ),
    ] = None,
    keep: o.Keep = None,
    race: Annotated[
        bool,
        typer.Option(
            "--race/--no-race",
            help="Measure each route only until it is sure whether it is in the beam, or measure every route on all "
            "text. The final routes are measured on all text.",
        ),
    ] = True,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print how many routes and block calls the search takes, and exit.")
    ] = False,
    heal: o.Heal = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory to write the edited checkpoint to.",
            show_default="none is written",
            metavar="DIR",
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results",
            help="Directory to write the measurements to.",
            show_default="./<output>-results or ./<name>-search-<depth>-<by>",
            metavar="DIR",
        ),
    ] = None,
    *,
    task: g.TaskCriterion,
    checkpoint: g.Checkpoint,
    console: MeasuringConsole,
) -> None:
    """Search which layers to remove, or which to repeat, together; write the edited checkpoint if it is wanted.

    Give one of --depth, --remove and --repeat. Interrupted runs resume when you run the same command again.
    """
    from .commands.search import run_search

    goal = {"depth": depth, "remove": remove, "repeat": repeat, "beam": beam, "max_span": max_span, "keep": keep}
    run_search(
        model, run, goal, by, race, heal, asdict(task), estimate, output, results, **asdict(checkpoint), console=console
    )


@expand
def reproduce(
    run: g.ReproduceRun,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            help="Models, comma-separated; may be repeated.",
            show_default="the sixteen models of the paper, or the eleven of v1",
            metavar="NAMES",
        ),
    ] = None,
    paper: Annotated[
        str,
        typer.Option(
            "--paper",
            help="Version of the paper: v1 (2024), or v3 (2025), which adds models, tasks, CKA, copied layers and Word "
            "in Context.",
            metavar="v1|v3",
        ),
    ] = "v3",
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="For v3: tasks of lm-eval to measure after swaps and drops, or none. Needs the extra 'tasks'.",
            show_default="lambada_openai,arc_easy,hellaswag",
            metavar="NAMES",
        ),
    ] = None,
    limit: o.Limit = None,
    task_path: o.TaskPath = None,
    wic: Annotated[
        str | None,
        typer.Option(
            "--wic",
            help="For v3: pairs of sentences for the Word-in-Context probe, as for analyze wic --pairs.",
            show_default="the probe is left out",
            metavar="FILE|ID",
        ),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", "--dry-run", help="Print the remaining runs and their cost, and exit.")
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Directory to write to: one subdirectory per model, the figures and the report.",
            metavar="DIR",
        ),
    ] = Path("reproduction"),
    overwrite: o.OverwriteResults = False,
    *,
    console: Console,
) -> None:
    """Run all experiments of the paper on each model, and write a report.

    Interrupted runs resume when you run the same command again.
    """
    from .commands.reproduce import run_reproduce

    request = {"paper": paper, "tasks": tasks, "limit": limit, "task_path": task_path or (), "wic": wic}
    run_reproduce(models, request, run, estimate, output, overwrite, console)


def add_analyses(app: typer.Typer) -> None:
    """Add the analysis and pruning commands to the program."""
    app.add_typer(analyze, name="analyze", rich_help_panel=_ANALYZE)
    own = {"ablate-neurons", "heads", "subjoiners", "probe", "wic", "rank", "stages"}
    for name, analysis in ANALYSES.items():
        if analysis.help and name not in own:
            analyze.command(name)(_analysis_command(analysis))
    stages = _analysis_command(ANALYSES["stages"])
    app.command("stages", rich_help_panel=_ANALYZE, help=ANALYSES["stages"].help + _RESUMES)(stages)
    app.command("reproduce", rich_help_panel=_ANALYZE)(reproduce)
    app.command("rank", rich_help_panel=_PRUNE)(rank)
    app.command("prune", rich_help_panel=_PRUNE)(prune)
    app.command("search", rich_help_panel=_PRUNE)(search)
