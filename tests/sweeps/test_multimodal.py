"""Models that also read images or sound, measured on text alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor, LlavaProcessor

import layersurgery as ls
from layersurgery.metrics.reference import METRICS, measure
from tests.cli.test_cli import result_of, run
from tests.support.multimodal import (
    MULTIMODAL,
    NOT_BUILT,
    UNMEASURED,
    measurable_model,
    multimodal_checkpoint,
    multimodal_model,
)
from tests.support.reference import logits_along, logits_of
from tests.support.tiny_checkpoint import tiny_tokenizer
from tests.support.zoo import DEPTH, slow, tokens

# One of each way to load and to find the decoder: a vision tower of the same depth; a decoder that is called an
# encoder, in a model that needs an image; an auto class that finds no weights; sound; one part of an omni model.
QUICK = ("llava", "blip", "emu3", "qwen2_audio", "qwen2_5_omni")
MEASURED = [name for name in MULTIMODAL if name not in UNMEASURED | NOT_BUILT]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves a model of one type once and returns its directory, which no test edits."""
    return cache(lambda name: multimodal_checkpoint(tmp_path_factory.mktemp("models") / name, name))


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("".join(f"Once upon a time there were {number} layers.\n" for number in range(20)))
    return path


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in MEASURED])
def test_a_sweep_is_operating_and_comparing(saved: Callable[[str], Path], name: str) -> None:
    model, tokenizer = ls.load(saved(name))
    assert tokenizer("a").input_ids
    ids = tokens(2, 8)
    logits = logits_of(model, ids)
    frame = ls.sweep(model, "swap,drop", ids)
    assert len(frame) == 2 * DEPTH
    p, target = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    for row in frame.to_dict("records")[1:]:
        try:
            with ls.operate(model, row["plan"]):
                q = logits_of(model, ids)
        except ls.UnsupportedEditError:  # no config can say it; the sweep has no need of one
            q = logits_along(model, ls.Plan.parse(row["plan"]).route(DEPTH), ids)
        expected = dict(zip(METRICS, measure(p, q[:, :-1].flatten(0, 1), target).mean(-1).tolist(), strict=True))
        assert {metric: row[metric] for metric in METRICS} == pytest.approx(expected, abs=1e-5)
        assert row["kl_nats"] > 1e-4


_NOT_ON_TEXT = (
    "blip", "blip-2", "instructblip", "instructblipvideo", "kosmos-2", "llama4", "qwen2_5_omni", "qwen3_omni_moe",
    "shieldgemma2",
)  # fmt: skip


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in MEASURED])
def test_the_logits_are_those_of_the_whole_model(saved: Callable[[str], Path], name: str) -> None:
    whole, model = multimodal_model(name), ls.load(saved(name)).model
    try:
        expected = logits_of(whole, tokens(1, 8))
    except Exception:  # it needs an image or is not called as a whole; its own language model is
        assert name in _NOT_ON_TEXT
        return
    torch.testing.assert_close(logits_of(model, tokens(1, 8)), expected)


@pytest.mark.parametrize("name", [name if name in ("mllama", "t5gemma2") else slow(name) for name in UNMEASURED])
def test_what_cannot_be_measured_on_text_is_refused(saved: Callable[[str], Path], name: str, story: Path) -> None:
    with pytest.raises(ls.LayerSurgeryError, match=UNMEASURED[name]):
        measurable_model(saved(name))
    out = story.parent / "out"
    found = run("sweep", saved(name), "--data", story, "-n", 60, "--context", 30, "-o", out)
    assert found.exit_code == 1
    assert not list(out.glob("*.csv"))


def test_a_processor_holds_the_tokenizer(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("llava"), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    assert ls.load(tmp_path / "model").tokenizer is None
    LlavaProcessor(CLIPImageProcessor(), tiny_tokenizer()).save_pretrained(tmp_path / "model")
    assert ls.load(tmp_path / "model").tokenizer("abc").input_ids == tiny_tokenizer()("abc").input_ids


def test_every_type_of_transformers_is_in_the_tests() -> None:
    assert set(UNMEASURED | NOT_BUILT) <= set(MULTIMODAL)
    assert not set(UNMEASURED) & set(NOT_BUILT)
    assert len(MEASURED) > 90


def test_commands_on_an_image_text_checkpoint(saved: Callable[[str], Path], story: Path, tmp_path: Path) -> None:
    path = saved("llava")
    words: list[Any] = ["--data", story, "-n", 60, "--context", 30]
    inner = result_of("inspect", path)
    assert (inner["depth"], inner["prefix"]) == (DEPTH, "language_model.model.layers")
    swept = result_of("sweep", path, "--edits", "drop", "--layers", "2:4", *words, "-o", tmp_path / "sweep")
    assert run("analyze", "lens", path, *words, "-o", tmp_path / "lens").exit_code == 0
    assert result_of("drop", path, "--layer", 2, "-o", tmp_path / "edited")["blocks"] == DEPTH - 1
    compared = result_of("compare", path, tmp_path / "edited", *words)
    row = swept["results"][1]
    assert row["plan"] == "drop 2"
    assert compared["kl_nats"] == pytest.approx(row["kl_nats"], abs=1e-6)


@pytest.mark.slow
def test_ranking_and_pruning_an_image_text_checkpoint(
    saved: Callable[[str], Path], story: Path, tmp_path: Path
) -> None:
    words: list[Any] = ["--data", story, "-n", 60, "--context", 30]
    pruned = result_of("prune", saved("llava"), "--remove", 1, *words, "-o", tmp_path / "pruned")
    assert pruned["blocks"] == DEPTH - 1
    assert ls.inspect(tmp_path / "pruned").depth == DEPTH - 1
    ranked = ls.rank(ls.load(saved("llava")).model, tokens(2, 12))
    assert len(ranked) >= DEPTH
    for name in ("attention", "norms", "similarity"):
        assert run("analyze", name, saved("llava"), *words, "-o", tmp_path / name).exit_code == 0
