"""Write docs/errors.md: every message of the errors and warnings of the package, read from its source.

A message is the first argument of a call of an error's class or of `warn`. Fields of f-strings are shown as names in
capitals where the source has a name, otherwise as three dots.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from layersurgery import errors

ROOT = Path(__file__).parents[2]
SUBJECTS = {
    "": "Files and directories of every command",
    "plans": "Plans and edits",
    "figures": "Figures",
    "models": "What a model is made of",
    "runtime": "Devices and memory",
    "metrics": "Metrics",
    "surgery": "Edits of loaded models",
    "checkpoints": "Models and checkpoints on disk",
    "sweeps": "Sweeps",
    "tasks": "Tasks and requests",
    "runs": "Text, options and directories of results",
    "analyses": "Analyses and pruning",
    "reports": "Reports",
    "cli": "The command line",
}
_MOST = 12  # texts that one call can give


class Source:
    """Hold the parsed source of the package and of the command line."""

    def __init__(self, root: Path = ROOT) -> None:
        self.modules: dict[str, list[ast.Module]] = defaultdict(list)
        self.functions: dict[str, list[ast.FunctionDef]] = defaultdict(list)
        self.constants: dict[str, ast.expr] = {}
        for path in sorted([*(root / "layersurgery").rglob("*.py"), *(root / "cli").rglob("*.py")]):
            parts = path.relative_to(root).parts
            package = "cli" if parts[0] == "cli" else parts[1] if len(parts) > 2 else ""
            module = ast.parse(path.read_text("utf-8"))
            self.modules[package].append(module)
            for node in ast.walk(module):
                if isinstance(node, ast.FunctionDef):
                    self.functions[node.name].append(node)
            for statement in module.body:
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                    if isinstance(statement.value, ast.Constant | ast.JoinedStr):
                        self.constants[statement.targets[0].id] = statement.value

    def messages(self, *names: str) -> dict[str, list[str]]:
        """Return the messages of the calls of some functions or classes, by package."""
        found: dict[str, list[str]] = {}
        for package in SUBJECTS:
            texts = {
                re.sub(r"\.{4,}", "...", " ".join(text.split()))
                for module in self.modules[package]
                for node in ast.walk(module)
                if isinstance(node, ast.Call) and node.args and _called(node) in names
                for text in self.texts(node.args[0])
            }
            # A text without words of its own is made elsewhere, or is that of another error.
            known = sorted((text for text in texts if len(re.findall(r"[a-z]{2,}", text)) > 1), key=_order)
            if known:
                found[package] = known
        return found

    def texts(self, node: ast.expr) -> Iterator[str]:
        """Yield the texts that an expression can be; other values than text are placeholders."""
        if isinstance(node, ast.Constant):
            yield str(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [list(self.texts(part)) for part in node.values]
            for place, (before, _) in enumerate(itertools.pairwise(node.values), 1):
                # A field that follows a word or another field directly is a hint or an ending, and has no name.
                follows = isinstance(before, ast.FormattedValue) or re.search(r"\w$", str(getattr(before, "value", "")))
                if follows and len(parts[place]) == 1 and parts[place][0].isupper():
                    parts[place] = ["..."]
            yield from map("".join, itertools.islice(itertools.product(*parts), _MOST))
        elif isinstance(node, ast.FormattedValue):
            yield from self.texts(node.value)
        elif isinstance(node, ast.Name) and node.id in self.constants:
            yield from self.texts(self.constants[node.id])
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and isinstance(node.left, ast.Constant):
            yield str(node.left.value)  # the ending of a plural
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            pairs = itertools.product(self.texts(node.left), self.texts(node.right))
            yield from map("".join, itertools.islice(pairs, _MOST))
        elif isinstance(node, ast.IfExp):
            yield from itertools.chain(self.texts(node.body), self.texts(node.orelse))
        elif isinstance(node, ast.Call) and len(self.functions[_called(node)]) == 1:
            for inner in ast.walk(self.functions[_called(node)][0]):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield from self.texts(inner.value)
        else:
            yield _placeholder(node)


def page() -> str:
    """Return the page about errors and warnings."""
    source = Source()
    lines = [
        "# Error messages\n",
        "This page is generated from the source by `uv run python -m tests.support.generate_docs`. It lists the\n"
        "messages of all errors and warnings of layersurgery. Capitals and three dots stand for what a message names:\n"
        "a file, a number, a layer. Each message ends with what can be done, where something can. A name in\n"
        "backquotes is an argument of a Python function; the command line writes it as its option (--max-span for\n"
        "max_span).\n\n"
        "At the terminal, an error is one line that begins with `error:`, and the exit code is 1, or 2 for wrong\n"
        "usage. In Python it is an exception; all classes are subclasses of `layersurgery.LayerSurgeryError`. An\n"
        "error without a message of this page, with a traceback, is a fault of layersurgery or of another library.\n",
    ]
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.LayerSurgeryError | errors.LayerSurgeryWarning)
    ]
    for value in classes:
        warning = issubclass(value, Warning)
        found = source.messages("warn" if warning else value.__name__)
        if not found:
            continue
        lines += [f"## {value.__name__}\n", f"{inspect.getdoc(value)}\n"]
        for package, messages in found.items():
            # The class is in the title, because titles are what a search and a link show.
            lines += [f"### {value.__name__}: {SUBJECTS[package]}\n", *map(_item, messages), ""]
    lines += ["## Wrong usage\n", "Options of a command that do not fit together. The exit code is 2.\n"]
    for messages in source.messages("BadParameter").values():
        lines += [*map(_item, messages), ""]
    return "\n".join(lines).rstrip() + "\n"


def _called(node: ast.Call) -> str:
    # Methods called `warn` (of a reporter, of logging) take something else.
    if getattr(node.func, "attr", "") == "warn":
        return ""
    return getattr(node.func, "id", "") or getattr(node.func, "attr", "")


def _placeholder(node: ast.expr) -> str:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    if name == "self":
        return "EDIT"
    return name.strip("_").upper() if len(name.strip("_")) > 2 else "..."


def _order(text: str) -> tuple[str, str]:
    """Return the key that sorts messages by their own words."""
    return re.sub(r"[^a-z ]|\.\.\.", "", text).strip(), text


def _item(text: str) -> str:
    ticks = "``" if "`" in text else "`"
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"- {ticks}{space}{text}{space}{ticks}"
