"""Which edits of a quantized checkpoint can be written: docs/limits.md has a row for each of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import layersurgery as ls
from tests.checkpoints.test_edit import change_config
from tests.support.zoo import tiny_model

_SETTINGS = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4},
}


@pytest.fixture(params=sorted(_SETTINGS))
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """Return the name of a format, and a checkpoint in it: weights in 8 bits, with scales next to them."""
    directory = tmp_path / "source"
    tiny_model("llama").save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        if request.param == "fp8":
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
        else:
            stem = name.removesuffix(".weight")
            tensors[f"{stem}.qweight"] = tensors.pop(name).mul(100).to(torch.int32)
            tensors[f"{stem}.scales"] = torch.ones(1)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    change_config(directory, quantization_config=_SETTINGS[request.param])
    return request.param, directory


def test_whole_blocks_move_with_their_bytes(quantized: tuple[str, Path], tmp_path: Path) -> None:
    ls.edit_checkpoint(quantized[1], "swap 1 2; drop 4; repeat 0", tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (quantized[1], tmp_path / "out"))
    for position, block in enumerate([0, 0, 2, 1, 3, 5]):
        names = [name for name in before if f".layers.{block}." in name]
        assert names
        for name in names:
            moved = after[name.replace(f".layers.{block}.", f".layers.{position}.")]
            assert torch.equal(moved.view(torch.uint8), before[name].view(torch.uint8))


@pytest.mark.parametrize(("plan", "position", "zeroed"), [
    ("skip-mlp 2", 2, ["mlp.down_proj"]),
    ("skip-attention 2", 2, ["self_attn.o_proj"]),
    ("insert-copy 2 after 3", 4, ["mlp.down_proj", "self_attn.o_proj"]),
])  # fmt: skip
def test_zeros_are_written_where_zero_bytes_are_zero(
    quantized: tuple[str, Path], tmp_path: Path, plan: str, position: int, zeroed: list[str]
) -> None:
    if quantized[0] != "fp8":
        with pytest.raises(ls.UnsupportedEditError, match=r"quantized \(gptq\)"):
            ls.edit_checkpoint(quantized[1], plan, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    ls.edit_checkpoint(quantized[1], plan, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (quantized[1], tmp_path / "out"))
    start = f"model.layers.{position}."
    for name in [name for name in after if name.startswith(start)]:
        is_zero = name.removeprefix(start) in [f"{module}.weight" for module in zeroed]
        expected = before[name.replace(start, "model.layers.2.")].view(torch.uint8)
        assert torch.equal(after[name].view(torch.uint8), torch.zeros_like(expected) if is_zero else expected)


@pytest.mark.parametrize("plan", ["scale 2 0.5", "heads-off 0 of 2", "neurons-off 0 of 2"])
def test_other_numbers_are_refused_by_name(quantized: tuple[str, Path], tmp_path: Path, plan: str) -> None:
    words = "data type F8_E4M3, of which no other numbers" if quantized[0] == "fp8" else r"quantized \(gptq\)"
    with pytest.raises(ls.UnsupportedEditError, match=words):
        ls.edit_checkpoint(quantized[1], plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
