"""Check the order of packages: a package imports only packages before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Packages of one group do not import each other. Figures get tables, so they need only plans.
ORDER = [
    {"errors", "version", "atomic_io", "library_logs", "path_names", "quick_imports", "registry", "units"},
    {"plans"},
    {"figures"},
    {"models"},
    {"runtime"},
    {"metrics", "checkpoints"},
    {"surgery"},
    {"sweeps"},
    {"tasks"},
    {"runs"},
    {"analyses"},
    {"reports"},
    {"repositories"},
]
ALLOWED = {name: set().union(*ORDER[: max(number, 1)], {name}) for number, group in enumerate(ORDER) for name in group}
COMMAND_LINE = {
    "terminal": {"terminal"},
    "commands": {"commands", "terminal"},
}


def imports(path: Path, root: Path) -> Iterator[tuple[str, ...]]:
    """Yield a file's imports from `root` as parts of their path, with lazy imports and imports for type checkers."""
    package = path.relative_to(root.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = (*base, *(node.module.split(".") if node.module else ()))
        elif isinstance(node, ast.ImportFrom):
            module = tuple((node.module or "").split("."))
        else:
            continue
        if module[:1] == (root.name,):
            yield from ((*module[1:], alias.name) for alias in node.names)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_one_way(package: str) -> None:
    root = ROOT / "layersurgery"
    files = list((root / package).rglob("*.py")) or [root / f"{package}.py"]
    for path in files:
        for target in imports(path, root):
            assert target[0] in ALLOWED[package], f"{path.relative_to(ROOT)} imports {'.'.join(target)}"


def test_every_package_has_its_place() -> None:
    there = {
        path.stem
        for path in (ROOT / "layersurgery").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert there - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize("package", sorted(COMMAND_LINE))
def test_imports_of_the_command_line_point_one_way(package: str) -> None:
    for path in (ROOT / "cli" / package).rglob("*.py"):
        for target in imports(path, ROOT / "cli"):
            assert target[0] in COMMAND_LINE[package], f"{path.relative_to(ROOT)} imports {'.'.join(target)}"


def test_the_library_does_not_import_its_command_line() -> None:
    for path in (ROOT / "layersurgery").rglob("*.py"):
        assert "layersurgery_cli" not in path.read_text("utf-8"), path


def test_the_table_of_packages_names_every_file() -> None:
    rows = dict(re.findall(r"^\| `(\w+)/` \|(.*)$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M))
    for package in sorted(set(ALLOWED) & set(rows)):
        files = {path.stem for path in (ROOT / "layersurgery" / package).glob("*.py")} - {"__init__"}
        named = re.findall(r"\w+", rows[package])
        assert files <= set(named), files - set(named)
        compound = [name for name in named if "_" in name]
        assert sorted(set(compound) - files) == []
        assert sorted(name for name in set(compound) if compound.count(name) > 1) == []
    assert set(rows) - {"cli"} == {package for package in ALLOWED if (ROOT / "layersurgery" / package).is_dir()}
