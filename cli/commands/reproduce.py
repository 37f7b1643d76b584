"""`layersurgery reproduce`: all experiments of the paper, on one model after another."""

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
    "EleutherAI/pythia-410m-deduped", "EleutherAI/pythia-1.4b-deduped", "EleutherAI/pythia-2.8b-deduped", "EleutherAI/pythia-6.9b-deduped",
    "openai-community/gpt2", "openai-community/gpt2-medium", "openai-community/gpt2-large", "openai-community/gpt2-xl",
    "microsoft/phi-1", "microsoft/phi-1_5", "microsoft/phi-2",
)  # fmt: skip
SWEEP, STAGES, SUBJOINERS, PROBE = EXPERIMENTS = ("sweep", "stages", "subjoiners", "probe")
FIGURES = {
    SWEEP: "figures 2, 3, 13-15",
    STAGES: "figures 1, 4-8, 11, 12",
    SUBJOINERS: "figure 9",
    PROBE: "figures 10, 16",
}
_EDITS = "swap,drop,skip-attention,skip-mlp"
_LOOKED_THROUGH = 1_000_000
_SQUARE = 2048


@dataclass(slots=True)
class Part:
    """One model's share of the plan.

    Attributes:
        model: as it was named.
        directory: of its runs.
        states: of its runs, by experiment: "finished", "begun" or "".
        parameters: of the model.
        depth: its blocks.
        tokens: of its text.
        weights: bytes.
        flops: of the runs that are not finished.
        rate: multiplications that this machine does in a second in the model's precision.
        fault: why it cannot be measured; empty where it can.
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
        """Experiments that are not finished."""
        return [name for name, state in self.states.items() if state != "finished"]

    @property
    def seconds(self) -> float:
        """What is left takes at least."""
        return self.flops / self.rate


@dataclass(slots=True)
class _Outcome:
    done: list[Path] = field(default_factory=list)
    not_done: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, error: Exception, console: Console) -> None:
        self.not_done[what] = str(error)
        console.print(f"[bold red]Not done:[/] {escape(f'{what}: {error}')}")


def run_reproduce(models: Sequence[str], output: Path, options: MeasureOptions, console: Console) -> None:
    """Plan, say what it will cost, do what is not done yet, draw all models together, and write the report.

    What one model or experiment cannot be measured by is said, and the others go on; then the exit code is 1.
    """
    places = _places(models, output)
    value: dict[str, Any] = {"path": str(output)}
    if options.estimate:
        if os.environ.get("RANK", "0") == "0":  # of several processes, one says it
            plan = _plan(places, options, value, console)
            console.result(value, *_shown(plan))
            if all(part.fault for part in plan):
                raise SystemExit(1)
        return
    group = process_group_for(options)
    outcome = _Outcome()
    plan = [] if group.rank else _plan(places, options, value, console)
    console.print(*_shown(plan))
    faults = {part.model: part.fault for part in plan if part.fault}
    for model, place in places.items():
        if model in faults:  # as the plan has said
            outcome.not_done[model] = faults[model]
            group.broadcast(None)
            continue
        try:
            run_on_model(model, options, console, group, _leader(place, console, outcome))
        except (LayerSurgeryError, OSError) as error:
            if group.size > 1:  # the others may be in the middle of something
                raise
            outcome.note(model, error, console)
    group.close()
    if group.rank == 0:
        _finish(output, value, outcome, console)


def _places(models: Sequence[str], output: Path) -> dict[str, Path]:
    names = [name.strip() for given in models for name in given.split(",") if name.strip()]
    if not names:
        raise PlanError("--models is empty: name models, separated by commas")
    places: dict[str, Path] = {}
    for name in dict.fromkeys(names):
        place = output / (name.rstrip("/").rpartition("/")[2] or name)
        if place in places.values():
            other = next(model for model, there in places.items() if there == place)
            raise PlanError(
                f"{other} and {name} would both be written to {place}; reproduce them into two directories, with -o"
            )
        places[name] = place
    return places


def _plan(places: dict[str, Path], options: MeasureOptions, value: dict[str, Any], console: Console) -> list[Part]:
    with console.status(f"Looking at {len(places)} model{'s'[: len(places) != 1]}"):
        plan = [_planned(model, place, options) for model, place in places.items()]
    value["plan"] = [_as_json(part) for part in plan]
    return plan


def _planned(model: str, place: Path, options: MeasureOptions) -> Part:
    """What is there, and what the rest takes, from the config alone."""
    from layersurgery.runs.tables import read_run

    part = Part(model, place, {name: str((read_run(place / name) or {}).get("state", "")) for name in EXPERIMENTS})
    try:
        with silence_libraries():
            source, part.depth, positions, _ = read_model_info(model, options, Console(quiet=True))
            part.tokens = text_request(model, options, positions).tokens
            _cost(part, source, positions, options)
    except PlanError:
        raise
    except (LayerSurgeryError, OSError) as error:
        part.fault = str(error)
    return part


def _cost(part: Part, source: Source, positions: int | None, options: MeasureOptions) -> None:
    from transformers import AutoConfig

    from layersurgery.analyses.signal_tables import FROM_TEXT, variants_of
    from layersurgery.plans.variants import variants
    from layersurgery.sweeps.estimate import estimate

    asked = text_request(part.model, options, positions)
    place = choose_placement(options, source, Console(quiet=True))
    dtype = "float32" if place.dtype == "auto" else place.dtype
    config = AutoConfig.from_pretrained(source.directory)
    edits = {SWEEP: variants([_EDITS], part.depth), STAGES: variants_of(FROM_TEXT, part.depth)}
    for name, chosen in edits.items():
        found = estimate(
            config, chosen, tokens=asked.tokens, context=asked.context, dtype=dtype, device=place.device, device_map=place.device_map,
            max_memory=place.max_memory, batch_size=options.batch_size, order=options.schedule, blocks=options.blocks,
        )  # fmt: skip
        part.parameters, part.weights = found.parameters, sum(found.weights.values())
        if name in part.left:
            part.flops += found.flops
    part.rate = _rate(place.device, dtype)


_RATES: dict[tuple[str, str], float] = {}


def _rate(device: str, dtype: str) -> float:
    """Multiplications and additions in a second, of products of square matrices."""
    import torch

    if (device, dtype) not in _RATES:
        square = torch.ones(_SQUARE, _SQUARE, dtype=getattr(torch, dtype), device=device)
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            float((square @ square)[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - began)
        _RATES[device, dtype] = 2 * _SQUARE**3 / best
    return _RATES[device, dtype]


def _as_json(part: Part) -> dict[str, Any]:
    return {**dataclasses.asdict(part), "directory": str(part.directory), "left": part.left, "seconds": part.seconds}


def _shown(plan: Sequence[Part]) -> Iterator[Any]:
    whole = [part for part in plan if not part.fault]
    if whole:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("model", no_wrap=True)
        for heading in ("blocks", "parameters", "tokens", "to do", "FLOP", "at least"):
            table.add_column(heading, justify="right", no_wrap=True)
        for part in whole:
            cost = (flops(part.flops), _time(part.seconds)) if part.left else ("-", "-")
            left = f"{len(part.left)} of {len(EXPERIMENTS)} runs"
            table.add_row(
                escape(part.directory.name),
                str(part.depth),
                format_count(part.parameters),
                f"{part.tokens:,}",
                left,
                *cost,
            )
        yield table
        yield (
            f"At least {_time(sum(part.seconds for part in whole))} in all: {flops(sum(part.flops for part in whole))}, at the speed of products of large "
            "matrices on this machine. Stopped, the same command goes on where it was"
        )
    reasons: dict[str, list[str]] = {}
    for part in plan:
        if part.fault:
            reasons.setdefault(part.fault.removeprefix(part.model).lstrip(), []).append(part.model)
    for reason, models in reasons.items():
        yield f"[bold red]Cannot be looked at:[/] {escape(', '.join(models))}: {escape(reason)}"


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s"


def _leader(place: Path, console: Console, outcome: _Outcome) -> Callable[[ModelSession], None]:
    def lead(session: ModelSession) -> None:
        for name, carry_out in _experiments(session).items():
            console.print(f"\n[bold]{escape(session.source.label)}: {name}[/] ({FIGURES[name]})")
            try:
                outcome.done.append(carry_out(place / name).directory)
            except (LayerSurgeryError, OSError) as error:
                if not session.waited_for:  # the others are in the middle of something
                    raise
                outcome.note(f"{session.model}, {name}", error, console)

    return lead


def _experiments(session: ModelSession) -> dict[str, Callable[[Path], Run]]:
    from layersurgery.plans.variants import variants

    from .probe import ProbeOptions, probe_in
    from .subjoiners import subjoiners_in
    from .sweep import SweepTask

    anew = session.options.overwrite
    # Of what is looked through for words, little is run.
    more = dataclasses.replace(session.asked, tokens=max(session.asked.tokens, _LOOKED_THROUGH))
    return {
        SWEEP: lambda place: session.run(SweepTask(variants([_EDITS], session.depth)), place),
        STAGES: lambda place: session.run(AnalysisTask(STAGES, session.depth), place),
        SUBJOINERS: lambda place: subjoiners_in(session, place, asked=more, anew=anew),
        PROBE: lambda place: probe_in(session, place, ProbeOptions(), asked=more, anew=anew),
    }


def _finish(output: Path, value: dict[str, Any], outcome: _Outcome, console: Console) -> None:
    from layersurgery import report

    from .plot import draw_all

    if not outcome.done:
        raise MeasurementError("nothing could be measured, so there is nothing to report on")
    figures = draw_all(outcome.done, output / "figures") if len({place.parent for place in outcome.done}) > 1 else []
    made = report([output], output / "report.html", overwrite=True)
    value |= {"done": [str(place) for place in outcome.done], "not_done": outcome.not_done, "report": str(made.path)}
    together = f"; all models together in {output / 'figures'}" if figures else ""
    lines = [f"[bold red]Not done:[/] {escape(f'{what}: {why}')}" for what, why in outcome.not_done.items()]
    lines += [f"[yellow]Not in the report:[/] {escape(f'{path}: {why}')}" for path, why in made.not_shown.items()]
    lines.append(
        escape(
            f"{len(outcome.done)} runs are in {output}; the report is {made.path} ({format_bytes(made.bytes)}){together}"
        )
    )
    console.result(value, *lines)
    if outcome.not_done:
        raise SystemExit(1)
