"""Turn a function into a command: its groups of options, and its console, become options of the terminal."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Annotated, Any, get_args, get_origin

import typer

from layersurgery.runs.options import RunOptions

from .options import DryMeasurement, Json, Public, PushTo, Quiet
from .terminal.console import Console, DryRunConsole, SharingConsole


@dataclass(frozen=True, slots=True)
class Group:
    """Options of a command that stand for one parameter.

    Attributes:
        options: what the terminal shows of each, by name.
        defaults: other defaults than those of `kind`.
        kind: the dataclass that holds the options.
    """

    options: dict[str, Any]
    defaults: dict[str, Any]
    kind: type[Any] = RunOptions

    def parameters(self) -> list[inspect.Parameter]:
        """Return the options as parameters of a command."""
        known = {field.name: field.default for field in fields(self.kind)} | self.defaults
        return [_parameter(name, shown, known[name]) for name, shown in self.options.items()]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def expand(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a function into a command: each group of options, and the console, becomes the options that it stands for.

    A parameter `console: Console` stands for --quiet and --json; `SharingConsole` for --push and --public, too,
    `DryRunConsole` for --dry-run, and `MeasuringConsole` for all of them.
    """
    signature = inspect.signature(function, eval_str=True)
    own: list[inspect.Parameter] = []
    of_run: list[inspect.Parameter] = []  # shown behind the command's own
    of_console: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        annotation = parameter.annotation
        if _is_console(annotation):
            if issubclass(annotation, DryRunConsole):
                of_console.append(_parameter("dry_run", DryMeasurement, False))
            if issubclass(annotation, SharingConsole):
                of_console += [_parameter("push", PushTo, None), _parameter("public", Public, False)]
            of_console += [_parameter("quiet", Quiet, False), _parameter("as_json", Json, False)]
        elif (group := _group_of(annotation)) is not None:
            (of_run if group.kind is RunOptions else own).extend(group.parameters())
        else:
            own.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    expanded = [*own, *of_run, *of_console]

    @wraps(function)
    def command(**values: Any) -> None:
        # These import what --help does not need.
        from rich.markup import escape

        from layersurgery.runs.dry_run import DryRun
        from layersurgery.runs.option_checks import check_options

        from .terminal.progress import RunConsole

        arguments: dict[str, Any] = {}
        for name, parameter in signature.parameters.items():
            group = _group_of(parameter.annotation)
            if _is_console(parameter.annotation):
                push = _checked_push(values.get("push"), values.get("public", False))
                given = {key: values[key] for key in ("quiet", "as_json", "public", "dry_run") if key in values}
                arguments[name] = RunConsole(push=push, **given)
            elif group is not None:
                arguments[name] = group.kind(**{option: values[option] for option in group.options})
                if group.kind is RunOptions and runs_alone():
                    check_options(arguments[name])
            else:
                arguments[name] = values[name]
        try:
            function(**arguments)
        except DryRun as planned:
            if os.environ.get("RANK", "0") == "0":  # of several processes, one prints
                facts = {"model": planned.model, "path": str(planned.output), "state": planned.state}
                arguments["console"].show({"dry_run": True, **facts, "text": planned.text}, escape(str(planned)))

    command.__signature__ = inspect.Signature(expanded)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in expanded}
    return command


def _checked_push(repo: str | None, public: bool) -> str | None:
    """Refuse a push that cannot succeed before the command's work begins; return where to push to.

    Raises:
        PlanError: --public without --push, or not the name of a repository.
        OutputError: no token can write, or the Hub cannot be reached.
    """
    if repo is not None and os.environ.get("RANK", "0") == "0":  # of several processes, one pushes
        from layersurgery.repositories.hub_errors import check_push

        check_push(repo)
    elif repo is None and public:
        raise typer.BadParameter("it says who can read what --push uploads; give --push, too", param_hint="'--public'")
    return repo


def runs_alone() -> bool:
    """Return whether this is the only process of the command.

    Of several, only the leading one needs the text, and says what is wrong once all have found each other.
    """
    return os.environ.get("WORLD_SIZE", "1") == "1"


def _is_console(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Console)


def _group_of(annotation: Any) -> Group | None:
    """Return the group of options that an annotation names, or None."""
    if get_origin(annotation) is Annotated:
        return next((item for item in get_args(annotation) if isinstance(item, Group)), None)
    return None
