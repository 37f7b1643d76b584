"""The files that a forge reads: workflows, issue forms and updates follow their schemas, and their commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FORGE = ROOT / ".github"
SCHEMAS = {
    "vendor.github-workflows": sorted(FORGE.glob("workflows/*.yml")),
    "vendor.github-issue-forms": [path for path in sorted(FORGE.glob("ISSUE_TEMPLATE/*.yml")) if path.stem != "config"],
    "vendor.github-issue-config": [FORGE / "ISSUE_TEMPLATE/config.yml"],
    "vendor.dependabot": [FORGE / "dependabot.yml"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_they_follow_their_schemas(schema: str) -> None:
    files = SCHEMAS[schema]
    assert files
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    result = subprocess.run(check, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_a_workflow_with_a_wrong_key_is_found(tmp_path: Path) -> None:
    (tmp_path / "ci.yml").write_text("on: push\njobs: {test: {runs: ubuntu-latest}}\n", "utf-8")
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    assert subprocess.run([*check, str(tmp_path / "ci.yml")], capture_output=True).returncode == 1


def test_workflows_run_what_ci_runs() -> None:
    """Each command of `.ci/run` is also in a workflow, so that both judge alike."""
    steps = " ".join(path.read_text("utf-8") for path in SCHEMAS["vendor.github-workflows"])
    commands = re.findall(r"^(uv run .*?)(?: --outdir .*| >.*)?$", (ROOT / ".ci/run").read_text("utf-8"), re.MULTILINE)
    assert len(commands) >= 6
    assert [command for command in commands if f"run: {command}" not in steps] == []


def test_permissions_are_named() -> None:
    """A workflow without them has all that the repository grants by default."""
    for path in SCHEMAS["vendor.github-workflows"]:
        assert "permissions" in yaml.safe_load(path.read_text("utf-8")), path.name
