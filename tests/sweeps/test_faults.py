"""What once went silently wrong, or ended in a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import layersurgery as ls
from layersurgery.checkpoints.tensor_index import fingerprint
from layersurgery.figures.sweeps import Sweep, robustness
from layersurgery.metrics import dispatch, reference
from layersurgery.runtime.block_runner import BlockRunner
from layersurgery.runtime.unembedding import ModelHead, Unembedding, find_readout
from tests.cli.test_cli import run
from tests.metrics.test_tiled import Plain, drawn
from tests.support.tiny_checkpoint import tiny_tokenizer
from tests.support.zoo import tiny_model, tokens


def test_an_adapter_on_the_unembedding_counts_in_half_precision() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.02)
    model = model.to(torch.bfloat16)
    assert isinstance(find_readout(BlockRunner(model, ls.anatomy(model))), ModelHead)
    plain = tiny_model("llama").to(torch.bfloat16)
    assert isinstance(find_readout(BlockRunner(plain, ls.anatomy(plain))), Unembedding)


@pytest.mark.parametrize("way", ["autocast", "medium"])
def test_a_lower_precision_around_it_does_not_reach_the_metrics(way: str) -> None:
    readout = Plain(drawn(997, 64))
    p = drawn(64, 64, seed=1)
    q, target = p + drawn(64, 64, seed=2, scale=0.005), torch.zeros(64, dtype=torch.long)
    before = torch.get_float32_matmul_precision()
    try:
        if way == "medium":
            torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            found = dispatch.measure(readout, q, dispatch.baseline(readout, p, target))
        assert torch.get_float32_matmul_precision() == ("medium" if way == "medium" else before)
    finally:
        torch.set_float32_matmul_precision(before)
    meant = reference.measure(p @ readout.matrix.T, q @ readout.matrix.T, target)
    assert (found[0] - meant[0]).abs().max() < 5e-5


class _OverTheSequence(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(x)
        return normed - normed.mean(-2, keepdim=True)


def test_a_tail_that_mixes_tokens_is_refused() -> None:
    model: Any = tiny_model("llama")
    model.model.norm = _OverTheSequence(model.model.norm)
    with pytest.raises(ls.UnsupportedEditError, match="the logits at one position depend on other positions"):
        ls.sweep(model, "drop", tokens())


def test_a_config_that_asks_for_the_routers_logits() -> None:
    model = tiny_model("mixtral")
    meant = ls.sweep(model, "drop", tokens())
    model.config.output_router_logits = True
    assert ls.sweep(model, "drop", tokens()).kl_nats.tolist() == pytest.approx(meant.kl_nats.tolist(), abs=1e-6)


def test_a_tuned_prefix_is_refused() -> None:
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(
        ls.UnsupportedEditError, match="a key-value cache although use_cache is False|not form one residual stream"
    ):
        ls.sweep(model, "drop", tokens())


def test_a_token_made_impossible_is_no_number_and_not_a_huge_one() -> None:
    class Barring(Plain):
        def logits_tile(self, x_TD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            logits = super().logits_tile(x_TD, start, stop)
            logits[:, -1] = -torch.inf  # not there in either model
            return logits.masked_fill((x_TD[:, :1] > 0) & (torch.arange(stop) == 3), -torch.inf)

    readout = Barring(drawn(40, 4), tokens_at_once=64)
    p, q = drawn(6, 4, seed=1), drawn(6, 4, seed=2)
    p[:, 0], q[:, 0] = -1, torch.tensor([-1.0, 1, -1, -1, 1, -1])
    found = dispatch.measure(readout, q, dispatch.baseline(readout, p, torch.zeros(6, dtype=torch.long)))
    barred = q[:, 0] > 0
    assert found[0, ~barred].isfinite().all()
    assert not found[0, barred].isfinite().any()


def test_every_byte_of_the_weights_counts(llama: Path) -> None:
    before = fingerprint(llama)
    path = llama / "model.safetensors"
    content = bytearray(path.read_bytes())
    for place in (len(content) // 3, len(content) - 1):
        changed = content.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        assert fingerprint(llama) != before
    path.write_bytes(content)
    assert fingerprint(llama) == before


def test_spans_of_several_lengths_are_several_lines() -> None:
    frame = ls.sweep(tiny_model("llama"), "drop-span:2,drop-span:3", tokens(2))
    lines = robustness([Sweep.of(frame, "text")]).axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["LlamaForCausalLM, 2 blocks", "LlamaForCausalLM, 3 blocks"]
    assert [np.size(line.get_xdata()) for line in lines] == [5, 4]


def test_a_failing_overwrite_keeps_the_results(small: list[Any], tmp_path: Path) -> None:
    assert run(*small, "--edits", "drop,drop").exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert run(*small, "--overwrite", "--blocks", "wrong").exit_code == 1
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_checkpoints_own_dtype(small: list[Any], tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    for field in ("dtype", None):
        config = json.loads((tmp_path / "half" / "config.json").read_text())
        if field is None:
            config.pop("dtype", None)
            config.pop("torch_dtype", None)
            (tmp_path / "half" / "config.json").write_text(json.dumps(config))
        found = run(small[0], tmp_path / "half", *small[2:], "--edits", "drop", "--overwrite")
        assert found.exit_code == 0
        assert ls.read_results(tmp_path / "out").attrs["run"]["model"]["dtype"] == "bfloat16"


def test_places_that_cannot_be_written_and_usage_that_cannot_be_meant(small: list[Any], tmp_path: Path) -> None:
    assert run(*small).exit_code == 0
    for words, code, said in [
        (["plot", tmp_path / "out", "-o", tmp_path / "text.txt"], 1, "cannot make"),
        ([*small, "-o", tmp_path / "text.txt"], 1, "is not a directory"),
        ([*small, "--edits", ""], 2, "no edit is named"),
        ([*small, "--data", ""], 2, "--data is empty"),
        ([*small, "--dtype", "int8"], 2, "is not supported"),
        ([*small, "--device", "meta"], 2, "--device meta cannot compute"),
    ]:
        found = run(*words)
        assert (found.exit_code, said in " ".join(found.stderr.split())) == (code, True), found.stderr


def test_padding_that_the_model_does_not_know(small: list[Any], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    while tokenizer.pad_token_id < 128:
        tokenizer.add_special_tokens({"pad_token": f"<padding {len(tokenizer)}>"})
    tokenizer.save_pretrained(tmp_path / "tiny")
    assert run(*small, "--no-pack").exit_code == 0


def test_empty_and_hidden_files_are_passed_over(small: list[Any], tmp_path: Path) -> None:
    (tmp_path / "texts" / ".git").mkdir(parents=True)
    (tmp_path / "texts" / "a.jsonl").touch()
    (tmp_path / "texts" / ".git" / "a.txt").write_text("hidden " * 90)
    (tmp_path / "texts" / "b.txt").write_text("shown " * 90)
    small[3] = tmp_path / "texts"
    assert run(*small, "--per-token").exit_code == 0
    import pandas as pd

    assert "".join(pd.read_parquet(tmp_path / "out" / "tokens.parquet").token[:5]) == "shown"
