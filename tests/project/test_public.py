"""Check the list of public names, and that modules that need no torch do not import it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import layersurgery as ls

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub")
# Plans, edits of files up to the reload check, schedules, and the devices and processes that the command line reads.
LIGHT = [
    *(f"plans.{name}" for name in ("edits", "plan", "route", "variants")),
    *("checkpoints.checkpoint", "checkpoints.edit_checkpoint", "checkpoints.inspection", "checkpoints.loading"),
    *(
        "checkpoints.model_card",
        "checkpoints.output_layout",
        "checkpoints.prepared_edit",
        "checkpoints.quantization",
        "checkpoints.safetensors_header",
        "checkpoints.shard_writer",
    ),
    *("checkpoints.sources", "checkpoints.tensor_index", "models.config_rewrite"),
    *("models.config_fields", "models.unsupported", "sweeps.schedule", "runtime.device_map", "runs.distributed"),
    *("runs.option_checks", "runs.dry_run", "analyses.removal_goal"),
]


def test_light_modules_import_nothing_heavy() -> None:
    modules = ["layersurgery", "layersurgery_cli.app", *(f"layersurgery.{name}" for name in LIGHT)]
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    heavy = [name for name in {HEAVY} if name in sys.modules]
    assert not heavy, f"{{module}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", [ls, ls.analyses], ids=["layersurgery", "analyses"])
def test_public_names(package: ModuleType) -> None:
    assert sorted(package.__all__) == package.__all__
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(dir(package)) == set(package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_the_project_refers_to_itself_alone() -> None:
    words = ["shared" + "/", "ARCHITECTURE" + ".md", "TRAPS" + ".md"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if name and path.suffix in (".py", ".md", ".toml", ".cff", ".yaml") and path.is_file():
            assert not [word for word in words if word in path.read_text("utf-8")], name
