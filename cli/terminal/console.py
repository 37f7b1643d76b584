"""What the commands say: talk on stderr, results on stdout, and errors without a traceback."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from typer.core import TyperGroup

from layersurgery.errors import LayerSurgeryError, PlanError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType

_GIVEN: ContextVar[str] = ContextVar("given", default="")


class Commands(TyperGroup):
    """The command group; turns the package's errors into a line and an exit code: 2 for usage, 1 for failure."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse them, and keep them as they were given."""
        record_command(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except LayerSurgeryError as error:
            print_error("error", str(error))
            ctx.exit(2 if isinstance(error, PlanError) else 1)
        except KeyboardInterrupt:
            print_error("stopped", "nothing half-written was left behind")
            ctx.exit(130)
        except BrokenPipeError:  # the reader, such as head, has seen enough
            sys.stderr.close()
            ctx.exit(141)


def print_error(word: str, text: str) -> None:
    """A line on stderr about what went wrong."""
    from rich.markup import escape

    rich_console(stderr=True).print(f"[bold red]{word}:[/] {escape(text)}", highlight=False, soft_wrap=True)


def rich_console(*, stderr: bool = False) -> RichConsole:
    """A rich console on one of the two streams."""
    from rich.console import Console as RichConsole

    return RichConsole(stderr=stderr)


class Console:
    """How one command speaks.

    Args:
        quiet: say nothing.
        as_json: print the result as JSON, and nothing else on stdout.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.as_json = as_json
        self.out = rich_console()
        self.err = rich_console(stderr=True)
        self.err.quiet = quiet
        self.out.quiet = quiet and not as_json

    def log(self, text: str) -> None:
        """A line of talk, printed as it is: paths and plans may hold brackets."""
        self.err.print(text, highlight=False, soft_wrap=True, markup=False)

    def print(self, *shown: RenderableType) -> None:
        """Talk with markup and tables."""
        for item in shown:
            self.err.print(item, highlight=False, soft_wrap=isinstance(item, str))

    def result(self, value: dict[str, Any] | list[Any], *shown: RenderableType) -> None:
        """The result: JSON for a program, or `shown` for a person."""
        if self.as_json:
            print(json.dumps(value, indent=2, ensure_ascii=False))
            return
        for item in shown:
            if isinstance(item, str):
                self.out.print(item, highlight=False, soft_wrap=True)
            else:
                self.out.print(item)

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """A step that takes a while: a spinner on a terminal, one line elsewhere."""
        if self.err.is_terminal and not self.err.quiet:
            with self.err.status(text):
                yield
        else:
            self.log(text)
            yield

    @contextmanager
    def byte_progress(self, total_bytes: int) -> Iterator[Callable[[int], None]]:
        """A bar of bytes moved, their rate and the time left; only on a terminal."""
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        off = self.err.quiet or not self.err.is_terminal
        with Progress(*columns, console=self.err, disable=off, transient=True) as progress:
            task = progress.add_task("writing", total=total_bytes)
            yield lambda count: progress.advance(task, count)


def format_bytes(count: int) -> str:
    """Bytes for people, in powers of ten as disks are sold."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def format_count(count: int) -> str:
    """A count of parameters for people."""
    value = float(count)
    for unit in ("", "k", "M", "B"):
        if value < 1000:
            return f"{value:.0f}" if not unit else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} T"


def record_command(words: Sequence[str]) -> None:
    """Keep the words behind the program's name."""
    _GIVEN.set(shlex.join(["layersurgery", *words]))


def recorded_command() -> str:
    """The whole command, as a shell takes it; empty where there was none."""
    return _GIVEN.get()
