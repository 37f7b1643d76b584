"""Models whose weights are quantized: edits in memory, saving, sweeps, and analyses of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import layersurgery as ls
from layersurgery.metrics.reference import METRICS, measure
from layersurgery.models.quantized import is_quantized, quantized_rows, undo_cpu_packing
from layersurgery.runs.model_fingerprint import model_fingerprint
from tests.support.reference import logits_of
from tests.support.zoo import tiny_model, tokens

bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantized models need bitsandbytes")

# bitsandbytes packs weights for some CPUs only if their sizes are multiples of 32 and of its blocks of 64.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
Load = Callable[..., Any]


def load_plain(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def load_ours(path: Path, **options: Any) -> Any:
    return ls.load(path, **options).model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "llama"
    tiny_model("llama", **SIZES).save_pretrained(path)
    return path


def settings(name: str, **fields: Any) -> dict[str, Any]:
    return {"quantization_config": BitsAndBytesConfig(**FORMATS[name], **fields)}


@pytest.mark.parametrize("load", [load_plain, load_ours])
@pytest.mark.parametrize(
    ("name", "plan"), [("nf4", "drop 1"), ("fp4-double", "swap 1 2; repeat 3"), ("int8", "repeat 2; drop 0")]
)
def test_an_edited_model_is_saved_and_reloads_equal(
    checkpoint: Path, tmp_path: Path, load: Load, name: str, plan: str
) -> None:
    model = load(checkpoint, dtype=torch.float32, **settings(name))
    ids = tokens(2)
    ls.operate_(model, plan)
    expected = logits_of(model, ids)  # a forward, in which bitsandbytes may pack its weights
    ls.save(model, tmp_path / "out")
    assert torch.equal(logits_of(model, ids), expected)
    reloaded = load(tmp_path / "out")
    assert any(map(is_quantized, reloaded.modules()))
    assert torch.equal(logits_of(reloaded, ids), expected)


def test_an_edit_of_the_files_equals_that_in_memory(checkpoint: Path, tmp_path: Path) -> None:
    model, ids = load_ours(checkpoint, dtype=torch.float32, **settings("nf4")), tokens(2)
    ls.save(model, tmp_path / "whole")
    ls.edit_checkpoint(tmp_path / "whole", "swap 0 3; drop 2", tmp_path / "edited")
    with ls.operate(model, "swap 0 3; drop 2"):
        assert torch.equal(logits_of(load_ours(tmp_path / "edited"), ids), logits_of(model, ids))


@pytest.mark.parametrize("name", FORMATS)
def test_an_edit_and_its_undo_leave_a_used_model_as_it_was(checkpoint: Path, name: str) -> None:
    model = load_plain(checkpoint, dtype=torch.bfloat16, **settings(name))
    before, ids = model_fingerprint(model), tokens(2)
    expected = logits_of(model, ids)
    with ls.operate(model, "drop 1; skip-mlp 2"):
        assert not torch.equal(logits_of(model, ids), expected)
    assert torch.equal(logits_of(model, ids), expected)
    assert model_fingerprint(model) == before
    assert torch.equal(logits_of(model, ids), expected)
    other = load_plain(checkpoint, dtype=torch.bfloat16, **settings("int8" if name != "int8" else "nf4"))
    assert model_fingerprint(other) != before


@pytest.mark.parametrize("double", [False, True])
def test_packing_for_a_cpu_is_undone_exactly(double: bool) -> None:
    functional = bitsandbytes.functional
    if not hasattr(functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("this version of bitsandbytes does not pack weights for a CPU")
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    scales = state.absmax if not double else functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    layer: Any = bitsandbytes.nn.Linear4bit(256, 64, bias=False)
    layer.weight = bitsandbytes.nn.Params4bit(codes.clone(), requires_grad=False, bnb_quantized=True)
    layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(codes.clone(), state)
    undo_cpu_packing(layer)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(state.absmax, scales.reshape(-1).bfloat16().float())
    assert not state.nested


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_sweep_equals_operate_and_dense_metrics(checkpoint: Path, name: str) -> None:
    model = load_ours(checkpoint, dtype=torch.float32, **settings(name))
    ids = tokens(2)
    frame = ls.sweep(model, ["swap", "drop", "skip-attention", "skip-mlp", "repeat 2"], ids)
    p = logits_of(model, ids)[:, :-1].flatten(0, 1)
    assert frame.kl_nats[0] == 0
    for row in frame.iloc[1:].to_dict("records"):
        with ls.operate(model, row["plan"]):
            q = logits_of(model, ids)[:, :-1].flatten(0, 1)
        expected = measure(p, q, ids[:, 1:].flatten()).mean(1)
        assert [row[metric] for metric in METRICS] == pytest.approx(expected.tolist(), abs=2e-6), row["name"]
    with ls.operate(model, "skip-attention 2; skip-mlp 2"):
        skipped = logits_of(model, ids)
    with ls.operate(model, "drop 2"):
        assert torch.equal(logits_of(model, ids), skipped)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_neurons_are_read_from_what_the_weights_stand_for(checkpoint: Path, name: str) -> None:
    model = load_ours(checkpoint, dtype=torch.float32, **settings(name))
    scores, activations = ls.analyses.neurons(model), ls.analyses.lens(model, tokens(2))
    projection = model.model.layers[1].mlp.down_proj
    rows = torch.cat(list(quantized_rows(projection, 50)))
    model.dequantize()
    dense = model.model.layers[1].mlp.down_proj.weight
    assert rows.shape == (128, 64)
    assert torch.allclose(rows, dense.T.float(), rtol=1e-3, atol=1e-6)  # dequantized to float16
    model = model.float()
    expected = ls.analyses.neurons(model)
    assert scores.neurons.tolist() == [128] * 6
    assert scores.partition.tolist() == expected.partition.tolist()
    assert activations.lens_kl_nats.notna().all()


def test_a_skip_is_measured_but_not_saved(checkpoint: Path, tmp_path: Path) -> None:
    model = load_ours(checkpoint, dtype=torch.float32, **settings("nf4"))
    with pytest.raises(ls.UnsupportedEditError, match=r"output weights are quantized.*unquantized checkpoint"):
        ls.operate_(model, "skip-mlp 2")
    ls.operate_(model, "skip-mlp 2", verify=False)
    with pytest.raises(ls.UnsupportedEditError, match="output weights are quantized"):
        ls.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_are_not_quantized_are_named_by_position(checkpoint: Path, tmp_path: Path) -> None:
    model = load_ours(checkpoint, **settings("nf4", llm_int8_skip_modules=["lm_head", "model.layers.3.mlp"]))
    ids = tokens(2)
    ls.operate_(model, "swap 0 1")
    expected = logits_of(model, ids)
    ls.save(model, tmp_path / "swapped")
    assert torch.equal(logits_of(load_ours(tmp_path / "swapped"), ids), expected)
    ls.operate_(model, "drop 1")
    with pytest.raises(ls.UnsupportedEditError, match=r"layers.2 \(block 2\): mlp.down_proj is a Linear in the source"):
        ls.save(model, tmp_path / "dropped")


def test_quantized_weights_are_not_folded(checkpoint: Path) -> None:
    model = load_ours(checkpoint, dtype=torch.float32, **settings("int8"))
    with pytest.raises(ls.UnsupportedEditError, match=r"quantized \(bitsandbytes\).*without quantization"):
        ls.fold(model)


def test_formats_that_may_not_reload_exactly_are_not_saved(checkpoint: Path, tmp_path: Path) -> None:
    model = load_ours(checkpoint, dtype=torch.float32, **settings("nf4"))
    model.hf_quantizer.quantization_config.quant_method = "hqq"
    with pytest.raises(ls.UnsupportedEditError, match=r"quantized by hqq.*have not been shown to reload"):
        ls.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(checkpoint: Path, tmp_path: Path, name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    from transformers import TorchAoConfig

    model = load_ours(checkpoint, dtype=torch.float32, quantization_config=TorchAoConfig(getattr(quantization, name)()))
    ids = tokens(2)
    frame = ls.sweep(model, "drop,skip-mlp", ids).set_index("name")
    p = logits_of(model, ids)[:, :-1].flatten(0, 1)
    for plan in ("drop 2", "skip-mlp 3"):
        with ls.operate(model, plan):
            q = logits_of(model, ids)[:, :-1].flatten(0, 1)
        expected = measure(p, q, ids[:, 1:].flatten()).mean(1).tolist()
        assert frame.loc[plan, list(METRICS)].tolist() == pytest.approx(expected, abs=2e-6)
    assert ls.analyses.neurons(model).neurons.tolist() == [128] * 6
    ls.operate_(model, "repeat 2; drop 1")
    expected_logits = logits_of(model, ids)
    ls.save(model, tmp_path / "out")
    assert torch.equal(logits_of(load_ours(tmp_path / "out"), ids), expected_logits)


def test_quanto_is_measured_but_not_saved(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    from transformers import QuantoConfig

    model = load_ours(checkpoint, dtype=torch.float32, quantization_config=QuantoConfig(weights="int8"))
    ids = tokens(2)
    frame = ls.sweep(model, "drop,skip-mlp", ids).set_index("name")
    p = logits_of(model, ids)[:, :-1].flatten(0, 1)
    with ls.operate(model, "skip-mlp 3"):
        q = logits_of(model, ids)[:, :-1].flatten(0, 1)
    expected = measure(p, q, ids[:, 1:].flatten()).mean(1).tolist()
    assert frame.loc["skip-mlp 3", list(METRICS)].tolist() == pytest.approx(expected, abs=2e-6)
    with pytest.raises(ls.UnsupportedEditError, match=r"quantized by quanto.*cannot write"):
        ls.save(model, tmp_path / "out")
