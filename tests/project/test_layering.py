"""The house's own rules: imports point one way, light things stay light, public names are listed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import layersurgery as ls

ROOT = Path(__file__).parents[2]
# A file may import from its own level and from those before it.
LEVELS = [
    "errors version route edits plan families trie placing",
    "header layerwise quantisation refusals transfer cpu witness compiled blocks residence position remains views silent branches parts dissection inputs stack products readout attending gains projections activations contributions changes",
    "weights sources atomic layout shards card twin naming silence checkpoint inspection surgery folding reload saving loading kernels/reference kernels/chunked kernels/fused kernels/streaming kernels/moments metrics",
    "comparison forecasting estimating walking observing reading measuring table sweeping text journal pertoken runs team performing",
    "analyses/signals analyses/vocabulary analyses/staging analyses/questions analyses/ranking analyses/pruning analyses/words analyses/joining analyses/endings analyses/effects analyses/fitting analyses/probing analyses/together analyses/keeping",
    "drawing pruning_figures joining_figures probe_figures figures signal_figures page/visible page/collecting page/curves page/tabular page/pictures page/repeating page/markup page/composing page/writing",
]
NO_TORCH = [
    "errors",
    "route",
    "edits",
    "plan",
    "families",
    "trie",
    "placing",
    "team",
    "header",
    "layerwise",
    "quantisation",
    "refusals",
    "transfer",
    "weights",
    "sources",
    "atomic",
    "layout",
    "shards",
    "card",
    "checkpoint",
    "inspection",
    "loading",
]


def imports_of(path: Path) -> set[str]:
    found = set()
    inside = path.parent.name if path.parent.name in ("kernels", "analyses", "page") else ""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            module = f"{inside}/{node.module}" if inside and node.level == 1 else node.module.replace(".", "/")
            found |= {f"{module}/{alias.name}" for alias in node.names} if module in ("kernels", "analyses") else {module}
    return found


def test_every_file_has_a_level() -> None:
    package = ROOT / "layersurgery"
    files = {str(path.relative_to(package).with_suffix("")) for path in package.rglob("*.py") if path.stem != "__init__"}
    assert files == {name for level in LEVELS for name in level.split()}


def test_imports_point_one_way() -> None:
    level_of = {name: number for number, level in enumerate(LEVELS) for name in level.split()}
    for name, number in level_of.items():
        for imported in imports_of(ROOT / "layersurgery" / f"{name}.py"):
            assert level_of[imported] <= number, f"{name} imports {imported}, which is above it"


def test_the_package_does_not_know_its_command_line() -> None:
    for path in (ROOT / "layersurgery").glob("*.py"):
        assert "layersurgery_cli" not in path.read_text()


@pytest.mark.parametrize("module", ["layersurgery", "layersurgery_cli.app", *(f"layersurgery.{name}" for name in NO_TORCH)])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'numpy', 'huggingface_hub') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_public_names() -> None:
    assert sorted(ls.__all__) == ls.__all__
    for name in ls.__all__:
        assert getattr(ls, name) is not None
    assert set(dir(ls)) == set(ls.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ls.nonsense  # noqa: B018


def test_the_project_speaks_of_itself_alone() -> None:
    words = ["shared" + "/", "ARCHITECTURE" + ".md", "TRAPS" + ".md"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if name and path.suffix in (".py", ".md", ".toml", ".cff", ".yaml") and path.is_file():
            assert not [word for word in words if word in path.read_text()], name
