"""Models that are quantized while they are loaded: the option `quantize`, in Python and at the terminal."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import layersurgery as ls
from layersurgery.models.quantized import is_quantized
from layersurgery.runtime.offload import distinct_tensors
from tests.cli.test_cli import run
from tests.support.tiny_checkpoint import checkpoint
from tests.support.zoo import tokens

pytest.importorskip("bitsandbytes", reason="quantized models need bitsandbytes")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "tiny"
    return checkpoint(path, hidden_size=64, intermediate_size=128, head_dim=16)


def test_a_run_by_name_measures_the_quantized_model(model: Path, tmp_path: Path) -> None:
    ids = tokens(2)
    out = tmp_path / "out"
    frame = ls.sweep(model, "drop", ids, directory=out, quantize="nf4")
    loaded = ls.load(model, quantize="nf4").model
    expected = ls.sweep(loaded, "drop", ids)
    numbers = expected.select_dtypes("number").columns
    pd.testing.assert_frame_equal(frame[numbers], expected[numbers], check_exact=False, atol=1e-7)
    assert not expected.kl_nats.equals(ls.sweep(model, "drop", ids).kl_nats)
    facts = frame.attrs["run"]
    assert facts["arguments"]["quantize"] == "nf4"
    assert facts["arguments"]["versions"]["bitsandbytes"]
    assert facts["model"]["parameters"] == ls.load(model).model.num_parameters()
    for other in ("int8", None):
        with pytest.raises(ls.OutputError, match="with other arguments: `quantize` nf4 there"):
            ls.sweep(model, "drop", ids, directory=out, quantize=other)
    comparison = ls.compare(model, "drop 2", ids, quantize="nf4")
    assert comparison.kl_nats == pytest.approx(expected.set_index("name").kl_nats["drop 2"], abs=1e-6)
    with pytest.raises(ls.PlanError, match="`quantize` is for a model that is loaded by its name"):
        ls.sweep(loaded, "drop", ids, quantize="nf4")


def test_weights_are_quantized_but_not_embedding_and_unembedding(model: Path) -> None:
    loaded = ls.load(model, quantize="int8", dtype="bfloat16").model
    quantized = {name for name, module in loaded.named_modules() if is_quantized(module)}
    assert len(quantized) == 7 * 6
    assert all(".layers." in name for name in quantized)
    assert loaded.lm_head.weight.dtype == loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    four_bits = ls.load(model, quantize="nf4", dtype="bfloat16").model
    assert four_bits.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_the_estimate_counts_what_is_stored(model: Path, quantize: str) -> None:
    loaded = ls.load(model, quantize=quantize).model
    stored = sum(tensor.nbytes for tensor in distinct_tensors(loaded))
    for module in filter(is_quantized, loaded.modules()):
        layer: Any = module
        stored += layer.weight.quant_state.absmax.nbytes if quantize == "nf4" else 4 * layer.out_features
    cost, whole = (ls.estimate(model, "drop", tokens=64, context=32, quantize=name) for name in (quantize, None))
    assert sum(cost.weights.values()) == cost.memory.weights == stored
    assert stored < 0.6 * sum(whole.weights.values())
    assert (cost.flops, cost.parameters) == (whole.flops, whole.parameters)


def test_analyses_of_a_quantized_model(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there were many layers.\n" * 9)
    options: dict[str, Any] = {"quantize": "int8", "directory": tmp_path / "neurons"}
    neurons = ls.analyze("neurons", model, **options)
    expected = ls.analyses.neurons(ls.load(model, quantize="int8").model)
    assert neurons.partition.tolist() == expected.partition.tolist()
    assert neurons.attrs["run"]["arguments"]["quantize"] == "int8"
    words = [model, "--data", text, "-n", 120, "--context", 30, "--quantize", "nf4"]
    found = run("rank", *words, "-o", tmp_path / "rank")
    assert found.exit_code == 0
    assert "238 k parameters in float32 (93 % of them in nf4) on cpu" in " ".join(found.stderr.split())


def test_what_cannot_be_quantized_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ls.save(ls.load(model, quantize="nf4").model, tmp_path / "four-bits", tokenizer=ls.load(model).tokenizer)
    out = tmp_path / "out"

    def refuses(path: Path, words: list[str], code: int, message: str) -> None:
        found = run("sweep", path, "-o", out, *words)
        assert (found.exit_code, message in " ".join(found.stderr.split())) == (code, True), found.stderr
        assert not out.exists()

    text = tmp_path / "text.txt"
    text.write_text("Once upon a time.\n" * 9)
    data = ["--data", str(text)]
    refuses(model, [*data, "--quantize", "int3"], 2, "quantize 'int3' is unknown; use nf4 or int8")
    refuses(model, [*data, "--quantize", "nf4", "--dtype", "float64"], 2, "does not compute in float64")
    refuses(tmp_path / "four-bits", [*data, "--quantize", "nf4"], 2, "is quantized already (bitsandbytes)")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None)
    refuses(model, [*data, "--quantize", "nf4"], 1, "run: pip install 'layersurgery[quantize]'")


def test_a_checkpoint_that_is_quantized_already_is_measured(model: Path, tmp_path: Path) -> None:
    loaded, ids = ls.load(model, quantize="nf4").model, tokens(2)
    ls.save(loaded, tmp_path / "four-bits")
    frame = ls.sweep(tmp_path / "four-bits", "drop", ids)
    assert frame.kl_nats.tolist() == pytest.approx(ls.sweep(loaded, "drop", ids).kl_nats.tolist(), abs=1e-7)
    neurons = ls.analyze("neurons", tmp_path / "four-bits", directory=tmp_path / "out")
    assert neurons.partition.tolist() == ls.analyses.neurons(loaded).partition.tolist()


def test_every_command_that_loads_a_model_to_measure_it_takes_the_option() -> None:
    for words in (
        *(["sweep"], ["rank"], ["prune"], ["stages"], ["compare"], ["reproduce"], ["analyze", "neurons"]),
        *(["analyze", "lens"], ["analyze", "subjoiners"], ["analyze", "probe"], ["analyze", "attention"]),
    ):
        assert "--quantize" in run(*words, "--help").output, words
