"""`layersurgery heal-linear`, `heal` and `--heal`, as a person at a terminal uses them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import layersurgery as ls
from tests.checkpoints.test_zoo import reload
from tests.cli.test_cli import COMMAND, result_of, run
from tests.support.reference import logits_of
from tests.support.tiny_checkpoint import checkpoint
from tests.support.zoo import DEPTH, tokens


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heal")
    checkpoint(path / "tiny", "llama")
    (path / "story.txt").write_text("".join(f"Once upon a time there were {number} layers.\n" for number in range(99)))
    return path


def text(place: Path, tokens: int = 640) -> list[object]:
    return ["--data", place / "story.txt", "--tokens", tokens, "--context", 20]


def test_a_cut_is_healed_and_then_trained(place: Path, tmp_path: Path) -> None:
    linear = result_of("heal-linear", place / "tiny", "--plan", "drop 2", *text(place), "-o", tmp_path / "linear")
    assert [row["model"] for row in linear["healing"]] == ["unedited", "edited", "healed"]
    assert linear["cuts"][0]["block"] == 1
    assert linear["blocks"] == DEPTH - 1
    trained = result_of(
        "heal", tmp_path / "linear", "--teacher", place / "tiny", *text(place), "--steps", 2, "--batch-size", 2,
        "-o", tmp_path / "trained",
    )  # fmt: skip
    assert [row["step"] for row in trained["steps"]] == [0, 1, 2]
    model = reload(tmp_path / "trained")
    assert model.config.num_hidden_layers == DEPTH - 1
    assert not torch.equal(logits_of(model, tokens()), logits_of(reload(tmp_path / "linear"), tokens()))
    card = (tmp_path / "trained" / "README.md").read_text()
    assert "healed by training" in card
    assert "Before the training" in card
    assert "story.txt" in card
    assert str(place) not in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("heal-linear", "--plan", "swap 1 2"), 1, "each block that stays must run once and in order"),
        (("heal-linear", "--plan", "drop 9"), 2, "block 9 is out of range"),
        (("heal-linear",), 2, "Missing option '--plan'"),
        (("prune", "--remove", 1, "--heal", "lora"), 2, "--heal is 'linear' or left out"),
        (("search", "--remove", 1, "--heal", "linear"), 2, "--heal changes the checkpoint"),
        (("heal", "--steps", 2), 2, "Missing option '--teacher'"),
        (("heal", "--steps", 2, "--teacher", "nowhere"), 1, "nowhere is not on this machine"),
    ],
)
def test_what_is_refused(place: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    command, *options = arguments
    output = [] if command == "search" else ["-o", tmp_path / "out"]
    result = run(command, place / "tiny", *options, *text(place), *output)
    assert result.exit_code == code
    assert words in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_stopped_by_hand_it_says_how_to_go_on(place: Path, tmp_path: Path) -> None:
    ls.edit_checkpoint(place / "tiny", "drop 2", tmp_path / "cut")
    words = ["heal", tmp_path / "cut", "--teacher", place / "tiny", *text(place), "--steps", 60, "--batch-size", 2]
    words += ["--save-every", 1, "--evaluate-every", 60, "-o", tmp_path / "out"]
    process = subprocess.Popen(
        [*COMMAND, *map(str, words)], stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for _ in range(2400):  # other tests run at the same time
        if process.poll() is not None or list(tmp_path.glob("out-healing/step-*")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run the same command again to resume" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert [row["step"] for row in result_of(*words)["steps"]] == [0, 60]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "out"]
