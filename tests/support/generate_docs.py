"""Generate docs/reference.md, docs/commands.md and docs/errors.md from docstrings, the commands' help and the source.

Run `uv run python -m tests.support.generate_docs`, with a page's name to generate only that page.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from tests.support import error_messages

DOCS = Path(__file__).parents[2] / "docs"
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):$")
_KINDS: dict[Any, str] = {int: "N", str: "TEXT", float: "X", Path: "PATH"}
_ENTRY = re.compile(r"^([\w.*]+): (.*)$", re.DOTALL)


def reference() -> str:
    """Return the page about the Python API."""
    import layersurgery as ls

    names = [name for name in ls.__all__ if name not in ("analyses", "tasks", "__version__")]
    values = {name: getattr(ls, name) for name in names}
    errors = {name: value for name, value in values.items() if isinstance(value, type) and issubclass(value, Exception)}
    classes = {name: value for name, value in values.items() if isinstance(value, type) and name not in errors}
    functions = {name: value for name, value in values.items() if name not in errors and name not in classes}
    analyses = {name: getattr(ls.analyses, name) for name in ls.analyses.__all__ if name not in names}
    tasks = {name: getattr(ls.tasks, name) for name in ls.tasks.__all__}
    lines = [
        "# Python reference\n",
        "This page is generated from docstrings and signatures by `uv run python -m tests.support.generate_docs`.\n"
        "`import layersurgery as ls` does not import torch; names that need torch import it when they are first used.\n"
        "Only the names on this page are public; everything else in the package may change without notice.\n",
    ]
    sections = (
        ("Functions", "ls.", functions),
        ("Analyses", "ls.analyses.", analyses),
        ("Tasks", "ls.tasks.", tasks),
        ("Values", "ls.", classes),
    )
    for title, prefix, group in sections:
        lines.append(f"## {title}\n")
        for name, value in sorted(group.items(), key=lambda item: item[0].lower()):
            lines += _entry(f"{prefix}{name}", value)
    lines.append("## Errors\n")
    for name, value in sorted(errors.items()):
        bases = ", ".join(base.__name__ for base in value.__bases__)
        lines += [f"### `ls.{name}`\n", f"A {bases}. {_text(inspect.getdoc(value) or '')}\n"]
    return "\n".join(lines).rstrip() + "\n"


def _entry(name: str, value: Any) -> Iterator[str]:
    """Yield the text about a function or a class, with the methods that have a docstring."""
    yield f"### `{name}`\n"
    yield f"```py\n{_signature(name, value)}\n```\n"
    yield from _format_docstring(inspect.getdoc(value) or "")
    if not isinstance(value, type):
        return
    for key, member in vars(value).items():
        inner = getattr(member, "fget", None) or getattr(member, "__func__", member)
        doc = inspect.getdoc(inner) if inspect.isfunction(inner) else None
        if key.startswith("_") or not doc:
            continue
        shown = key if isinstance(member, property) else _signature(key, getattr(value, key))
        yield f"**`{' '.join(shown.split())}`** {doc.partition(chr(10) * 2)[0].replace(chr(10), ' ')}\n"


def _signature(name: str, value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    # Annotations stay as they are in the source. The constructor of a class shows no return type.
    signature = signature.replace(parameters=parameters, return_annotation=signature.return_annotation)
    text = re.sub(r"(?<=[:>] )'([^']*)'", r"\1", str(signature))
    text = text.removesuffix(" -> None") if isinstance(value, type) else text
    line = f"{name}{text}"
    if len(line) <= 110 or not parameters:
        return line
    inside, _, returns = text[1:].rpartition(")")
    return f"{name}(\n" + textwrap.indent(_lines(inside), "    ") + f"\n){returns}"


def _lines(inside: str) -> str:
    """Put each parameter on its own line: split at commas outside brackets."""
    depth, text = 0, ""
    for character in inside:
        depth += (character in "([{") - (character in ")]}")
        text += ",\n" if character == "," and not depth else character
    return "\n".join(line.strip() for line in text.splitlines()) + ","


def _format_docstring(doc: str) -> Iterator[str]:
    """Yield a docstring as Markdown: text, lists of arguments, returned value, example."""
    section = ""
    lines: list[str] = []
    for line in [*doc.splitlines(), "Args:"]:
        if head := _SECTION.match(line):
            yield from _section(section, textwrap.dedent("\n".join(lines)).strip("\n"))
            section, lines = head[1], []
        else:
            lines.append(line)


def _section(name: str, text: str) -> Iterator[str]:
    if not text.strip():
        return
    if name == "":
        for paragraph in re.split(r"\n\s*\n", text):
            yield f"```py\n{paragraph}\n```\n" if paragraph.startswith(">>>") else f"{_text(paragraph)}\n"
    elif name == "Example":
        yield f"```py\n{re.sub(r'  # doctest: .*', '', text)}\n```\n"
    elif name == "Returns":
        yield f"Returns: {_text(text)}\n"
    else:
        entries = [_text(entry) for entry in re.split(r"\n(?!\s)", text)]
        if name == "Raises":
            yield "Raises:\n"
        yield (
            "\n".join(
                f"- `{match[1]}`: {match[2]}" if (match := _ENTRY.match(entry)) else f"- {entry}" for entry in entries
            )
            + "\n"
        )


def _text(text: str) -> str:
    return " ".join(text.split())


def commands() -> str:
    """Return the page about the command line."""
    from layersurgery_cli.app import app
    from typer.main import get_command

    lines = [
        "# Command line reference\n",
        "This page is generated from the commands' help by `uv run python -m tests.support.generate_docs`.\n"
        "`layersurgery COMMAND --help` prints the same in a terminal.\n"
        "Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted.\n",
    ]
    group: Any = get_command(app)
    panels: dict[str, list[tuple[str, Any]]] = {}
    for name, command in group.commands.items():
        panels.setdefault(str(getattr(command, "rich_help_panel", None) or "Others"), []).append((name, command))
    for panel, members in panels.items():
        lines.append(f"## {panel}\n")
        for name, command in members:
            lines += _command(f"layersurgery {name}", command)
            for inner, subcommand in sorted(getattr(command, "commands", {}).items()):
                lines += _command(f"layersurgery {name} {inner}", subcommand)
    return "\n".join(lines).rstrip() + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    words = " ".join(str(parameter.metavar or (parameter.name or "").upper()) for parameter in arguments)
    yield f"### `{' '.join(f'{name} {words}'.split())}`\n"
    yield f"{_text(command.help or '')}\n"
    rows = [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
    rows = [row for row in rows if row]
    if rows and not hasattr(command, "commands"):
        yield "| | | default |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        usage = f"`{parameter.metavar or (parameter.name or '').upper()}`"
    else:
        metavar = "" if parameter.is_flag else f" {parameter.metavar or _kind(parameter)}"
        options = ", ".join([*parameter.opts, *parameter.secondary_opts])
        usage = f"`{options}{metavar}`"
        if "--help" in parameter.opts:
            return ""
    text = (getattr(parameter, "help", "") or "").replace(chr(92) + "[", "[")  # escaped for the terminal
    return f"| {_cell(usage)} | {_cell(text)} | {_cell(_default(parameter))} |"


def _kind(parameter: Any) -> str:
    """Return the kind of value that an option without metavar takes.

    New versions of Typer keep the annotation; older ones keep click's type.
    """
    if (descriptor := getattr(parameter, "type_descriptor", None)) is not None:
        kind = descriptor.annotation
        return (
            "|".join(member.value for member in kind)
            if issubclass(kind, Enum)
            else _KINDS.get(kind, kind.__name__.upper())
        )
    choices = getattr(parameter.type, "choices", None)
    return "|".join(map(str, choices)) if choices else str(parameter.type.name).split()[0].upper()


def _default(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    if parameter.required:
        return "required"
    value = parameter.default
    if isinstance(value, bool):
        return "" if not value else f"`{parameter.opts[0]}`"
    return f"`{value}`" if isinstance(value, str | int | float | Path) else ""


def _cell(text: str) -> str:
    # Put words in angle brackets in backticks; Markdown would take them for HTML and hide them.
    return re.sub(r"(?<!`)\S*<\w+>\S*(?!`)", r"`\g<0>`", _text(text)).replace("|", "\\|")


PAGES = {"reference.md": reference, "commands.md": commands, "errors.md": error_messages.page}

if __name__ == "__main__":
    for page, generate in PAGES.items():
        if len(sys.argv) < 2 or page in sys.argv[1:]:
            (DOCS / page).write_text(generate(), "utf-8")
