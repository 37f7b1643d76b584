"""Distillation: the tiled loss and its gradients are those of dense autograd; runs resume with the same digits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import layersurgery as ls
from layersurgery.analyses import distillation
from layersurgery.analyses.distillation import distillation_loss, find_trainable_readout, read_tokens
from layersurgery.analyses.heal_run import state_directory
from layersurgery.models.anatomy import anatomy
from layersurgery.runtime.block_runner import BlockRunner
from tests.checkpoints.test_zoo import reload
from tests.support.reference import logits_of
from tests.support.tiny_checkpoint import checkpoint
from tests.support.zoo import tiny_model, tokens

TEXT = tokens(batch=24, length=12)
OPTIONS: dict[str, Any] = {"steps": 6, "batch_size": 4, "save_every": 2, "evaluate_every": 3, "lr": 2e-3}


@pytest.mark.parametrize("loss_weight", [0.0, 0.3])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "cohere", "gptj", "granite"])
def test_loss_and_gradients_are_those_of_dense_autograd(
    name: str, loss_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = tiny_model(name), tiny_model(name, seed=1)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    monkeypatch.setattr(distillation, "tile_elements", lambda _device: 3 * student.config.vocab_size)
    own, reference = (find_trainable_readout(BlockRunner(model, anatomy(model))) for model in (student, teacher))
    read = read_tokens(own, ids, mask)
    with torch.no_grad():
        teacher_read = read_tokens(reference, ids, mask)
        p = teacher(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1)
    loss = distillation_loss(own, read, reference, teacher_read, loss_weight)
    torch.autograd.backward(loss)
    found = {key: weight.grad.clone() for key, weight in student.named_parameters() if weight.grad is not None}
    student.zero_grad()
    q = student(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1)
    kept = (mask[:, 1:] * mask[:, :-1]).bool()
    kl = (p.exp() * (p - q)).sum(-1)[:, :-1][kept].sum()
    cross_entropy = -q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][kept].sum()
    meant = (1 - loss_weight) * kl + loss_weight * cross_entropy
    meant.backward()
    assert float(loss.detach()) == pytest.approx(float(meant.detach()), rel=1e-4)
    for key, weight in student.named_parameters():
        if weight.grad is not None:
            assert (found[key] - weight.grad).norm() <= 2e-5 * weight.grad.norm() + 1e-8, key


def heal(how: str, output: Path | None = None, **options: Any) -> Any:
    student = ls.operate_(tiny_model("llama"), "drop 2")
    return ls.heal(student, tiny_model("llama"), TEXT, how=how, output=output, **{**OPTIONS, **options})


@pytest.mark.parametrize("how", ["lora", "full"])
def test_training_lowers_the_kl_of_held_out_text_and_is_reproducible(how: str, tmp_path: Path) -> None:
    healing = heal(how, tmp_path / "out", steps=30, evaluate_every=10)
    assert healing.steps.step.tolist() == [0, 10, 20, 30]
    assert healing.steps.kl_nats.iloc[-1] < 0.9 * healing.steps.kl_nats.iloc[0]
    pd.testing.assert_frame_equal(heal(how, steps=30, evaluate_every=10).steps, healing.steps)
    p, q = (
        logits_of(model, TEXT[16:])[:, :-1].double().log_softmax(-1) for model in (tiny_model("llama"), healing.model)
    )
    assert healing.steps.kl_nats.iloc[-1] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert torch.equal(logits_of(reload(tmp_path / "out"), TEXT), logits_of(healing.model, TEXT))
    assert not state_directory(tmp_path / "out").exists()
    assert "healed by training" in (tmp_path / "out" / "README.md").read_text()
    assert not any("lora" in key for key in healing.model.state_dict())


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_stopped_training_resumes_with_the_same_digits(how: str, stop: int, tmp_path: Path) -> None:
    def interrupt(_what: str, done: int, _total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    whole = heal(how)
    with pytest.raises(KeyboardInterrupt):
        heal(how, tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ls.OutputError, match=r"other arguments \(lr\)"):
        heal(how, tmp_path / "out", lr=1e-3)
    resumed = heal(how, tmp_path / "out")
    pd.testing.assert_frame_equal(resumed.steps, whole.steps)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key])


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """Each has half of the sequences of a step; the gradients are added in another order."""
    checkpoint(tmp_path / "teacher")
    ls.edit_checkpoint(tmp_path / "teacher", "drop 1", tmp_path / "cut")
    (tmp_path / "text.txt").write_text("Once upon a time there were two layers. " * 80, "utf-8")
    asked = ["heal", "cut", "--teacher", "teacher", "--data", "text.txt", "--steps", "4", "--context", "16", "--json"]
    asked += ["--batch-size", "4", "--how", "full", "--lr", "1e-3", "--device", "cpu"]
    found = []
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in (("one", []), ("two", launch)):
        command = [sys.executable, *start, "-m", "layersurgery_cli", *asked, "-o", name]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(pd.DataFrame(json.loads(done.stdout[done.stdout.index("{") :])["steps"]))
    pd.testing.assert_frame_equal(*found, rtol=1e-3)
    assert found[0].kl_nats.iloc[-1] != found[0].kl_nats.iloc[0]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=2e-4)


def test_branches_that_are_skipped_stay_skipped(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    ls.edit_checkpoint(tmp_path / "source", "skip-mlp 2", tmp_path / "edited")
    student: Any = reload(tmp_path / "edited")
    ls.heal(student, tiny_model("llama"), TEXT, **OPTIONS)
    assert not student.model.layers[2].mlp.down_proj.weight.any()


def test_what_cannot_be_trained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_model("llama")
    with pytest.raises(ls.PlanError, match="share weights"):
        ls.heal(teacher, teacher, TEXT, **OPTIONS)
    with pytest.raises(ls.PlanError, match="the teacher 120; the teacher must have the same vocabulary"):
        ls.heal(tiny_model("llama"), tiny_model("llama", vocab_size=120), TEXT.clamp(max=100), **OPTIONS)
    with pytest.raises(ls.PlanError, match="at least 16 sequences of text"):
        ls.heal(tiny_model("llama"), teacher, TEXT[:10], **OPTIONS)
    with pytest.raises(ls.PlanError, match="`how` 'lore' is unknown"):
        heal("lore")
    with pytest.raises(ls.PlanError, match="`steps` is a whole number of at least 1, not 0"):
        heal("lora", steps=0)
    repeated = ls.operate_(tiny_model("llama"), "repeat 2")
    with pytest.raises(ls.UnsupportedEditError, match="blocks share their weights"):
        ls.heal(repeated, teacher, TEXT, **OPTIONS)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ls.SourceError, match=r"pip install 'layersurgery\[heal\]'"):
        heal("lora")
