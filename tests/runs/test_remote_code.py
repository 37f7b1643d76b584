"""Code that comes with a model: never run and never asked about, unless the caller says so; then run everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import layersurgery as ls
from tests.cli.test_cli import run
from tests.support.tiny_checkpoint import checkpoint
from tests.support.zoo import DEPTH

_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({mark!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_code"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save a checkpoint whose config, model and tokenizer are code of its own; running it makes the file "ran"."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    path = checkpoint(tmp_path / "own")
    (path / "own_code.py").write_text(_CODE.format(mark=str(tmp_path / "ran")))
    classes = {
        "config.json": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"},
        "tokenizer_config.json": {"AutoTokenizer": [None, "own_code.OwnTokenizer"]},
    }
    for name, auto_map in classes.items():
        fields = json.loads((path / name).read_text()) | {"auto_map": auto_map}
        fields |= {"model_type": "own_code"} if name == "config.json" else {"tokenizer_class": "OwnTokenizer"}
        (path / name).write_text(json.dumps(fields))
    (tmp_path / "text.txt").write_text("Once upon a time. " * 20)
    return path


def test_it_is_never_run_and_nothing_is_asked(own: Path, tmp_path: Path) -> None:
    remedy = r"its own code, which is run only if you ask for it.*--trust-remote-code"
    with pytest.raises(ls.SourceError, match=remedy):
        ls.load(own)
    with pytest.raises(ls.SourceError, match=remedy):
        ls.sweep(str(own), "drop", tmp_path / "text.txt")
    with pytest.raises(ls.SourceError, match=remedy):
        ls.sweep(str(checkpoint(tmp_path / "plain")), "drop", tmp_path / "text.txt", tokenizer=str(own))
    for words in (["sweep"], ["sweep", "--estimate"], ["rank"], ["compare"], ["analyze", "neurons"]):
        model = [own, "drop 1"] if words == ["compare"] else [own]
        found = run(*words, *model, *([] if "neurons" in words else ["--data", tmp_path / "text.txt"]))
        assert found.exit_code == 1, words
        assert "--trust-remote-code" in " ".join(found.stderr.split()), words
    assert not (tmp_path / "ran").exists()


def test_it_is_passed_everywhere(own: Path, tmp_path: Path) -> None:
    model, tokenizer = ls.load(own, trust_remote_code=True)
    assert (type(model).__name__, type(tokenizer).__name__) == ("OwnModel", "OwnTokenizer")
    size = ["--data", tmp_path / "text.txt", "-n", 40, "--context", 20, "--device", "cpu", "--trust-remote-code"]
    for words in (
        ["sweep", own, *size, "-o", tmp_path / "sweep"],
        ["sweep", own, *size, "--estimate"],
        ["compare", own, own, *size],
        ["rank", own, *size, "-o", tmp_path / "rank"],
        ["analyze", "neurons", own, "--trust-remote-code", "-o", tmp_path / "neurons"],
        ["sweep", own, *size[:-3], "--device-map", "auto", "--trust-remote-code", "-o", tmp_path / "map"],
    ):
        found = run(*words)
        assert found.exit_code == 0, (words, found.stderr)
    assert len(ls.read_results(tmp_path / "sweep")) == 2 * DEPTH
