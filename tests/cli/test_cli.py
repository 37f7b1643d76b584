"""The command line, as real processes and in this one."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from layersurgery_cli.app import app
from typer.testing import CliRunner, Result

from layersurgery import __version__
from layersurgery.plans.plan import Plan
from tests.checkpoints.test_zoo import reload
from tests.support.reference import logits_along, logits_of
from tests.support.zoo import DEPTH, tiny_model, tokens

COMMAND = [sys.executable, "-m", "layersurgery_cli"]


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def result_of(*words: object) -> Any:
    found = run(*words, "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


@pytest.mark.parametrize(
    ("words", "plan"),
    [
        (["swap", "MODEL", "--layer", 1], "swap 1 2"),
        (["swap", "MODEL", "--layer", 1, "--with", -1], "swap 1 -1"),
        (["drop", "MODEL", "--layer", 2, "--layer", 4], "drop 2 4"),
        (["drop", "MODEL", "--layers", "2:4"], "drop 2:4"),
        (["drop", "MODEL", "-l", -1], "drop -1"),
        (["move", "MODEL", "--layer", 1, "--after", 3], "move 1 after 3"),
        (["move", "MODEL", "--layer", 4, "--before", 0], "move 4 before 0"),
        (["repeat", "MODEL", "--layers", "2:4"], "repeat 2:4"),
        (["repeat", "MODEL", "--layer", 2, "--times", 3], "repeat 2 x3"),
        (["repeat", "MODEL", "--layers", "2:4", "--each"], "repeat 2:4 each"),
        (["replace", "MODEL", "--layer", 1, "--with", 4], "replace 1 4"),
        (["reverse", "MODEL", "--layers", "1:5"], "reverse 1:5"),
        (["reorder", "MODEL", "--order", "0:3 4 3 4 5"], "reorder 0:3 4 3 4 5"),
        (["edit", "MODEL", "--plan", "swap 1 2; drop 4"], "swap 1 2; drop 4"),
    ],
)
def test_each_command_writes_its_plan(llama: Path, tmp_path: Path, words: list[object], plan: str) -> None:
    given = [llama if word == "MODEL" else word for word in words]
    value = result_of(*given, "-o", tmp_path / "out")
    route = Plan.parse(plan).route(DEPTH)
    assert (value["plan"], value["route"], value["blocks"]) == (plan, str(route), len(route))
    assert (value["path"], value["depth"], value["verified"]) == (str(tmp_path / "out"), DEPTH, True)
    found = logits_of(reload(tmp_path / "out"), tokens())
    assert torch.equal(found, logits_along(tiny_model("llama"), route, tokens()))


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_skip(llama: Path, tmp_path: Path, part: str) -> None:
    value = result_of("skip", llama, "--layer", 2, "--part", part, "-o", tmp_path / "out")
    assert value["plan"] == f"skip-{part} 2"


def test_the_default_output_is_named_after_model_and_plan(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("swap", llama, "--layer", 1)
    assert found.exit_code == 0
    assert (tmp_path / "llama-swap-1-2" / "model.safetensors").is_file()
    assert "Wrote llama-swap-1-2: 6 blocks" in found.stdout
    assert 'transformers.pipeline("text-generation", model="llama-swap-1-2")' in found.stdout
    assert "swap 1 2  ->  0 2 1 3:6" in found.stderr


def test_quiet_says_nothing(llama: Path, tmp_path: Path) -> None:
    found = run("swap", llama, "--layer", 1, "-o", tmp_path / "out", "--quiet")
    assert (found.exit_code, found.output) == (0, "")


def test_a_recipe_of_several_outputs(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {llama}\noutputs:\n  swapped: swap 1 2\n  shallow: drop 2:4\n")
    value = result_of("edit", "--recipe", recipe, "-o", tmp_path / "all")
    assert [item["plan"] for item in value] == ["swap 1 2", "drop 2:4"]
    assert json.loads((tmp_path / "all" / "shallow" / "config.json").read_text())["num_hidden_layers"] == 4
    # One bad plan, and nothing is written.
    recipe.write_text("outputs:\n  fine: swap 1 2\n  bad: drop 9\n")
    found = run("edit", llama, "--recipe", recipe, "-o", tmp_path / "none")
    assert found.exit_code == 2
    assert "block 9 is out of range" in found.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("outputs: [1]", "it needs 'outputs:'"),
        ("outputs: {a: swap 1 2}\nlayers: 3", "unknown entry 'layers'"),
        ("outputs:\n  a: swap 1 2\n  a: drop 1", "two entries are named 'a'; give each its own name"),
        ("model: a\nmodel: b\noutputs: {a: swap 1 2}", "two entries are named 'model'"),
        ("outputs: {../a: swap 1 2}", "is not a plain directory name"),
        ("outputs: {a: 3}", "must be a string"),
        ("outputs: {a: swpa 1 2}", "output 'a': unknown edit 'swpa'"),
        ("outputs: {a: [", "is not YAML"),
        ("model: 3\noutputs: {a: swap 1 2}", "'model' must be a string"),
        ("outputs: {a: swap 1 2}", "no model given: name it in the command or in"),
    ],
)
def test_invalid_recipes(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    found = run("edit", "--recipe", recipe)
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["swap", "MODEL", "--layer", 9], 2, "block 9 is out of range: the model has 6 blocks, 0 to 5"),
        (["swap", "MODEL", "--layer", 3, "--with", 3], 2, "cannot be swapped with itself"),
        (["drop", "MODEL"], 2, "name at least one block"),
        (["drop", "MODEL", "--layer", "1; drop 2"], 2, "is not a list of blocks"),
        (["drop", "MODEL", "--layers", "0:6"], 2, "removes all 6 blocks"),
        (["reverse", "MODEL", "--layers", "nine"], 2, "cannot read 'nine'"),
        (["move", "MODEL", "--layer", 1], 2, "exactly one of --after and --before"),
        (["edit", "MODEL"], 2, "give exactly one of --plan and --recipe"),
        (["edit", "--plan", "swap 1 2"], 2, "no model given; name one"),
        (["edit", "MODEL", "--plan", "swpa 1 2"], 2, "did you mean 'swap'"),
        (["plan", "--plan", "swap 1 2"], 2, "give exactly one of MODEL and --depth"),
        (["skip", "MODEL", "--layer", 1, "--part", "head"], 2, "'head' is not one of"),
        (["swap", "MODEL", "--layer", "one"], 2, "integer"),
        (["swap", "nowhere/to be found", "--layer", 1], 1, "is not a Hub ID"),
        (["swap", "./missing", "--layer", 1], 1, "does not exist on this machine"),
        (["inspect", "./missing"], 1, "does not exist on this machine"),
    ],
)
def test_wrong_use(llama: Path, tmp_path: Path, words: list[object], code: int, message: str) -> None:
    found = run(*[llama if word == "MODEL" else word for word in words])
    assert found.exit_code == code, found.output
    assert message in " ".join(found.stderr.replace("│", " ").split())
    assert "Traceback" not in found.output
    assert found.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_model_that_is_nowhere_says_what_to_do(tmp_path: Path) -> None:
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([*COMMAND, "swap", "org/model", "--layer", "1"], env=env, capture_output=True, text=True)
    assert found.returncode == 1
    assert "org/model is not on this machine" in found.stderr
    assert "unset HF_HUB_OFFLINE" in found.stderr
    assert "Traceback" not in found.stderr


def test_plan_explains(llama: Path) -> None:
    value = result_of("plan", "--depth", 32, "--plan", "swap 12 13; drop 20")
    assert (value["route"], value["blocks"]) == ("0:12 13 12 14:20 21:32", 31)
    value = result_of("plan", llama, "--plan", "drop 2")
    block = sum(p.numel() for p in tiny_model("llama").model.layers[2].parameters())
    assert value["parameters"] - value["parameters_after"] == block
    assert value["nbytes"] - value["nbytes_after"] == 4 * block
    text = run("plan", llama, "--plan", "drop 2; repeat 3; skip-mlp 4").stdout
    assert "6 blocks, from 6. Removed: 2. Repeated: 3. Branch skipped: 4-mlp." in text


def test_inspect(llama: Path, tmp_path: Path) -> None:
    value = result_of("inspect", llama)
    model = tiny_model("llama")
    assert (value["depth"], value["prefix"], value["width"]) == (DEPTH, "model.layers", 32)
    assert value["parameters"] == sum(p.numel() for p in model.parameters())
    assert [group["blocks"] for group in value["groups"]] == [f"0:{DEPTH}"]
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "moe")
    text = run("inspect", tmp_path / "moe").stdout
    assert "mlp.experts.N.down_proj.weight" in text
    assert "x 4" in text


def test_inspect_fetches_headers_and_no_weights(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The hub itself cannot be reached from a test, so its two answers are played: the small files, and the headers.
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    from layersurgery.checkpoints.safetensors_header import read_header

    header = read_header(llama / "model.safetensors")
    tensors = {
        name: TensorInfo(dtype=entry.dtype, shape=list(entry.shape), data_offsets=(entry.start, entry.stop))
        for name, entry in header.tensors.items()
    }
    file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
    whole = SafetensorsRepoMetadata(
        metadata=None, sharded=False, weight_map={}, files_metadata={"model.safetensors": file}
    )
    before = result_of("inspect", llama)
    (llama / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(llama))
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *args, **kwargs: whole)
    after = result_of("inspect", "org/model")
    assert after == before | {"name": "org/model"}


def test_version_and_help() -> None:
    assert run("--version").stdout == f"layersurgery {__version__}\n"
    text = run("--help").stdout
    for command in ("swap", "drop", "move", "repeat", "replace", "reverse", "reorder", "skip", "edit", "plan", "demo"):
        assert command in text
        assert run(command, "--help").exit_code == 0


def test_shell_completion() -> None:
    env = {**os.environ, "_LAYERSURGERY_COMPLETE": "complete_bash", "COMP_WORDS": "layersurgery re", "COMP_CWORD": "1"}
    found = subprocess.run(COMMAND, env=env, capture_output=True, text=True, check=True)
    assert set(found.stdout.split()) == {"repeat", "replace", "report", "reproduce", "reverse", "reorder"}


def test_help_is_as_quick_as_a_bare_program(tmp_path: Path) -> None:
    bare = tmp_path / "bare.py"
    bare.write_text(
        "import typer\napp = typer.Typer()\n@app.command()\ndef a(x: int = 1): 'a'\n"
        "@app.command()\ndef b(x: int = 1): 'b'\napp()\n"
    )
    ratios = []
    for _ in range(5):
        times = []
        for command in ([sys.executable, str(bare), "--help"], [*COMMAND, "--help"]):
            started = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True)
            times.append(time.perf_counter() - started)
        ratios.append(times[1] / times[0])
    # 1.5 on a quiet machine, mostly the options of 44 commands; other tests run meanwhile. An import of torch is seen.
    assert statistics.median(ratios) < 2.2


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_hand(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    tiny_model("llama", intermediate_size=150_000).save_pretrained(tmp_path / "big")
    process = subprocess.Popen(
        [*COMMAND, "swap", str(tmp_path / "big"), "--layer", "1", "-o", str(tmp_path / "out"), "--no-verify"]
    )
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.partial-*")):
        assert process.poll() is None, "it was done before it could be stopped"
        assert time.monotonic() < deadline
    process.send_signal(sent)
    assert process.wait(timeout=30) == code
    assert {path.name for path in tmp_path.iterdir()} == {"big"}


def test_a_closed_pipe_is_no_error(llama: Path) -> None:
    command = f"{' '.join(COMMAND)} inspect {llama} | head -1"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert found.returncode == 0
    assert "Traceback" not in found.stderr


def test_memory_that_runs_out_is_no_traceback(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from layersurgery.runs import session_model

    def crowded(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(session_model, "load_model", crowded)
    found = run("analyze", "neurons", llama, "-o", llama.parent / "out")
    assert (found.exit_code, "memory ran out (CUDA out of memory. Tried to allocate 2 GiB): use" in found.stderr) == (
        1,
        True,
    )
    assert not (llama.parent / "out").exists()


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["prune", "MODEL"], 2, "give one of --remove"),
        (["sweep", "MODEL", "--edits", "swop"], 2, "did you mean 'swap'"),
        (["sweep", "MODEL", "--data", "nowhere.txt"], 1, "nowhere.txt does not exist"),
        (["stages", "MODEL", "--tokens", "many"], 2, "not a number of tokens"),
        (["rank", "MODEL", "--track", "notebook"], 2, "tracker 'notebook' is unknown"),
        (["heal-linear", "MODEL", "--plan", "dorp 5"], 2, "did you mean 'drop'"),
        (["edit", "MODEL", "drop 5"], 2, 'Give the plan as --plan "drop 5"'),
        (["plan", "MODEL", "drop 5"], 2, 'Give the plan as --plan "drop 5"'),
        (["sweep", "MODEL", "--contxt", "5"], 2, "(Possible options: --context)"),
    ],
)
def test_wrong_options_are_refused_before_torch_is_imported(args: list[str], code: int, says: str) -> None:
    start = "import sys; sys.modules['torch'] = None; from layersurgery_cli.__main__ import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", start, *args], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert (found.returncode, says in " ".join(found.stderr.split())) == (code, True), found.stderr
