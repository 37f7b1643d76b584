"""What helps before the first command: the program alone, doctor, and the completion of words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from layersurgery_cli import completion
from layersurgery_cli.app import app
from typer.testing import CliRunner

import layersurgery as ls
from tests.support.tiny_checkpoint import checkpoint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub with two causal language models, one of pickles, one of another kind and a broken one."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, architecture, file in (
        ("models--gpt2", "GPT2LMHeadModel", "model.safetensors"),
        ("models--EleutherAI--pythia-70m", "GPTNeoXForCausalLM", "model.safetensors"),
        ("models--some--pickles", "GPT2LMHeadModel", "pytorch_model.bin"),
        ("models--google--bert", "BertForMaskedLM", "model.safetensors"),
        ("models--some--broken", None, "model.safetensors"),
        ("models--some--half", "LlamaForCausalLM", "model-00001-of-00002.safetensors"),
        ("models--some--adapter", "LlamaForCausalLM", "adapter_model.safetensors"),
        ("models--t5", "T5ForConditionalGeneration", "model.safetensors"),
    ):
        snapshot = tmp_path / "hub" / name / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (snapshot / file).touch()
        known = {"architectures": [architecture], "is_encoder_decoder": name == "models--t5"}
        config = "{" if architecture is None else json.dumps(known)
        (snapshot / "config.json").write_text(config, "utf-8")
    return tmp_path / "hub"


def run(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def test_the_program_alone_says_what_to_do_next(cache: Path) -> None:
    result = run()
    assert result.exit_code == 0
    assert "EleutherAI/pythia-70m, gpt2" in result.output
    assert "bert" not in result.output
    assert "layersurgery prune smollm2-135m --remove 2" in result.output


def test_its_commands_exist() -> None:
    from typer.main import get_command

    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = [line.split()[1] for line in run().output.splitlines() if line.startswith("  layersurgery ")]
    assert len(named) == 7
    assert [name for name in named if name not in commands and name != "--help"] == []


def test_it_needs_no_torch() -> None:
    code = "import sys; import layersurgery_cli.commands.start as s; s.show_start(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_name_of_a_model_at_hand_is_guessed(cache: Path) -> None:
    for typed, meant in (("smolm2-135m", "smollm2-135m"), ("SmolLM2-135M", "smollm2-135m"), ("gtp2", "gpt2")):
        result = run("drop", typed, "--layer", "2", "--dry-run")
        assert (result.exit_code, f"did you mean {meant}?" in " ".join(result.output.split())) == (1, True), (
            result.output
        )


def test_doctor_finds_that_all_works(cache: Path) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert findings["edit and undo"]["value"].startswith("works")
    assert findings["sweep on the CPU"]["value"].startswith("works")
    assert findings["in the Hub's cache"]["value"] == "EleutherAI/pythia-70m, gpt2"
    assert findings["layersurgery"]["value"] == ls.__version__


def test_doctor_names_what_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import layersurgery.runs.sweep as runs_sweep
    from layersurgery.runs import doctor

    sweep, version = runs_sweep.sweep, doctor._version
    monkeypatch.setattr(runs_sweep, "sweep", lambda *given: sweep(*given).assign(kl_nats=9.5))
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "peft" else version(name))
    result = run("doctor")
    assert result.exit_code == 1
    assert "KL 9.5 nats instead of" in result.output
    assert "pip install 'layersurgery[heal]'" in result.output


@pytest.mark.parametrize("package", ["transformers", "torch", "psutil"])
def test_doctor_reports_a_package_that_cannot_be_imported(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = run("doctor")
    assert result.exit_code == 1
    assert f"import of {package} halted" in " ".join(result.output.split())
    assert "layersurgery" in result.output


def test_doctor_and_the_cache_follow_the_variables_of_the_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    from layersurgery.checkpoints.cached_models import hub_cache

    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "offline (TRANSFORMERS_OFFLINE)" in [finding.value for finding in ls.doctor()]
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(cache))
    assert hub_cache() == cache
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE")
    monkeypatch.setenv("PLACE", str(cache.parent))
    monkeypatch.setenv("HF_HOME", "$PLACE")
    assert hub_cache() == cache


def test_doctor_tells_no_name_of_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LAYERSURGERY_CACHE", raising=False)
    values = " ".join(finding.value for finding in ls.doctor())
    assert str(tmp_path) not in values
    assert "~/.cache/huggingface/hub" in values


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("layersurgery sweep gp", "gpt2"),
        ("layersurgery prune Eleu", "EleutherAI/pythia-70m"),
        ("layersurgery sweep gpt2 --edits swap,skip-m", "swap,skip-mlp"),
        ("layersurgery plan --plan rever", "reverse"),
        ("layersurgery report run", "runs/one"),
    ],
)
def test_words_are_completed(words: str, expected: str, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/run.json").write_text("{}", "utf-8")
    env = {
        **os.environ,
        "_LAYERSURGERY_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    result = subprocess.run(
        [sys.executable, "-m", "layersurgery_cli"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert expected in result.stdout.split(), result.stderr


def test_a_plan_and_a_list_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/run.json").touch()
    assert completion.results("./r") == ["./runs/one"]
    assert completion.plans("swap 12 13; skip-a") == ["swap 12 13; skip-attention"]
    assert "swap,drop" in completion.families("swap,dr")
    assert "swap,swap" not in completion.families("swap,sw")


def test_an_output_without_utf_8_loses_characters_and_not_the_command(tmp_path: Path) -> None:
    """A file on Windows often has another encoding, which has no characters for curves."""
    checkpoint(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("Once upon a time there were two layers. " * 20, "utf-8")
    words = ["sweep", "tiny", "--edits", "drop", "--data", "text.txt", "--tokens", "64", "--context", "16", "-o", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "layersurgery_cli", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert b"drop" in done.stdout
