"""Check that bytes are copied while the reload check runs: a refusal leaves nothing, and the files are asked first."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layersurgery_cli.app import app
from safetensors.torch import load_file
from typer.testing import CliRunner

import layersurgery as ls
from layersurgery.checkpoints import edit_checkpoint, prepared_edit, shard_writer
from layersurgery.checkpoints.checkpoint import read_checkpoint
from layersurgery.checkpoints.prepared_edit import PlannedEdit, check_edit, plan_edit
from layersurgery.checkpoints.sources import find_source
from layersurgery.plans.plan import Plan
from tests.checkpoints.test_edit import change_config, resave
from tests.checkpoints.test_faults import nothing_written
from tests.support.zoo import tiny_model

_WAIT = 30.0


def planned_edit(model: Path, plan: str, *, verify: bool = True) -> PlannedEdit:
    return plan_edit(read_checkpoint(find_source(model)), Plan.parse(plan), verify=verify)


def check_after(monkeypatch: pytest.MonkeyPatch, ready: Callable[[], object]) -> None:
    """Let the reload check wait until something has happened."""
    check = prepared_edit._check_reload

    def late(*args: Any) -> Any:
        deadline = time.monotonic() + _WAIT
        while not ready():
            assert time.monotonic() < deadline, "bytes wait for the check"
            time.sleep(0.001)
        return check(*args)

    monkeypatch.setattr(prepared_edit, "_check_reload", late)


@pytest.mark.parametrize("link", [False, True])
def test_all_bytes_of_a_swap_move_before_the_check_is_done(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: bool
) -> None:
    moved: list[int] = []
    total = planned_edit(sharded, "swap 1 2").nbytes
    check_after(monkeypatch, lambda: sum(moved) == total)
    result = ls.edit_checkpoint(sharded, "swap 1 2", tmp_path / "out", link=link, progress=moved.append)
    assert result.verified
    assert result.bytes_written + result.bytes_linked == total
    assert bool(result.bytes_linked) == link
    nothing_written(tmp_path, "sharded", "out")


def test_files_with_a_skipped_branch_wait_for_the_check(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    planned = planned_edit(sharded, "skip-mlp 3; drop 1")
    settled = planned.settled_shards
    assert 0 < len(settled) < len(planned.layout.shards)
    assert not any("layers.2." in name for shard in settled for name in shard.tensors)  # block 3, after the drop
    check_after(monkeypatch, lambda: sum(moved) == sum(shard.nbytes for shard in settled))
    ls.edit_checkpoint(sharded, "skip-mlp 3; drop 1", tmp_path / "out", progress=moved.append)
    tensors = {
        name: value for path in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(path).items()
    }
    source = {name: value for path in sharded.glob("*.safetensors") for name, value in load_file(path).items()}
    assert not tensors["model.layers.2.mlp.down_proj.weight"].any()
    assert tensors["model.layers.3.mlp.down_proj.weight"].equal(source["model.layers.4.mlp.down_proj.weight"])
    assert tensors["model.layers.2.mlp.up_proj.weight"].equal(source["model.layers.3.mlp.up_proj.weight"])


def misname(model: Path) -> None:
    """Give a tensor a name that the class does not load, which only the reload check finds."""
    resave(model, lambda tensors: {name.replace("layers.3.mlp", "layers.3.ffn"): t for name, t in tensors.items()})


def test_a_refusal_while_bytes_move_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    misname(llama)
    with pytest.raises(ls.SourceError) as alone:
        check_edit(planned_edit(llama, "drop 1"))
    moving = threading.Event()

    def crawl(count: int) -> None:
        moving.set()
        time.sleep(0.01)

    monkeypatch.setattr(shard_writer, "_KERNEL_CHUNK", 1000)
    check_after(monkeypatch, moving.is_set)
    with pytest.raises(ls.SourceError) as refused:
        ls.edit_checkpoint(llama, "drop 1", tmp_path / "new" / "deep" / "out", progress=crawl)
    assert str(refused.value) == str(alone.value)
    nothing_written(tmp_path, "llama")


def test_a_refusal_at_the_terminal_is_the_same_line_and_keeps_the_old_output(llama: Path, tmp_path: Path) -> None:
    arguments = ["drop", str(llama), "--layer", "1", "-o", str(tmp_path / "out"), "--overwrite"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    misname(llama)
    with pytest.raises(ls.SourceError) as alone:
        check_edit(planned_edit(llama, "drop 1"))
    found = CliRunner().invoke(app, arguments)
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (1, f"error: {alone.value}")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    nothing_written(tmp_path, "llama", "out")


def test_what_the_files_alone_refuse_is_refused_before_a_byte_moves(
    llama: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was written")

    monkeypatch.setattr(edit_checkpoint, "atomic_directory", fail)
    cases: list[tuple[str, dict[str, Any], type[ls.LayerSurgeryError], str]] = [
        ("swap 1 99", {}, ls.PlanError, "99"),
        ("swap 1 2; swap 1 2", {}, ls.PlanError, "nothing to write"),
        ("swap 1 2", {"mystery": [1, 2, 3, 4, 5, 6]}, ls.UnsupportedEditError, "mystery"),
        ("skip-mlp 1", {"quantization_config": {"quant_method": "gptq"}}, ls.UnsupportedEditError, "quantized"),
    ]
    for plan, fields, kind, message in cases:
        change_config(llama, **fields)
        with pytest.raises(kind, match=message):
            ls.edit_checkpoint(llama, plan, tmp_path / "out")
    nothing_written(tmp_path, "llama", "sharded")


def test_of_several_plans_none_is_written_if_the_check_refuses_one(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(checkpoint: Any, config: Any, route: ls.Route) -> Any:
        if len(route) < checkpoint.depth:
            raise ls.UnsupportedEditError("too short")
        return check(checkpoint, config, route)

    check = prepared_edit._check_reload
    monkeypatch.setattr(prepared_edit, "_check_reload", refuse)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("outputs:\n  first: swap 1 2\n  second: drop 2\n")
    arguments = ["edit", str(llama), "--recipe", str(recipe), "-o", str(tmp_path / "outputs")]
    found = CliRunner().invoke(app, arguments)
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (1, "error: too short")
    nothing_written(tmp_path, "llama", "recipe.yaml")
    recipe.write_text("outputs:\n  first: swap 1 2\n  second: swap 3 4\n")
    assert CliRunner().invoke(app, arguments).exit_code == 0
    nothing_written(tmp_path / "outputs", "first", "second")


def test_planning_an_edit_imports_neither_torch_nor_transformers(llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nimport layersurgery as ls\n"
        f"ls.edit_checkpoint({str(llama)!r}, 'swap 1 2', {str(tmp_path / 'out')!r}, link=True, verify=False)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize("refused", [False, True])
def test_a_full_disk_during_the_check(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    def fail(*_: object) -> None:
        full.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full = threading.Event()
    monkeypatch.setattr(shard_writer, "copy_bytes", fail)
    check_after(monkeypatch, full.is_set)
    if refused:
        change_config(sharded, num_attention_heads=5)
    with pytest.raises(
        ls.UnsupportedEditError if refused else ls.OutputError,
        match="cannot build|does not accept" if refused else "is full; no partial output was left",
    ):
        ls.edit_checkpoint(sharded, "swap 1 2", tmp_path / "out")
    nothing_written(tmp_path, "sharded")


def test_the_first_of_several_failures_is_told(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, failed = shard_writer.copy_bytes, threading.Event()

    def fail_once(*args: Any) -> None:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        copy(*args)

    monkeypatch.setattr(shard_writer, "copy_bytes", fail_once)
    monkeypatch.setattr(shard_writer, "_THREADS", 1)
    with pytest.raises(ls.OutputError, match="Input/output error"):
        ls.edit_checkpoint(sharded, "swap 1 2", tmp_path / "out")
    nothing_written(tmp_path, "sharded")


_CRAWL = """
import sys, time
import layersurgery as ls
def crawl(count):
    print("moving", "torch" in sys.modules, flush=True)
    time.sleep(0.05)
ls.edit_checkpoint(sys.argv[1], "swap 1 2", sys.argv[2], progress=crawl)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("wait", [0.0, 0.3])
def test_stopped_while_the_check_imports_torch(
    sharded: Path, tmp_path: Path, sent: signal.Signals, wait: float
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", _CRAWL, str(sharded), str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"moving")  # and torch takes seconds to import
    time.sleep(wait)
    process.send_signal(sent)
    process.stdout.read()
    assert process.wait() == -sent
    process.stdout.close()
    assert not out.exists()
    if sent == signal.SIGKILL:
        [partial] = tmp_path.glob(".out.partial-*")
        assert not (partial / "config.json").exists()
        ls.edit_checkpoint(sharded, "swap 1 2", out)  # removes what was left
        nothing_written(tmp_path, "sharded", "out")
    else:
        nothing_written(tmp_path, "sharded")


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_during_the_check(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    process = subprocess.Popen(
        [sys.executable, "-m", "layersurgery_cli", "swap", str(tmp_path / "model"), "--layer", "1",
         "-o", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + _WAIT
    while not list(tmp_path.glob(".out.partial-*/*.safetensors")):
        assert process.poll() is None, "it was done before it could be stopped"
        assert time.monotonic() < deadline
    process.send_signal(sent)
    _, errors = process.communicate(timeout=_WAIT)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    nothing_written(tmp_path, "model")
