"""Run `layersurgery reproduce`: all experiments of the paper, on one model after another."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from layersurgery.units import format_bytes, format_count, format_time

from ..terminal.console import Console, name_options
from .estimate import flops

if TYPE_CHECKING:
    from layersurgery.reports.reproduce import ModelPlan, Reproduction
    from layersurgery.runs.options import RunOptions


def run_reproduce(
    models: Sequence[str] | None,
    paper: Mapping[str, Any],
    options: RunOptions,
    estimate: bool,
    output: Path,
    overwrite: bool,
    console: Console,
) -> None:
    """Plan all experiments, print the cost, run those not done yet, and print what was done.

    If a model or an experiment fails, the error is printed and the others continue; the exit code is then 1. `paper`
    are the arguments of `PaperRequest.of`.
    """
    from layersurgery.reports.paper_experiments import PaperRequest
    from layersurgery.reports.reproduce import plan_reproduction, run_reproduction

    request = PaperRequest.of(**paper)
    names = request.models if models is None else models
    if estimate:
        if os.environ.get("RANK", "0") == "0":  # with several processes, only one prints
            plans = plan_reproduction(names, request, output, options, console)
            plan = [_as_json(plan) for plan in plans]
            value = {"path": str(output), "plan": plan, "left_out": request.left_out}
            console.result(value, *_describe_plan(plans), *_describe_left_out(request.left_out))
            if all(plan.fault for plan in plans):
                raise SystemExit(1)
        return
    results = run_reproduction(
        names,
        request,
        output,
        options,
        console,
        overwrite=overwrite,
        on_plans=lambda plans: console.print(*_describe_plan(plans)),
    )
    if results.report is not None:
        _show(output, results, console)


def _show(output: Path, results: Reproduction, console: Console) -> None:
    page = results.report
    assert page is not None
    value: dict[str, Any] = {
        "path": str(output),
        "plan": [_as_json(plan) for plan in results.plans],
        "done": [str(directory) for directory in results.done],
        "not_done": results.not_done,
        "left_out": results.left_out,
        "report": str(page.path),
    }
    note = f"; figures of all models together are in {output / 'figures'}" if results.figures else ""
    lines = [
        f"[bold red]Not done:[/] {escape(name_options(f'{item}: {reason}'))}"
        for item, reason in results.not_done.items()
    ]
    lines += [f"[yellow]Not in the report:[/] {escape(f'{path}: {reason}')}" for path, reason in page.not_shown.items()]
    lines += _describe_left_out(results.left_out)
    lines.append(
        escape(
            f"{len(results.done)} runs are in {output}; the report is {page.path} ({format_bytes(page.bytes)}){note}"
        )
    )
    console.result(value, *lines)
    if results.not_done:
        raise SystemExit(1)


def _describe_left_out(reasons: Mapping[str, str]) -> list[str]:
    return [f"[yellow]Left out:[/] {escape(f'{name}: {reason}')}" for name, reason in reasons.items()]


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
            cost = (flops(model_plan.flops), format_time(model_plan.seconds)) if model_plan.left else ("-", "-")
            left = f"{len(model_plan.left)} of {len(model_plan.states)} runs"
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
            f"At least {format_time(seconds)} in total: {flops(operations)} at this machine's speed for large matrix "
            "products. If interrupted, run the same command again to resume"
        )
    for fault in dict.fromkeys(model_plan.not_counted for model_plan in measurable if model_plan.not_counted):
        yield f"[yellow]The cost of the tasks is not counted:[/] {escape(fault)}"
    reasons: dict[str, list[str]] = {}
    for model_plan in plan:
        if model_plan.fault:
            reasons.setdefault(model_plan.fault.removeprefix(model_plan.model).lstrip(), []).append(model_plan.model)
    for reason, models in reasons.items():
        yield f"[bold red]Cannot be read:[/] {escape(', '.join(models))}: {escape(reason)}"
