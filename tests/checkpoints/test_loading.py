"""Loading models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import layersurgery as ls
from tests.support.reference import logits_of
from tests.support.zoo import tiny_model, tokens


def test_a_directory_without_a_tokenizer(llama: Path) -> None:
    model, tokenizer = ls.load(llama)
    assert tokenizer is None
    assert not model.training
    torch.testing.assert_close(logits_of(model, tokens()), logits_of(tiny_model("llama"), tokens()))


def test_dtypes(llama: Path) -> None:
    assert ls.load(llama).model.dtype == torch.float32
    assert ls.load(llama, dtype="bfloat16").model.dtype == torch.bfloat16
    assert ls.load(llama, dtype=torch.float16, device_map="cpu").model.dtype == torch.float16
    with pytest.raises(ls.SourceError, match="'float12' is not a torch dtype"):
        ls.load(llama, dtype="float12")


def test_what_cannot_be_loaded(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ls.SourceError, match="does not exist on this machine"):
        ls.load("./nowhere")
    (llama / "model.safetensors").write_bytes(b"rubbish!")
    with pytest.raises(ls.SourceError, match=r"transformers cannot load .*llama"):
        ls.load(llama)


def test_a_model_in_memory_has_no_name(llama: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    message = r"expected the name of a model .*, not a LlamaForCausalLM; edit a model in memory with operate\(\)"
    with pytest.raises(ls.SourceError, match=message):
        ls.load(model)
    with pytest.raises(ls.SourceError, match=message):
        ls.edit_checkpoint(model, ls.swap(1), tmp_path / "out")
    with pytest.raises(ls.PlanError, match="expected a plan or its text .*, not 12"):
        ls.edit_checkpoint(llama, 12, tmp_path / "out")  # type: ignore[arg-type]


def test_a_model_that_would_be_partly_random(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(ls.SourceError, match=r"lacks model.layers.6.* and 8 more.*would be random"):
        ls.load(llama)


def test_a_device_instead_of_a_device_map(llama: Path) -> None:
    assert ls.load(llama, device="cpu").model.device == torch.device("cpu")
    assert ls.load(llama, device=torch.device("cpu")).model.device == torch.device("cpu")
    with pytest.raises(ls.PlanError, match="`device` 'cuda:9' cannot be used: "):
        ls.load(llama, device="cuda:9")
    with pytest.raises(ls.PlanError, match="`device` 'gpu' cannot be used: "):
        ls.load(llama, device="gpu")
    with pytest.raises(ls.PlanError, match=r"`device` \(cpu\) and `device_map` \(auto\) were both given"):
        ls.load(llama, device="cpu", device_map="auto")
