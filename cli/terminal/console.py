"""Print messages to stderr, results to stdout, and errors without a traceback."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from layersurgery.errors import LayerSurgeryError, LayerSurgeryWarning, PlanError, is_out_of_memory
from layersurgery.runs.reporter import Reporter

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console as RichConsole
    from rich.console import RenderableType

# These have no effect on the results, and a command that is run again should not push for others.
_NOT_RECORDED = ("--push", "--public", "--track")
# typer has its own copy of click in new versions, and does not export this class.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_COMMAND: ContextVar[str] = ContextVar("command", default="")
_PROGRAM: ContextVar[Any] = ContextVar("program", default=None)


class Commands(TyperGroup):
    """Command group that turns the package's errors into one line and an exit code: 2 for usage, 1 for failure."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, and record them as they were given."""
        record_command(args)
        _PROGRAM.set(self)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; print its errors and set the exit code."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LayerSurgeryWarning)  # commands print the same as notes
                return super().invoke(ctx)
        except _UsageError as error:
            _add_hint(error)
            raise
        except LayerSurgeryError as error:
            print_error("error", str(error))
            ctx.exit(2 if isinstance(error, PlanError) else 1)
        except KeyboardInterrupt as stop:
            print_error("interrupted", str(stop) or "no partial output was left")
            ctx.exit(130)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            print_error(
                "error", f"memory ran out ({str(error).partition(chr(10))[0]}): use half precision (--dtype bfloat16), "
                "or --device-map auto where the command has it"
            )  # fmt: skip
            ctx.exit(1)
        except BrokenPipeError:  # the reader, such as head, has closed the pipe
            sys.stderr.close()
            ctx.exit(141)


def _add_hint(error: Any) -> None:
    """Let an error of the arguments name one option that may be meant, and say where a plan belongs."""
    if near := getattr(error, "possibilities", None):
        error.possibilities = difflib.get_close_matches(error.option_name, near, n=1, cutoff=0)
    command = None if error.ctx is None else error.ctx.command
    if command is None or not any("--plan" in parameter.opts for parameter in command.params):
        return
    from layersurgery.plans.plan import Plan

    words = shlex.split(recorded_command())
    for before, word in itertools.pairwise(words):
        if before.startswith("-") or " " not in word.strip():
            continue
        with contextlib.suppress(PlanError):
            Plan.parse(word)
            hint = f'Give the plan as --plan "{word}"'
            error.message = f"{error.message}. {hint}" if error.message else hint


def print_error(label: str, text: str) -> None:
    """Print an error to stderr as one line, `label: text`."""
    from rich.markup import escape

    text = escape(name_options(text))
    rich_console(stderr=True).print(f"[bold red]{label}:[/] {text}", highlight=False, soft_wrap=True)


def name_options(text: str) -> str:
    """Write the arguments of Python functions that a message names in backquotes as options: `max_span` as --max-span.

    Names that are not options of a command are not changed.
    """
    program = _PROGRAM.get()
    if program is None or "`" not in text:
        return text
    known = set(_options(program))

    def option(match: re.Match[str]) -> str:
        name = f"--{match[1].replace('_', '-')}"
        return name if name in known else match[0]

    return re.sub(r"`([a-z_]+)`", option, text)


def _options(command: Any) -> Iterator[str]:
    """Yield the options of a command and of the commands in it."""
    for parameter in command.params:
        yield from parameter.opts
    for inner in getattr(command, "commands", {}).values():
        yield from _options(inner)


def rich_console(*, stderr: bool = False) -> RichConsole:
    """Return a rich console for stdout or stderr."""
    from rich.console import Console as RichConsole

    return RichConsole(stderr=stderr)


class Console(Reporter):
    """Output of one command: messages on stderr, the result on stdout.

    Args:
        quiet: print errors only.
        as_json: print the result as JSON, and nothing else on stdout.
        push: the repository on the Hub that the command's result is pushed to; None for none.
        public: everybody can read a new repository.
        dry_run: say what would be measured and written instead.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        as_json: bool = False,
        push: str | None = None,
        public: bool = False,
        dry_run: bool = False,
    ) -> None:
        super().__init__()
        self.dry_run = dry_run
        self.push, self.public = push, public
        self.as_json = as_json
        self.command = recorded_command()
        self.out = rich_console()
        self.err = rich_console(stderr=True)
        self.err.quiet = quiet
        self.out.quiet = quiet and not as_json

    def log(self, text: str) -> None:
        """Print a message without markup, since paths and plans may contain brackets."""
        self.err.print(name_options(text), highlight=False, soft_wrap=True, markup=False)

    def note(self, text: str) -> None:
        """Print something that the user should know of the result."""
        self.log(f"Note: {text}")

    def skipped(self, reasons: Mapping[str, str]) -> None:
        """Print what is not measured, with the reasons."""
        for name, reason in reasons.items():
            self.log(f"Skipped: {name}: {reason}")

    def not_finite(self, batches: Mapping[str, list[int]]) -> None:
        """Print nothing: the results that are printed at the end name them."""

    def warn(self, label: str, text: str) -> None:
        """Print an error that does not end the command."""
        print_error(label, text)

    def print(self, *items: RenderableType) -> None:
        """Print messages with markup, or tables."""
        for item in items:
            self.err.print(item, highlight=False, soft_wrap=isinstance(item, str))

    def result(self, value: dict[str, Any] | list[Any], *items: RenderableType, written: Path | None = None) -> None:
        """Print the result: `value` as JSON with --json, else `items`. Push the directory that was written, if asked.

        Raises:
            PlanError: nothing was written that can be pushed.
        """
        if written is None:
            self.refuse_push("this writes no directory")
        if self.push is None or written is None:
            self.show(value, *items)
        else:
            from .pushing import push_result

            push_result(self, value, items, written)

    def refuse_push(self, reason: str) -> None:
        """Refuse --push for a reason, if there is one and a push is asked for.

        Raises:
            PlanError: there is.
        """
        if reason and self.push is not None:
            raise PlanError(f"--push {self.push}: {reason}; leave it out")

    def show(self, value: dict[str, Any] | list[Any], *items: RenderableType) -> None:
        """Print `value` as JSON with --json, else `items`."""
        if self.as_json:
            print(json.dumps(value, indent=2, ensure_ascii=False))
            return
        for item in items:
            if isinstance(item, str):
                self.out.print(item, highlight=False, soft_wrap=True)
            else:
                self.out.print(item)

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Announce a slow step: a spinner on a terminal, one line elsewhere."""
        if self.err.is_terminal and not self.err.quiet:
            with self.err.status(text):
                yield
        else:
            self.log(text)
            yield

    @contextmanager
    def byte_progress(self, total_bytes: int) -> Iterator[Callable[[int], None]]:
        """Show a progress bar of bytes written, their rate and the time left; only on a terminal.

        Yields:
            A function that advances the bar by a number of bytes.
        """
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        disabled = self.err.quiet or not self.err.is_terminal
        with Progress(*columns, console=self.err, disable=disabled, transient=True) as progress:
            task = progress.add_task("writing", total=total_bytes)
            yield lambda count: progress.advance(task, count)


class SharingConsole(Console):
    """Output of a command whose result can be pushed: as a command's parameter, it also stands for --push."""


class DryRunConsole(Console):
    """Output of a command that measures and writes: as a command's parameter, it also stands for --dry-run."""


class MeasuringConsole(SharingConsole, DryRunConsole):
    """Output of a command that measures and writes results, which can be pushed."""


def record_command(arguments: Sequence[str]) -> None:
    """Record the arguments after the program's name, without those that say where results are shared."""
    kept, is_value = [], False
    for argument in arguments:
        name = argument.partition("=")[0]
        if not is_value and name not in _NOT_RECORDED:
            kept.append(argument)
        is_value = not is_value and argument in _NOT_RECORDED and argument != "--public"
    _COMMAND.set(shlex.join(["layersurgery", *kept]))


def recorded_command() -> str:
    """Return the recorded command, quoted for a shell; empty if there is none."""
    return _COMMAND.get()
