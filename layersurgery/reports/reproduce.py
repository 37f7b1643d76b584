"""Reproduce the paper: all its experiments on one model after another, figures of all models together, and a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LayerSurgeryError, MeasurementError, PlanError
from ..library_logs import quiet_libraries
from ..runs.drawing import plot
from ..runs.estimate import estimate_run
from ..runs.options import RunOptions
from ..runs.processes import process_group_for, run_on_model
from ..runs.reporter import Reporter
from ..runs.requests import ModelInfo, read_model_info, text_request
from ..runs.run_directory import saying_what_is_kept
from ..runs.tables import read_run
from ..runtime.matmul_rate import matmul_rate
from .paper_experiments import COPYING, FIGURES, OF_TASKS, V3, PaperRequest, TaskCost, give_first_token, paper_options
from .report import Report, report

if TYPE_CHECKING:
    from ..runs.session import ModelSession


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
        not_counted: why the cost of tasks is not in `flops`; empty if it is, or if none are left.
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
    not_counted: str = ""

    @property
    def left(self) -> list[str]:
        """List the experiments that are not finished."""
        return [name for name, state in self.states.items() if state != "finished"]

    @property
    def seconds(self) -> float:
        """Return the minimum time of the experiments that are not finished, in seconds."""
        return self.flops / self.rate


@dataclass(slots=True)
class Reproduction:
    """Record of a reproduction.

    Attributes:
        plans: the experiments on each model, before they ran.
        done: directories of the finished runs.
        not_done: reasons by model or run.
        left_out: why experiments of this version of the paper were not asked for, by their names.
        figures: figures of all models together; empty for a single model.
        report: the page of all runs; None if nothing ran.
    """

    plans: list[ModelPlan]
    done: list[Path] = field(default_factory=list)
    not_done: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    figures: list[Path] = field(default_factory=list)
    report: Report | None = None

    def record_failure(self, item: str, error: Exception, reporter: Reporter) -> None:
        """Record that a model or a run failed, and say so."""
        self.not_done[item] = str(error)
        reporter.warn("not done", f"{item}: {error}")


def reproduce(
    models: Sequence[str] | None = None,
    *,
    paper: str = V3,
    tasks: str | Iterable[str] | None = None,
    limit: int | None = None,
    task_path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    wic: str | os.PathLike[str] | None = None,
    directory: str | os.PathLike[str] = "reproduction",
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Reproduction:
    """Run all experiments of the paper on each model, draw figures of all models together, and write a report.

    If a model or an experiment fails, the others continue. What was interrupted resumes.

    Args:
        models: names of models; by default those of this version of the paper.
        paper: the paper's version: "v1" (2024), or "v3" (2025), which has all of v1.
        tasks: for v3: tasks of lm-eval to measure; by default those of the paper, and "none" for none.
        limit: number of documents of each task; by default all.
        task_path: directories with your own task definitions.
        wic: for v3: pairs of sentences for the Word-in-Context probe, as `ls.analyses.wic` takes them: a file or the id
            of a Hub dataset. Without them, the probe is left out.
        directory: where to write: a directory for each model, the figures and report.html.
        overwrite: discard existing results, and measure again.
        progress: called with what is measured, how much is done and how much there is in total.
        options: as `layersurgery.runs.options.RunOptions`: data, tokens, context, dtype, device and others.

    Returns:
        What was done and what was not, the figures and the report.

    Raises:
        PlanError: no model, two models that would be written to one directory, or an option of another version.
        SourceError: a directory of tasks does not exist.
        MeasurementError: nothing could be measured.

    Example:
        >>> import layersurgery as ls
        >>> ls.reproduce([])
        Traceback (most recent call last):
        ...
        layersurgery.errors.PlanError: no models: name one or more
    """
    request = PaperRequest.of(paper, tasks, limit, task_path, wic)
    names = request.models if models is None else models
    run_options = RunOptions.of(options)
    run_options.refuse(["track"], "is for single runs; reproduce does not take it")
    return run_reproduction(names, request, Path(directory), run_options, Reporter(progress), overwrite=overwrite)


def plan_reproduction(
    models: Sequence[str], request: PaperRequest, output: Path, options: RunOptions, reporter: Reporter
) -> list[ModelPlan]:
    """Find out what is done already, and what the rest costs.

    Raises:
        PlanError: no model, or two models that would be written to one directory.
    """
    directories = _directories(models, output)
    count = f"{len(directories)} model{'s'[: len(directories) != 1]}"
    with reporter.status(f"Reading the configs of {count}"), quiet_libraries():
        tasks = None if request.tasks is None else TaskCost(request.tasks, reporter)
        return [_plan_model(model, request, tasks, directory, options) for model, directory in directories.items()]


def run_reproduction(
    models: Sequence[str],
    request: PaperRequest,
    output: Path,
    options: RunOptions,
    reporter: Reporter,
    *,
    overwrite: bool = False,
    on_plans: Callable[[list[ModelPlan]], None] | None = None,
) -> Reproduction:
    """Run the experiments that are not done yet, draw the figures and write the report.

    With several processes, one leads the runs. The others return an empty result when no work is left.

    Args:
        models: names of models.
        request: the experiments.
        output: where to write.
        options: options of all runs.
        reporter: receives what is said.
        overwrite: discard existing results.
        on_plans: called with what is done and what the rest costs, before anything runs.

    Raises:
        PlanError: no model, or two models that would be written to one directory.
        MeasurementError: nothing could be measured.
    """
    directories = _directories(models, output)
    group = process_group_for(None, options)
    results = Reproduction([] if group.rank else plan_reproduction(models, request, output, options, reporter))
    results.left_out = request.left_out
    if on_plans is not None and group.rank == 0:
        on_plans(results.plans)
    results.not_done |= {plan.model: plan.fault for plan in results.plans if plan.fault}
    for model, directory in directories.items():
        if model in results.not_done:
            group.broadcast(None)  # no work for the other processes
            continue
        lead = _make_lead(request, directory, reporter, results, overwrite=overwrite)
        try:
            with saying_what_is_kept(output):
                run_on_model(model, paper_options(model, options), lead, reporter, group)
        except (LayerSurgeryError, OSError) as error:
            if group.size > 1:  # the other processes may be waiting for data
                raise
            results.record_failure(model, error, reporter)
    group.close()
    if group.rank == 0:
        _finish(output, results)
    return results


def _directories(models: Sequence[str], output: Path) -> dict[str, Path]:
    models = [models] if isinstance(models, str) else models
    names = [name.strip() for text in models for name in text.split(",") if name.strip()]
    if not names:
        raise PlanError("no models: name one or more")
    directories: dict[str, Path] = {}
    for name in dict.fromkeys(names):
        directory = output / (name.rstrip("/").rpartition("/")[2] or name)
        if directory in directories.values():
            other = next(model for model, path in directories.items() if path == directory)
            raise PlanError(
                f"{other} and {name} would both be written to {directory}; reproduce them in two directories"
            )
        directories[name] = directory
    return directories


def _make_lead(
    request: PaperRequest, directory: Path, reporter: Reporter, results: Reproduction, *, overwrite: bool
) -> Callable[[ModelSession], None]:
    def lead(session: ModelSession) -> None:
        give_first_token(session)
        for name, experiment in request.experiments.items():
            reporter.log(f"\n{session.model.label}: {name} ({FIGURES[name]})")
            try:
                results.done.append(experiment.run(session, directory / name, overwrite).directory)
            except (LayerSurgeryError, OSError) as error:
                if not session.group.workers_idle:  # the other processes are waiting for data
                    raise
                results.record_failure(f"{session.model.given}, {name}", error, reporter)

    return lead


def _finish(output: Path, results: Reproduction) -> None:
    if not results.done:
        raise MeasurementError("nothing could be measured, so there is nothing to report")
    if len({directory.parent for directory in results.done}) > 1:
        # Sweeps of one model share a legend entry, so those of other texts and edits get figures of their own.
        apart = {name: [path for path in results.done if path.name == name] for name in (COPYING, OF_TASKS)}
        together = [path for path in results.done if path.name not in apart]
        for name, directories in {"": together, **apart}.items():
            if directories:
                results.figures += plot(directories, output / "figures" / name)
    results.report = report([output], output / "report.html", overwrite=True)


def _plan_model(
    model: str, request: PaperRequest, tasks: TaskCost | None, directory: Path, options: RunOptions
) -> ModelPlan:
    """Find the finished runs of a model, and compute the cost of the others from the config alone."""
    states = {name: str((read_run(directory / name) or {}).get("state", "")) for name in request.experiments}
    plan = ModelPlan(model, directory, states)
    try:
        info = read_model_info(model, options.revision, Reporter(), trust_remote_code=options.trust_remote_code)
        plan.depth = info.depth
        plan.tokens = text_request(model, options, info.positions).tokens
        _add_cost(plan, request, tasks, info, options)
    except PlanError:
        raise
    except (LayerSurgeryError, OSError) as error:
        plan.fault = str(error)
    return plan


def _add_cost(
    plan: ModelPlan, request: PaperRequest, tasks: TaskCost | None, info: ModelInfo, options: RunOptions
) -> None:
    for name, experiment in request.experiments.items():
        if experiment.variants is None:
            continue
        cost, placement = estimate_run(plan.model, info, experiment.variants(plan.depth), options, Reporter())
        plan.parameters, plan.weights = cost.parameters, sum(cost.weights.values())
        if name in plan.left:
            plan.flops += cost.flops
    if tasks is not None and OF_TASKS in plan.left:
        of_tasks = tasks.estimate(plan.model, info, options)
        plan.not_counted = tasks.fault
        plan.flops += 0 if of_tasks is None else of_tasks.flops
    plan.rate = matmul_rate(placement.device, "float32" if placement.dtype == "auto" else placement.dtype)
