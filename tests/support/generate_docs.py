"""`uv run python -m tests.support.generate_docs` writes docs/reference.md and docs/commands.md from docstrings, signatures and the commands' own help.

Nothing in these two pages is written by hand.
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

DOCS = Path(__file__).parents[2] / "docs"
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):$")
_KINDS: dict[Any, str] = {int: "N", str: "TEXT", float: "X", Path: "PATH"}
_ENTRY = re.compile(r"^([\w.*]+): (.*)$", re.DOTALL)


def reference() -> str:
    """The page on Python's names."""
    import layersurgery as ls

    names = [name for name in ls.__all__ if name not in ("analyses", "__version__")]
    whose = {name: getattr(ls, name) for name in names}
    errors = {name: value for name, value in whose.items() if isinstance(value, type) and issubclass(value, Exception)}
    classes = {name: value for name, value in whose.items() if isinstance(value, type) and name not in errors}
    functions = {name: value for name, value in whose.items() if name not in errors and name not in classes}
    analyses = {name: getattr(ls.analyses, name) for name in ls.analyses.__all__ if name not in names}
    lines = [
        "# Reference of Python's names\n",
        "Made from docstrings and signatures by `uv run python -m tests.support.generate_docs`. `import layersurgery as ls` imports no torch; what needs it does so\n"
        "when it is first asked for. What else is in the package may change without notice.\n",
    ]
    parts = (("Functions", "ls.", functions), ("Analyses", "ls.analyses.", analyses), ("Values", "ls.", classes))
    for title, prefix, group in parts:
        lines.append(f"## {title}\n")
        for name, value in sorted(group.items(), key=lambda item: item[0].lower()):
            lines += _entry(f"{prefix}{name}", value)
    lines.append("## Errors\n")
    for name, value in sorted(errors.items()):
        bases = ", ".join(base.__name__ for base in value.__bases__)
        lines += [f"### `ls.{name}`\n", f"A {bases}. {_text(inspect.getdoc(value) or '')}\n"]
    return "\n".join(lines).rstrip() + "\n"


def _entry(name: str, value: Any) -> Iterator[str]:
    """One function or class, with the methods of its own that are explained."""
    yield f"### `{name}`\n"
    yield f"```py\n{_signature(name, value)}\n```\n"
    yield from _explained(inspect.getdoc(value) or "")
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
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    parameters = [parameter for parameter in found.parameters.values() if parameter.name != "self"]
    # Annotations are written as they stand in the source; a class's constructor says no return.
    found = found.replace(parameters=parameters, return_annotation=found.return_annotation)
    text = re.sub(r"(?<=[:>] )'([^']*)'", r"\1", str(found))
    text = text.removesuffix(" -> None") if isinstance(value, type) else text
    whole = f"{name}{text}"
    if len(whole) <= 110 or not parameters:
        return whole
    inside, _, behind = text[1:].rpartition(")")
    return f"{name}(\n" + textwrap.indent(_lines(inside), "    ") + f"\n){behind}"


def _lines(inside: str) -> str:
    """Parameters, one a line: cut at commas outside brackets."""
    depth, cut = 0, ""
    for sign in inside:
        depth += (sign in "([{") - (sign in ")]}")
        cut += ",\n" if sign == "," and not depth else sign
    return "\n".join(line.strip() for line in cut.splitlines()) + ","


def _explained(doc: str) -> Iterator[str]:
    """A docstring in Markdown: text, lists of arguments, what comes of it, an example."""
    section = ""
    held: list[str] = []
    for line in [*doc.splitlines(), "Args:"]:
        if head := _SECTION.match(line):
            yield from _section(section, textwrap.dedent("\n".join(held)).strip("\n"))
            section, held = head[1], []
        else:
            held.append(line)


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
                f"- `{found[1]}`: {found[2]}" if (found := _ENTRY.match(entry)) else f"- {entry}" for entry in entries
            )
            + "\n"
        )


def _text(text: str) -> str:
    return " ".join(text.split())


def commands() -> str:
    """The page on the command line."""
    from layersurgery_cli.app import app
    from typer.main import get_command

    lines = [
        "# Reference of the command line\n",
        "Made from the commands' own help by `uv run python -m tests.support.generate_docs`. `layersurgery COMMAND --help` says the same on a terminal.\n"
        "Exit codes: 0 done, 1 failed, 2 wrong use, 130 stopped by hand.\n",
    ]
    group: Any = get_command(app)
    panels: dict[str, list[tuple[str, Any]]] = {}
    for name, command in group.commands.items():
        panels.setdefault(str(getattr(command, "rich_help_panel", None) or "Others"), []).append((name, command))
    for panel, found in panels.items():
        lines.append(f"## {panel}\n")
        for name, command in found:
            lines += _command(f"layersurgery {name}", command)
            for inner, of in sorted(getattr(command, "commands", {}).items()):
                lines += _command(f"layersurgery {name} {inner}", of)
    return "\n".join(lines).rstrip() + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    given = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    words = " ".join(str(parameter.metavar or (parameter.name or "").upper()) for parameter in given)
    yield f"### `{' '.join(f'{name} {words}'.split())}`\n"
    yield f"{_text(command.help or '')}\n"
    rows = [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
    rows = [row for row in rows if row]
    if rows and not hasattr(command, "commands"):
        yield "| | | if not given |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        what = f"`{parameter.metavar or (parameter.name or '').upper()}`"
    else:
        metavar = "" if parameter.is_flag else f" {parameter.metavar or _kind(parameter)}"
        options = ", ".join([*parameter.opts, *parameter.secondary_opts])
        what = f"`{options}{metavar}`"
        if "--help" in parameter.opts:
            return ""
    return f"| {_cell(what)} | {_cell(getattr(parameter, 'help', '') or '')} | {_cell(_default(parameter))} |"


def _kind(parameter: Any) -> str:
    """What an option that names no metavar takes. Typer keeps the annotation; older ones keep click's type."""
    if (found := getattr(parameter, "type_descriptor", None)) is not None:
        kind = found.annotation
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
        return "must be given"
    value = parameter.default
    if isinstance(value, bool):
        return "" if not value else f"`{parameter.opts[0]}`"
    return f"`{value}`" if isinstance(value, str | int | float | Path) else ""


def _cell(text: str) -> str:
    # Words in angle brackets would be taken for HTML, and vanish.
    return re.sub(r"(?<!`)\S*<\w+>\S*(?!`)", r"`\g<0>`", _text(text)).replace("|", "\\|")


PAGES = {"reference.md": reference, "commands.md": commands}

if __name__ == "__main__":
    for page, make in PAGES.items():
        if len(sys.argv) < 2 or page in sys.argv[1:]:
            (DOCS / page).write_text(make(), "utf-8")
