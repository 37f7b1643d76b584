"""Programs that know only the names of transformers 4 read the same model from a converted checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import layersurgery as ls
from layersurgery.checkpoints.dialects import with_older_fields, with_older_tokenizer_fields, write_both_dialects
from tests.support import older_transformers
from tests.support.reference import logits_of
from tests.support.tiny_checkpoint import tiny_tokenizer
from tests.support.zoo import tiny_model, tokens

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e5}
_LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0], "rope_theta": 1e5,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "older"),
    [
        ({"rope_theta": 1e5, "rope_type": "default"}, {"rope_theta": 1e5}),
        (
            {"rope_theta": 1e5, "rope_type": "default", "partial_rotary_factor": 0.25},
            {"rope_theta": 1e5, "partial_rotary_factor": 0.25},
        ),
        (
            _YARN,
            {"rope_theta": 1e5, "rope_scaling": {key: value for key, value in _YARN.items() if key != "rope_theta"}},
        ),
        (
            _LONG,
            {
                "rope_theta": 1e5,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]},
                "original_max_position_embeddings": 32,
            },
        ),
        (
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
    ],
)
def test_rope_parameters_are_also_written_under_their_older_names(rope: dict[str, Any], older: dict[str, Any]) -> None:
    config = {"num_hidden_layers": 2, "dtype": "bfloat16", "rope_parameters": rope}
    assert with_older_fields(config) == config | older | {"torch_dtype": "bfloat16"}


def test_tokenizer_settings_have_names_that_both_versions_know() -> None:
    newer = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<x>"], "pad": 1}
    older = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<x>"], "pad": 1}
    assert with_older_tokenizer_fields(newer) == older
    assert with_older_tokenizer_fields({"tokenizer_class": "GemmaTokenizer"}) == {"tokenizer_class": "GemmaTokenizer"}


_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
    "llama-yarn": {"rope_parameters": _YARN},
    "mistral": {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
    "qwen2": {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
    "qwen2_moe": {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
    "qwen3_moe": {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
    "gemma2": {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
    "gemma3_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e3},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }
    },
    "phi3": {"rope_parameters": {**_LONG, "short_factor": [1.0, 2.0, 1.5, 1.0], "long_factor": [3.0, 4.0, 1.0, 2.0]}},
    "stablelm": {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
    "starcoder2": {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
    "falcon": {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
    "gpt_oss": {"rope_parameters": _YARN},
}


def _save(path: Path, name: str) -> torch.Tensor:
    """Save a tiny model in both dialects, and return its logits."""
    model = tiny_model(name, **_MODELS[name])
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    write_both_dialects(path)
    return logits_of(model, tokens())


@pytest.mark.parametrize("name", _MODELS)
def test_the_installed_version_reads_the_same_from_both_dialects(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    expected = _save(source, name)
    config = json.loads((source / "config.json").read_text())
    assert {"torch_dtype", "rope_theta"} <= config.keys()
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(source).eval(), tokens()), expected)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    assert tokenizer("a b.").input_ids == AutoTokenizer.from_pretrained(source)("a b.").input_ids
    ls.edit_checkpoint(source, "swap 1 2", tmp_path / "out")
    edited = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: edited.get(key) for key in ("torch_dtype", "rope_theta", "rope_scaling")} == {
        key: config.get(key) for key in ("torch_dtype", "rope_theta", "rope_scaling")
    }


def test_a_type_that_does_not_accept_the_older_names_keeps_its_config(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["gemma4_text"]().to_dict() | {"model_type": "gemma4_text"}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    write_both_dialects(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(config, default=str))


@pytest.mark.weekly
def test_an_older_transformers_computes_the_same_logits(tmp_path: Path) -> None:
    """Edit the embedded model, save tiny ones of other families, and run all of them with transformers 4.57."""
    if shutil.which("uv") is None:
        pytest.skip("needs uv, which makes the environment")
    text = "The capital of France is Paris.\n\n  def f(x): return x  # 12,5 €"
    ids = torch.arange(40, 72)[None]
    ls.edit_checkpoint("smollm2-135m", "swap 12 13", tmp_path / "smollm2")
    model, tokenizer = ls.load(tmp_path / "smollm2")
    expected = {"smollm2": logits_of(model, ids)} | {name: _save(tmp_path / name, name) for name in _MODELS}
    for name in expected:
        torch.save(ids if name == "smollm2" else tokens(), tmp_path / name / "tokens.pt")
    (tmp_path / "smollm2" / "text.txt").write_text(text, "utf-8")
    subprocess.run(
        [
            "uv", "run", "--no-project", "--isolated", "--with", "transformers==4.57.*", "--with", "torch", "python",
            older_transformers.__file__, *(str(tmp_path / name) for name in expected),
        ],
        check=True,
    )  # fmt: skip
    for name, logits in expected.items():
        older = torch.load(tmp_path / name / "older.pt")
        assert older["version"].startswith("4.57.")
        assert torch.allclose(older["logits"], logits, atol=1e-4 * float(logits.abs().max())), name
        if name == "smollm2":
            assert older["ids"] == tokenizer(text).input_ids
