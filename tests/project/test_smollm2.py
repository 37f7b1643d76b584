"""Test the main features on the real model that the project contains."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from layersurgery_cli.commands.demo import _compare
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import layersurgery as ls
from layersurgery.checkpoints.model_packages import EMBEDDED, packaged_file
from layersurgery.checkpoints.sources import find_source, needs_conversion
from tests.support.reference import logits_along


@pytest.fixture(scope="module")
def source() -> Path:
    return find_source(EMBEDDED).directory


def test_a_swapped_layer_in_a_pipeline(source: Path, tmp_path: Path) -> None:
    result = ls.edit_checkpoint(EMBEDDED, ls.swap(12), tmp_path / "swapped")
    assert str(result.route) == "0:12 13 12 14:30"
    pipe = pipeline("text-generation", model=str(tmp_path / "swapped"), device="cpu")
    text = pipe("The capital of France is", max_new_tokens=8, do_sample=False, return_full_text=False)[0][
        "generated_text"
    ]
    assert "Paris" in text
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = AutoTokenizer.from_pretrained(source)("Layers may be swapped.", return_tensors="pt").input_ids
    with torch.no_grad():
        found = pipe.model(ids, use_cache=False).logits
    torch.testing.assert_close(found, logits_along(original, result.route, ids), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_middle_forgives_and_the_ends_do_not(source: Path, tmp_path: Path) -> None:
    divergences = {}
    for layer in (0, 12):
        ls.edit_checkpoint(EMBEDDED, ls.swap(layer), tmp_path / str(layer))
        divergences[layer] = _compare(source, tmp_path / str(layer))[1]
    assert divergences[12]["kl_nats"] < 0.5
    assert divergences[12]["agreement"] > 0.7
    assert divergences[0]["kl_nats"] > 3
    assert divergences[0]["agreement"] < 0.3


def test_a_gguf_file_is_a_source(source: Path, tmp_path: Path) -> None:
    assert not needs_conversion(EMBEDDED)
    assert not needs_conversion(str(packaged_file(EMBEDDED)))
    result = ls.edit_checkpoint(packaged_file(EMBEDDED), "drop 20", tmp_path / "dropped", verify=False)
    assert json.loads((result.path / "config.json").read_text())["num_hidden_layers"] == 29
    card = (result.path / "README.md").read_text()
    assert "license: apache-2.0" in card


def test_a_damaged_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSURGERY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ls.SourceError, match=r"transformers cannot read .*broken.gguf"):
        ls.edit_checkpoint(tmp_path / "broken.gguf", ls.swap(1), tmp_path / "out")
    assert list((tmp_path / "cache").glob("*")) == []


@pytest.fixture(scope="module")
def loaded() -> Any:
    return ls.load(EMBEDDED)


@pytest.fixture(scope="module")
def text(loaded: Any) -> torch.Tensor:
    """Return Python's help text, which every Python has, as (2, 256) tokens."""
    help_text = "\n\n".join(topics[name] for name in sorted(topics))
    ids: torch.Tensor = loaded.tokenizer(help_text[:8000], return_tensors="pt").input_ids
    return ids[0, :512].view(2, 256)


def test_what_it_is_made_of(loaded: Any) -> None:
    found = ls.anatomy(loaded.model)
    assert (found.depth, found.blocks, len(found.kinds)) == (30, "model.layers", 1)
    assert found.parts(0).skip_error == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "least", "most"),
    [
        ("drop 20", 0.02, 1), ("swap 12 13", 0.02, 1), ("repeat 8:12", 0.02, 2), ("skip-attention 20", 0.01, 1),
        ("skip-mlp 20", 0.02, 1), ("drop 0", 3, 30), ("skip-mlp 0", 3, 30),
    ],
)  # fmt: skip
def test_edits_of_the_live_model(loaded: Any, text: torch.Tensor, plan: str, least: float, most: float) -> None:
    model, tokenizer = loaded
    prompt = tokenizer(["The capital of France is", "Layers"], return_tensors="pt", padding=True, padding_side="left")
    assert not prompt.attention_mask.all()
    with torch.no_grad():
        before = model(text[:1]).logits
        found = ls.compare(model, plan, text[:1])
        print(f"{plan}: {found.kl_nats:.3f} nats, {100 * found.agreement:.0f} %, perplexity {found.perplexity:.1f}")
        with ls.operate(model, plan):
            with_cache, without = (
                model.generate(**prompt, max_new_tokens=10, do_sample=False, use_cache=cache, pad_token_id=0)
                for cache in (True, False)
            )
        assert torch.equal(with_cache, without)
        assert torch.equal(model(text[:1]).logits, before)
    assert least < found.kl_nats < most


@pytest.mark.slow
def test_a_kept_edit_in_a_pipeline(text: torch.Tensor, tmp_path: Path) -> None:
    model, tokenizer = ls.load(EMBEDDED)
    ls.operate_(model, "drop 20:22; repeat 10; skip-attention 25")
    ls.save(model, tmp_path / "kept", tokenizer=tokenizer)
    ls.edit_checkpoint(EMBEDDED, "drop 20:22; repeat 10; skip-attention 25", tmp_path / "disk")
    with torch.no_grad():
        meant = model(text).logits
        for way in ("kept", "disk"):
            pipe = pipeline("text-generation", model=str(tmp_path / way), device="cpu")
            torch.testing.assert_close(pipe.model(text).logits, meant, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_a_sweep_finds_what_the_paper_found(loaded: Any, text: torch.Tensor) -> None:
    ids = text.view(4, 128)
    frame = ls.sweep(loaded.model, "swap,drop", ids)
    by = {edit: frame[frame.edit == edit].set_index("layer") for edit in ("swap", "drop")}
    print(ls.summary_sentence(frame))
    # Very large: the first block, and the order of the last two.
    assert min(by["swap"].kl_nats[0], by["drop"].kl_nats[0], by["swap"].kl_nats[28]) > 3
    assert max(by["swap"].agreement[0], by["drop"].agreement[0], by["swap"].agreement[28]) < 0.2
    # Small: the middle, except for one or two blocks.
    assert (by["swap"].agreement[2:27] > 0.65).sum() >= 23
    assert (by["drop"].kl_nats[2:27] < 1).sum() >= 23
    assert (by["swap"].kl_nats < by["drop"].kl_nats[:29]).sum() >= 20
    for plan in ("swap 12 13", "drop 11", "drop 29"):
        row, meant = frame.set_index("plan").loc[plan], ls.compare(loaded.model, plan, ids, batch_size=4)
        assert row.agreement == meant.agreement
        assert row.accuracy == meant.accuracy
        for metric in ("kl_nats", "loss_nats", "loss_change_nats", "entropy_bits", "entropy_change_bits"):
            assert row[metric] == pytest.approx(getattr(meant, metric), abs=1e-5), (plan, metric)
