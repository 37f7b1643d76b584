"""Checkpoints of models that also read images or sound, edited on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import layersurgery as ls
from layersurgery.checkpoints.sources import COPIED_FILES
from layersurgery.models.config_fields import text_paths
from tests.support.multimodal import MULTIMODAL, NOT_BUILT, UNMEASURED, multimodal_checkpoint
from tests.support.reference import logits_of
from tests.support.zoo import slow, tokens

# The depth under a name of its own; a weight that torch computes; a prefix beside those of other parts.
QUICK = ("kosmos-2", "apertus1p5", "qwen2_5_omni")
_SEVERAL = "several lists of 6 layers could be the decoder"
# Refused on disk, with a pattern of the message. The parts of real checkpoints differ in depth.
UNSUPPORTED_ON_DISK = {
    "cosmos3_omni": _SEVERAL,
    "deepseek_ocr2": _SEVERAL,
    "nemo_speechlm": _SEVERAL,
}
EDITED = [name for name in MULTIMODAL if name not in UNMEASURED | NOT_BUILT]


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in EDITED])
def test_an_edit_on_disk_is_that_in_memory(name: str, tmp_path: Path) -> None:
    path = multimodal_checkpoint(tmp_path / "source", name)
    if name in UNSUPPORTED_ON_DISK:
        with pytest.raises(ls.UnsupportedEditError, match=UNSUPPORTED_ON_DISK[name]):
            ls.edit_checkpoint(path, "swap 1 3", tmp_path / "out")
        return
    ls.edit_checkpoint(path, "swap 1 3; drop 2" if name != "lfm3_vl" else "swap 1 3", tmp_path / "out")
    model, ids = ls.load(path).model, tokens(1, 8)
    with ls.operate(model, "swap 1 3; drop 2" if name != "lfm3_vl" else "swap 1 3"):
        expected = logits_of(model, ids)
    assert torch.equal(logits_of(ls.load(tmp_path / "out").model, ids), expected)
    assert not torch.equal(logits_of(model, ids), expected)


def test_a_model_whose_layers_run_twice_is_refused(tmp_path: Path) -> None:
    path = multimodal_checkpoint(tmp_path / "source", "diffusion_gemma")
    with pytest.raises(ls.UnsupportedEditError, match="runs each of its layers in an encoder and in a decoder"):
        ls.edit_checkpoint(path, "swap 1 3", tmp_path / "out", blocks="model.decoder.layers")
    assert not (tmp_path / "out").exists()


def test_the_paths_of_text_decoders() -> None:
    vision, text = "vision_model.encoder.layers", "language_model.model.layers"
    encoder = "language_model.model.encoder.layers"
    assert text_paths([vision, text, "multi_modal_projector.layers"]) == [text]
    assert text_paths(["git.image_encoder.vision_model.encoder.layers", "git.encoder.layer"]) == ["git.encoder.layer"]
    assert text_paths([vision, "mlp1", encoder])[-1] == encoder
    assert text_paths(["encoder.layers", text]) == [text]
    assert text_paths([vision]) == []


def test_the_voices_of_an_omni_model_are_kept() -> None:
    assert "spk_dict.pt" in COPIED_FILES
