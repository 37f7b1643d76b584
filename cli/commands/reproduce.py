"""Run `layersurgery reproduce`: all experiments of the paper, on one model after another."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from layersurgery.errors import LayerSurgeryError, MeasurementError, PlanError

from ..session.inputs import read_model_info, text_request
from ..session.model_session import ModelSession, silence_libraries
from ..session.placement import choose_placement
from ..session.processes import process_group_for, run_on_model
from ..terminal.console import Console, format_bytes, format_count
from .analyze import AnalysisTask
from .estimate import flops

if TYPE_CHECKING:
    from layersurgery.checkpoints.sources import Source
    from layersurgery.runs.run_directory import Run

    from ..session.run_options import MeasureOptions

PAPER = (
    *(f"EleutherAI/pythia-{size}-deduped" for size in ("410m", "1.4b", "2.8b", "6.9b")),
    *(f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")),
    *(f"microsoft/{name}" for name in ("phi-1", "phi-1_5", "phi-2")),
)
SWEEP, STAGES, SUBJOINERS, PROBE = EXPERIMENTS = ("sweep", "stages", "subjoiners", "probe")
FIGURES = {
    SWEEP: "figures 2, 3, 13-15",
    STAGES: "figures 1, 4-8, 11, 12",
    SUBJOINERS: "figure 9",
    PROBE: "figures 10, 16",
}
_EDITS = "swap,drop,skip-attention,skip-mlp"
_MIN_SEARCHED_TOKENS = 1_000_000
_MATRIX_SIZE = 2048


@dataclass(slots=True)
class ModelPlan:
    """Experiments on one model: what is done, and what the rest costs.

    The field names are the JSON keys of `--json`.

    Attributes:
        model: the model's name, as given by the user.
        directory: directory of the model's runs.
        states: state of each experiment's run: "finished", "begun" or "".
        parameters: number of parameters.
        depth: number of blocks.
        tokens: number of tokens of text.
        weights: bytes of weights.
        flops: floating-point operations of the runs that are not finished.
        rate: floating-point operations per second of this machine, in the model's dtype.
        fault: why the model cannot be measured; empty if it can.
    """

    model: str
    directory: Path
    states: dict[str, str]
    parameters: int = 0
    depth: int = 0
    tokens: int = 0
    weights: int = 0
    flops: float = 0
    rate: float = 1
    fault: str = ""

    @property
    def left(self) -> list[str]:
        """List the experiments that are not finished."""
        return [name for name, state in self.states.items() if state != "finished"]

    @property
    def seconds(self) -> float:
        """Return the minimum time of the experiments that are not finished, in seconds."""
        return self.flops / self.rate


@dataclass(slots=True)
class _Results:
    done: list[Path] = field(default_factory=list)
    not_done: dict[str, str] = field(default_factory=dict)

    def record_failure(self, item: str, error: Exception, console: Console) -> None:
        self.not_done[item] = str(error)
        console.print(f"[bold red]Not done:[/] {escape(f'{item}: {error}')}")


def run_reproduce(models: Sequence[str], output: Path, options: MeasureOptions, console: Console) -> None:
    """Plan all experiments, print the cost, run those not done yet, draw the figures, and write the report.

    If a model or an experiment fails, the error is printed and the others continue; the exit code is then 1.
    """
    directories = _model_directories(models, output)
    value: dict[str, Any] = {"path": str(output)}
    if options.estimate:
        if os.environ.get("RANK", "0") == "0":  # with several processes, only one prints
            plan = _make_plan(directories, options, value, console)
            console.result(value, *_describe_plan(plan))
            if all(model_plan.fault for model_plan in plan):
                raise SystemExit(1)
        return
    group = process_group_for(options)
    results = _Results()
    plan = [] if group.rank else _make_plan(directories, options, value, console)
    console.print(*_describe_plan(plan))
    errors = {model_plan.model: model_plan.fault for model_plan in plan if model_plan.fault}
    for model, directory in directories.items():
        if model in errors:  # already printed with the plan
            results.not_done[model] = errors[model]
            group.broadcast(None)
            continue
        try:
            run_on_model(model, options, console, group, _make_lead(directory, console, results))
        except (LayerSurgeryError, OSError) as error:
            if group.size > 1:  # the other processes may be waiting for data
                raise
            results.record_failure(model, error, console)
    group.close()
    if group.rank == 0:
        _finish(output, value, results, console)


def _model_directories(models: Sequence[str], output: Path) -> dict[str, Path]:
    names = [name.strip() for text in models for name in text.split(",") if name.strip()]
    if not names:
        raise PlanError("--models is empty: name one or more models, comma-separated")
    directories: dict[str, Path] = {}
    for name in dict.fromkeys(names):
        directory = output / (name.rstrip("/").rpartition("/")[2] or name)
        if directory in directories.values():
            other = next(model for model, path in directories.items() if path == directory)
            raise PlanError(
                f"{other} and {name} would both be written to {directory}; reproduce them in two directories, with -o"
            )
        directories[name] = directory
    return directories


def _make_plan(
    directories: dict[str, Path], options: MeasureOptions, value: dict[str, Any], console: Console
) -> list[ModelPlan]:
    with console.status(f"Reading the configs of {len(directories)} model{'s'[: len(directories) != 1]}"):
        plan = [_plan_model(model, directory, options) for model, directory in directories.items()]
    value["plan"] = [_as_json(model_plan) for model_plan in plan]
    return plan


def _plan_model(model: str, directory: Path, options: MeasureOptions) -> ModelPlan:
    """Find the finished runs of a model, and compute the cost of the others from the config alone."""
    from layersurgery.runs.tables import read_run

    model_plan = ModelPlan(
        model, directory, {name: str((read_run(directory / name) or {}).get("state", "")) for name in EXPERIMENTS}
    )
    try:
        with silence_libraries():
            source, model_plan.depth, positions, _ = read_model_info(model, options, Console(quiet=True))
            model_plan.tokens = text_request(model, options, positions).tokens
            _add_cost(model_plan, source, positions, options)
    except PlanError:
        raise
    except (LayerSurgeryError, OSError) as error:
        model_plan.fault = str(error)
    return model_plan


def _add_cost(model_plan: ModelPlan, source: Source, positions: int | None, options: MeasureOptions) -> None:
    from transformers import AutoConfig

    from layersurgery.analyses.signal_tables import FROM_TEXT, variants_of
    from layersurgery.plans.variants import variants
    from layersurgery.sweeps.estimate import estimate

    request = text_request(model_plan.model, options, positions)
    placement = choose_placement(options, source, Console(quiet=True))
    dtype = "float32" if placement.dtype == "auto" else placement.dtype
    config = AutoConfig.from_pretrained(source.directory)
    edits = {SWEEP: variants([_EDITS], model_plan.depth), STAGES: variants_of(FROM_TEXT, model_plan.depth)}
    for name, chosen in edits.items():
        cost = estimate(
            config,
            chosen,
            tokens=request.tokens,
            context=request.context,
            dtype=dtype,
            device=placement.device,
            device_map=placement.device_map,
            max_memory=placement.max_memory,
            batch_size=options.batch_size,
            order=options.schedule,
            blocks=options.blocks,
        )
        model_plan.parameters, model_plan.weights = cost.parameters, sum(cost.weights.values())
        if name in model_plan.left:
            model_plan.flops += cost.flops
    model_plan.rate = _measure_rate(placement.device, dtype)


_RATES: dict[tuple[str, str], float] = {}


def _measure_rate(device: str, dtype: str) -> float:
    """Measure the floating-point operations per second of large matrix products."""
    import torch

    if (device, dtype) not in _RATES:
        square = torch.ones(_MATRIX_SIZE, _MATRIX_SIZE, dtype=getattr(torch, dtype), device=device)
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            float((square @ square)[0, 0])  # wait for the device
            best = min(best, time.perf_counter() - started)
        _RATES[device, dtype] = 2 * _MATRIX_SIZE**3 / best
    return _RATES[device, dtype]


def _as_json(model_plan: ModelPlan) -> dict[str, Any]:
    return {
        **dataclasses.asdict(model_plan),
        "directory": str(model_plan.directory),
        "left": model_plan.left,
        "seconds": model_plan.seconds,
    }


def _describe_plan(plan: Sequence[ModelPlan]) -> Iterator[Any]:
    measurable = [model_plan for model_plan in plan if not model_plan.fault]
    if measurable:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("model", no_wrap=True)
        for heading in ("blocks", "parameters", "tokens", "to do", "FLOP", "at least"):
            table.add_column(heading, justify="right", no_wrap=True)
        for model_plan in measurable:
            cost = (flops(model_plan.flops), _format_time(model_plan.seconds)) if model_plan.left else ("-", "-")
            left = f"{len(model_plan.left)} of {len(EXPERIMENTS)} runs"
            table.add_row(
                escape(model_plan.directory.name),
                str(model_plan.depth),
                format_count(model_plan.parameters),
                f"{model_plan.tokens:,}",
                left,
                *cost,
            )
        yield table
        seconds, operations = (
            sum(model_plan.seconds for model_plan in measurable),
            sum(model_plan.flops for model_plan in measurable),
        )
        yield (
            f"At least {_format_time(seconds)} in total: {flops(operations)} at this machine's speed for large matrix "
            "products. If interrupted, run the same command again to resume"
        )
    reasons: dict[str, list[str]] = {}
    for model_plan in plan:
        if model_plan.fault:
            reasons.setdefault(model_plan.fault.removeprefix(model_plan.model).lstrip(), []).append(model_plan.model)
    for reason, models in reasons.items():
        yield f"[bold red]Cannot be read:[/] {escape(', '.join(models))}: {escape(reason)}"


def _format_time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s"


def _make_lead(directory: Path, console: Console, results: _Results) -> Callable[[ModelSession], None]:
    def lead(session: ModelSession) -> None:
        for name, run_experiment in _experiments(session).items():
            console.print(f"\n[bold]{escape(session.source.label)}: {name}[/] ({FIGURES[name]})")
            try:
                results.done.append(run_experiment(directory / name).directory)
            except (LayerSurgeryError, OSError) as error:
                if not session.workers_idle:  # the other processes are waiting for data
                    raise
                results.record_failure(f"{session.model}, {name}", error, console)

    return lead


def _experiments(session: ModelSession) -> dict[str, Callable[[Path], Run]]:
    from layersurgery.plans.variants import variants

    from .probe import ProbeOptions, probe_in
    from .subjoiners import subjoiners_in
    from .sweep import SweepTask

    overwrite = session.options.overwrite
    # These two analyses search much text for windows, but run the model only on the windows.
    request = dataclasses.replace(session.request, tokens=max(session.request.tokens, _MIN_SEARCHED_TOKENS))
    return {
        SWEEP: lambda directory: session.run(SweepTask(variants([_EDITS], session.depth)), directory),
        STAGES: lambda directory: session.run(AnalysisTask(STAGES, session.depth), directory),
        SUBJOINERS: lambda directory: subjoiners_in(session, directory, request=request, overwrite=overwrite),
        PROBE: lambda directory: probe_in(session, directory, ProbeOptions(), request=request, overwrite=overwrite),
    }


def _finish(output: Path, value: dict[str, Any], results: _Results, console: Console) -> None:
    from layersurgery import report

    from .plot import draw_all

    if not results.done:
        raise MeasurementError("nothing could be measured, so there is nothing to report")
    figures = (
        draw_all(results.done, output / "figures") if len({directory.parent for directory in results.done}) > 1 else []
    )
    page = report([output], output / "report.html", overwrite=True)
    value |= {
        "done": [str(directory) for directory in results.done],
        "not_done": results.not_done,
        "report": str(page.path),
    }
    figures_note = f"; figures of all models together are in {output / 'figures'}" if figures else ""
    lines = [f"[bold red]Not done:[/] {escape(f'{item}: {reason}')}" for item, reason in results.not_done.items()]
    lines += [f"[yellow]Not in the report:[/] {escape(f'{path}: {reason}')}" for path, reason in page.not_shown.items()]
    lines.append(
        escape(
            f"{len(results.done)} runs are in {output}; the report is {page.path} ({format_bytes(page.bytes)})"
            f"{figures_note}"
        )
    )
    console.result(value, *lines)
    if results.not_done:
        raise SystemExit(1)
