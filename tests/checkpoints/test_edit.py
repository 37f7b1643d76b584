"""The files of an edited checkpoint have the expected contents, byte by byte."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import layersurgery as ls
from layersurgery.checkpoints import gguf_conversion
from layersurgery.checkpoints.quantization import rename_layers
from layersurgery.checkpoints.safetensors_header import DISK_BLOCK_BYTES, read_header
from layersurgery.checkpoints.tensor_index import find_block_prefix
from layersurgery.errors import LayerSurgeryWarning
from layersurgery.models.block_list import find_block_list
from layersurgery.models.config_fields import find_section
from layersurgery.models.config_periods import READ_BY_POSITION
from layersurgery.models.config_rewrite import rewrite
from layersurgery.plans.route import Route
from tests.support.reference import logits_along, logits_of
from tests.support.zoo import DEPTH, tiny_model, tokens


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def change_config(directory: Path, **fields: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(config))
    return config


def resave(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors), directory / "model.safetensors", metadata={"format": "pt"})


def test_a_swap_changes_headers_only(sharded: Path, tmp_path: Path) -> None:
    ls.edit_checkpoint(sharded, ls.swap(1), tmp_path / "out")
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == names
    assert len(names) > 2
    for name in names:
        old, new = read_header(sharded / name), read_header(tmp_path / "out" / name)
        assert new.data_offset % DISK_BLOCK_BYTES == old.data_offset % DISK_BLOCK_BYTES
        data = [(d / name).read_bytes()[h.data_offset :] for d, h in ((sharded, old), (tmp_path / "out", new))]
        assert data[0] == data[1]
        assert new.metadata == old.metadata


def test_the_index_matches_the_files(sharded: Path, tmp_path: Path) -> None:
    ls.edit_checkpoint(sharded, "drop 2; repeat 4", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    file_of = {
        name: file.name for file in (tmp_path / "out").glob("*.safetensors") for name in read_header(file).tensors
    }
    assert index["weight_map"] == file_of
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors_of(tmp_path / "out").values())


def test_empty_shards_are_removed_and_the_others_renumbered(sharded: Path, tmp_path: Path) -> None:
    before = len(list(sharded.glob("*.safetensors")))
    ls.edit_checkpoint(sharded, "drop 1:5", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert 1 < len(names) < before
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2


def test_a_repeat_is_written_twice_and_a_drop_not_at_all(llama: Path, tmp_path: Path) -> None:
    ls.edit_checkpoint(llama, "repeat 3; drop 0", tmp_path / "out")
    old, new = tensors_of(llama), tensors_of(tmp_path / "out")
    for position, block in enumerate([1, 2, 3, 3, 4, 5]):
        for name in (n for n in new if n.startswith(f"model.layers.{position}.")):
            assert torch.equal(new[name], old[name.replace(f"layers.{position}.", f"layers.{block}.")])
    assert len(new) == len(old)
    assert new.keys() == {name for name in old if not name.startswith("model.layers.9")}


def test_nothing_else_in_the_config_changes(llama: Path, tmp_path: Path) -> None:
    old = change_config(
        llama, rotary_pct=0.25, torch_dtype="float32", _odd={"nested": [1, 2, None]}, auto_map={"AutoConfig": "x.Y"}
    )
    (llama / "x.py").write_text("raise SystemExit('remote code must not run')")
    ls.edit_checkpoint(llama, "drop 2", tmp_path / "out")
    new = json.loads((tmp_path / "out" / "config.json").read_text())
    assert new == old | {"num_hidden_layers": DEPTH - 1}
    assert list(new) == list(old)
    assert (tmp_path / "out" / "x.py").read_text() == (llama / "x.py").read_text()


def test_the_other_files_of_the_directory_are_copied(llama: Path, tmp_path: Path) -> None:
    copied = [
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "merges.txt",
        "spiece.model",
    ]
    not_copied = ["optimizer.pt", "pytorch_model.bin", "training.log", "events.out"]
    for name in copied[1:] + not_copied:
        (llama / name).write_text(name)
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "rag.jinja").write_text("rag")
    ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    expected = {"config.json", "model.safetensors", "README.md", "additional_chat_templates/rag.jinja", *copied}
    assert names == expected


def test_layers_that_other_files_name_follow_or_are_left_out(llama: Path, tmp_path: Path) -> None:
    quantized = {"modules_to_not_convert": ["model.layers.4.mlp", "lm_head"], "w_bit": 4}
    files: dict[str, Any] = {
        **dict.fromkeys(("quantize_config.json", "quant_config.json", "hf_quant_config.json"), quantized),
        "params.json": {"dim": 32, "n_layers": DEPTH, "vision_encoder": {"num_hidden_layers": 24}},
        "genai_config.json": {"model": {"decoder": {"num_hidden_layers": DEPTH}}},
        "scales.json": {"model.layers.4.self_attn.k_scale": 0.5},
        "notes.json": {"layers": "6"},
        "tokenizer_config.json": {"text": "model.layers.4."},
    }
    for name, value in files.items():
        (llama / name).write_text(json.dumps(value))
    (llama / "recipe.yaml").write_text("ignore: ['model.layers.4.mlp.down_proj']\nlayer_range: [0, 6]\n")
    with pytest.warns(LayerSurgeryWarning, match="left out, .*: genai_config.json, scales.json, recipe.yaml"):
        ls.edit_checkpoint(llama, ls.drop(1), tmp_path / "out")
    files |= dict.fromkeys(
        ("quantize_config.json", "quant_config.json", "hf_quant_config.json"),
        quantized | {"modules_to_not_convert": ["model.layers.3.mlp", "lm_head"]},
    )
    files["params.json"] |= {"n_layers": DEPTH - 1}
    del files["genai_config.json"], files["scales.json"]
    written = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert {name: written[name] for name in written.keys() - {"config.json", "generation_config.json"}} == files
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    assert not ls.edit_checkpoint(llama, ls.skip_mlp(1), tmp_path / "skip").notes  # each block keeps its number
    assert (tmp_path / "skip" / "recipe.yaml").read_bytes() == (llama / "recipe.yaml").read_bytes()


def test_the_card_states_the_provenance(llama: Path, tmp_path: Path) -> None:
    (llama / "README.md").write_text("---\nlicense: mit\nbase_model: org/original\nlanguage: [en]\n---\nOld text")
    ls.edit_checkpoint(llama, "swap 1 2; skip-mlp 4", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "org/original"
    assert metadata["base_model_relation"] == "merge"
    assert "Made from `llama` by" in card
    assert str(tmp_path) not in card
    assert metadata["license"] == "mit"
    assert metadata["language"] == ["en"]
    assert "`swap 1 2; skip-mlp 4`" in card
    assert "`0 2 1 3 4-mlp 5`" in card
    assert ls.__version__ in card
    assert "Old text" not in card


@pytest.mark.parametrize("plan", ["swap 1 4; move 0 after 2", "repeat 2:4; reverse 4:6", "insert-copy 2 after 0"])
def test_the_card_says_how_to_undo_the_edit(llama: Path, tmp_path: Path, plan: str) -> None:
    ls.edit_checkpoint(llama, plan, tmp_path / "out")
    command = re.search(
        r"`layersurgery reorder DIRECTORY --order '(.+)'`", (tmp_path / "out" / "README.md").read_text()
    )
    assert command is not None
    ls.edit_checkpoint(tmp_path / "out", ls.reorder(command[1]), tmp_path / "back")
    source, back = (load_file(path / "model.safetensors") for path in (llama, tmp_path / "back"))
    assert source.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in source.items())


def test_the_card_says_which_blocks_are_gone(llama: Path, tmp_path: Path) -> None:
    ls.edit_checkpoint(llama, "drop 1:3; skip-mlp 4", tmp_path / "out")
    assert "does not have the weights of its blocks 1 2 4 unchanged" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ("", {}),
        ("# Only text, no metadata\n", {}),
        ("---\nlicense: [broken\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\ndate: 2024-99-99\n---\n", {}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\nText", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: Lizenz für alle\nmetrics: [f1]\nlanguage: [en, de]\n"
            "base_model: [a/b, c/d]\n---\n",
            {
                "base_model": ["a/b", "c/d"],
                "base_model_relation": "merge",
                "license": "other",
                "license_name": "Lizenz für alle",
                "language": ["en", "de"],
            },
        ),
    ],
)
def test_the_card_inherits_what_also_holds_for_the_edited_model(
    llama: Path, tmp_path: Path, old: str, expected: dict[str, Any]
) -> None:
    (llama / "README.md").write_text(old, "utf-8", newline="")
    ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out", verify=False)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    metadata = yaml.safe_load(card.split("---")[1])
    added = {"library_name": "transformers", "tags": ["layersurgery", "model surgery"]}
    assert list(metadata.items()) == list((expected | added).items())
    assert ("Lizenz für alle" in card) == ("license_name" in expected)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, {}),
        (
            {"license": "gemma", "languages": ["en"], "source.repo_url": "https://huggingface.co/org/original"},
            {
                "base_model": "org/original",
                "base_model_relation": "merge",
                "license": "gemma",
                "language": ["en"],
            },
        ),
        (
            {
                "license": "other",
                "license.name": "own",
                "license.link": "https://example.org/own",
                "base_model.count": 2,
                "base_model.0.repo_url": "https://huggingface.co/org/first",
                "base_model.1.repo_url": "https://example.org/org/second",
            },
            {
                "base_model": "org/first",
                "base_model_relation": "merge",
                "license": "other",
                "license_name": "own",
                "license_link": "https://example.org/own",
            },
        ),
    ],
)
def test_the_card_of_a_gguf_file_has_what_the_file_states(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: dict[str, Any], expected: dict[str, Any]
) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    for key, value in stated.items():
        add: Any = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
        add(f"general.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    monkeypatch.setenv("LAYERSURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        gguf_conversion, "_convert", lambda _, target: shutil.copytree(llama, target, dirs_exist_ok=True)
    )
    ls.edit_checkpoint(tmp_path / "small.gguf", ls.swap(1), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    metadata = yaml.safe_load(card.split("---")[1])
    assert {key: metadata[key] for key in metadata.keys() - {"library_name", "tags"}} == expected
    assert "Made from `small.gguf` by" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool]
)
def test_every_dtype_is_copied_bit_for_bit(llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    resave(llama, lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})
    ls.edit_checkpoint(llama, "move 1 after 4; drop 2", tmp_path / "out")
    old, new = tensors_of(llama), tensors_of(tmp_path / "out")
    for position, block in enumerate([0, 3, 4, 1, 5]):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert new[name.format(position)].dtype == dtype
        assert torch.equal(new[name.format(position)].view(torch.uint8), old[name.format(block)].view(torch.uint8))


def test_all_tensors_of_a_block_move_with_it(llama: Path, tmp_path: Path) -> None:
    def with_extras(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for block in range(DEPTH):
            tensors[f"model.layers.{block}.self_attn.rotary_emb.inv_freq"] = torch.full((4,), float(block))
            tensors[f"model.layers.{block}.mlp.down_proj.weight_scale"] = torch.full((1,), float(block))
        tensors["vision_tower.encoder.layers.1.weight"] = torch.ones(3)
        tensors["model.layers_extra.1.weight"] = torch.ones(2)
        return tensors

    resave(llama, with_extras)
    ls.edit_checkpoint(llama, ls.swap(1, 4), tmp_path / "out")
    new = tensors_of(tmp_path / "out")
    assert new["model.layers.1.self_attn.rotary_emb.inv_freq"][0] == 4
    assert new["model.layers.4.mlp.down_proj.weight_scale"][0] == 1
    assert torch.equal(new["vision_tower.encoder.layers.1.weight"], torch.ones(3))
    assert torch.equal(new["model.layers_extra.1.weight"], torch.ones(2))


def test_prediction_heads_after_the_last_block_stay_after_it(llama: Path, tmp_path: Path) -> None:
    change_config(llama, num_nextn_predict_layers=1)
    resave(llama, lambda tensors: tensors | {f"model.layers.{DEPTH}.eh_proj.weight": torch.full((2,), 7.0)})
    ls.edit_checkpoint(llama, "drop 1", tmp_path / "dropped")
    ls.edit_checkpoint(llama, "repeat 1", tmp_path / "repeated")
    assert tensors_of(tmp_path / "dropped")[f"model.layers.{DEPTH - 1}.eh_proj.weight"][0] == 7
    assert tensors_of(tmp_path / "repeated")[f"model.layers.{DEPTH + 1}.eh_proj.weight"][0] == 7


def test_names_without_the_backbones_prefix(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "source")
    resave(
        tmp_path / "source",
        lambda tensors: {name.removeprefix("transformer."): value for name, value in tensors.items()},
    )
    for plan in ("swap 1 2", "drop 0"):
        out = tmp_path / plan.replace(" ", "-")
        ls.edit_checkpoint(tmp_path / "source", plan, out)
        assert "h.0.ln_1.weight" in tensors_of(out)
        route = ls.Plan.parse(plan).route(DEPTH)
        reloaded = AutoModelForCausalLM.from_pretrained(out).eval()
        assert torch.equal(logits_of(reloaded, tokens()), logits_along(model, route, tokens()))
    one = tmp_path / "skip"
    ls.edit_checkpoint(tmp_path / "source", "skip-attention 3", one)
    assert not tensors_of(one)["h.3.attn.c_proj.weight"].any()
    assert not tensors_of(one)["h.3.attn.c_proj.bias"].any()


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    tiny_model("llama-tied").save_pretrained(tmp_path / "source")
    ls.edit_checkpoint(tmp_path / "source", "drop 2", tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_vision_tower_of_the_same_depth_is_not_the_decoder(tmp_path: Path) -> None:
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    text |= {"head_dim": 8, "vocab_size": 128, "sliding_window": 4, "sliding_window_pattern": 3}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "image_size": 28,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "source")
    ls.edit_checkpoint(tmp_path / "source", "swap 1 2; drop 4", tmp_path / "out")
    old, new = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "out")
    vision_names = [name for name in old if "vision" in name]
    assert len(vision_names) > DEPTH
    assert all(torch.equal(old[name], new[name]) for name in vision_names)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"]["num_hidden_layers"] == DEPTH - 1
    assert written["vision_config"]["num_hidden_layers"] == DEPTH
    kinds = json.loads((tmp_path / "source" / "config.json").read_text())["text_config"]["layer_types"]
    assert written["text_config"]["layer_types"] == [kinds[block] for block in (0, 2, 1, 3, 5)]
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize(("name", "section"), [("qwen2_5_vl", 2), ("qwen3_vl", 2), ("glm4v", 2)])
@pytest.mark.parametrize("plan", ["skip-mlp 1", "skip-attention 2; drop 4"])
def test_branches_of_a_decoder_without_a_causal_model_of_its_own(
    tmp_path: Path, name: str, section: int, plan: str
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "pad_token_id": 0}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [section, 1, 1]}
    vision = sizes | {
        "depth": 2,
        "num_heads": 4,
        "out_hidden_size": 32,
        "image_size": 28,
        "deepstack_visual_indexes": [],
    }
    config = CONFIG_MAPPING[name](
        text_config=sizes | heads | {"num_hidden_layers": DEPTH, "rope_parameters": rope}, vision_config=vision
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path / "source")
    ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    before = logits_of(model, tokens())
    with ls.operate(model, plan):
        edited = logits_of(model, tokens())
    assert torch.equal(logits_of(reloaded, tokens()), edited)
    assert not torch.allclose(edited, before)


def test_a_decoder_that_cannot_be_run_alone_is_refused_shortly(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError(f"unknown classes: {'x' * 3000}")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fail)
    with pytest.raises(
        ls.UnsupportedEditError, match="cannot be run with random weights: transformers cannot"
    ) as error:
        ls.edit_checkpoint(llama, "skip-mlp 1", tmp_path / "out", verify=False)
    assert len(str(error.value)) < 500


def test_a_sliding_pattern_is_written_as_the_list_that_its_class_reads(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")
    model.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    kinds = config.pop("layer_types")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"sliding_window_pattern": 3}))
    for verify in (True, False):
        out = tmp_path / f"verify-{verify}"
        ls.edit_checkpoint(tmp_path / "source", ls.swap(1), out, verify=verify)
        written = json.loads((out / "config.json").read_text())
        assert written["layer_types"] == [kinds[block] for block in (0, 2, 1, 3, 4, 5)]
        reloaded = AutoModelForCausalLM.from_pretrained(out).eval()
        assert torch.equal(logits_of(reloaded, tokens()), logits_along(model, ls.swap(1).route(DEPTH), tokens()))


def test_layer_numbers_that_begin_at_one_in_a_nested_dictionary(tmp_path: Path) -> None:
    nested = {"full_attn_layers": [3, 6], "kda_layers": [1, 2, 4, 5], "head_dim": 8, "num_heads": 4}
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    model = tiny_model("kimi_linear", linear_attn_config=nested, num_key_value_heads=4, **sizes)
    model.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    published = {key: value for key, value in config.items() if key not in ("layer_types", "mlp_layer_types")}
    (tmp_path / "source" / "config.json").write_text(json.dumps(published | {"first_k_dense_replace": 1}))
    plan = ls.Plan.parse("drop 4; swap 2 3; repeat 5")
    ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["linear_attn_config"] == nested | {"full_attn_layers": [4, 5, 6], "kda_layers": [1, 2, 3]}
    expected = logits_along(model, plan.route(DEPTH), tokens())
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), tokens()), expected)
    with ls.operate(model, plan):
        assert model.config.linear_attn_config == written["linear_attn_config"]
        assert torch.equal(logits_of(model, tokens()), expected)
    assert model.config.linear_attn_config == nested


def test_a_count_of_first_layers_becomes_the_list_that_its_class_reads(tmp_path: Path) -> None:
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    sizes |= {"linear_head_dim": 8, "linear_num_heads": 4}
    model = tiny_model("kimi_linear", num_key_value_heads=4, **sizes)
    model.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    assert config.pop("mlp_layer_types")[:2] == ["dense", "sparse"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"first_k_dense_replace": 1}))
    for plan in ("swap 0 1", "drop 0", "drop 1"):
        out = tmp_path / plan
        ls.edit_checkpoint(tmp_path / "source", plan, out)
        written = json.loads((out / "config.json").read_text())
        # No number that contradicts the list is left for programs that read only the number.
        expected = {"swap 0 1": None, "drop 0": 0, "drop 1": 1}[plan]
        assert written.get("first_k_dense_replace") == expected
        assert ("mlp_layer_types" in written) is (plan == "swap 0 1")
        route = ls.Plan.parse(plan).route(DEPTH)
        reloaded = AutoModelForCausalLM.from_pretrained(out).eval()
        assert torch.equal(logits_of(reloaded, tokens()), logits_along(model, route, tokens()))


def test_default_layer_types_are_written_also_without_the_check(tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    model.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    kinds = config.pop("layer_types")
    assert len(set(kinds)) == 2
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    ls.edit_checkpoint(tmp_path / "source", ls.swap(1), tmp_path / "out", verify=False)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits_of(reloaded, tokens()), logits_along(model, ls.swap(1).route(DEPTH), tokens()))


def test_layer_names_in_quantization_settings() -> None:
    where = {0: [0], 1: [2], 2: [1, 3]}
    value = {
        "quant_method": "fp8",
        "ignored_layers": [
            "lm_head",
            "model.layers.1.mlp",
            "layers.2.self_attn.q_proj",
            "model.layers.9.mlp",
            "model.layers.10",
        ],
        "per": {"model.layers.2": {"bits": 4}, "vision.layers.1": 1},
        "bits": 8,
    }
    assert rename_layers(value, where, "model.layers", {}) == {
        "quant_method": "fp8",
        "ignored_layers": ["lm_head", "model.layers.2.mlp", "layers.1.self_attn.q_proj", "layers.3.self_attn.q_proj"],
        "per": {"model.layers.1": {"bits": 4}, "model.layers.3": {"bits": 4}, "vision.layers.1": 1},
        "bits": 8,
    }


_MODULES = dict.fromkeys(range(21), ("", "mlp", "mlp.gate", "linear_attn.conv1d", "mlp.experts.1.down_proj"))


@pytest.mark.parametrize(
    "pattern",
    [
        "re:.*conv1d.*", "re:.*gate$", "re:.*mlp.experts.1.*", r"-:model\.layers\.\d+\.mlp", "*.layers.*.mlp*",
        "model.layers.[0-9]*", r"re:.*layers\.(0|1)\..*", "re:.*vision_tower.layers.1.*", "re:.*q4.*",
    ],
)  # fmt: skip
def test_patterns_that_answer_alike_for_the_moved_blocks_are_kept(pattern: str) -> None:
    positions = {block: [block] for block in range(21)} | {18: [19], 19: [18]}
    value = {"ignore": [pattern], "dynamic": {pattern: {}}}
    assert rename_layers(value, positions, "model.layers", _MODULES) == value


@pytest.mark.parametrize(
    "pattern",
    [
        r"re:.*layers\.(18|2)\..*", r"+:.*\.(?:18|20)\..*", "model.layers.18*", "model.layers.1[18].mlp",
        "re:.*layers.18.mlp.*|.*layers.2.mlp.*", r"re:^(?!vision).*layers\.18\.", r"re:layers\.1[0-8]\.mlp$",
        r"re:language_model\.layers\.18\.",
    ],
)  # fmt: skip
def test_patterns_that_answer_differently_for_the_moved_blocks_are_refused(pattern: str) -> None:
    positions = {block: [block] for block in range(21)} | {18: [19], 19: [18]}
    with pytest.raises(ls.UnsupportedEditError, match="cannot be renumbered"):
        rename_layers([pattern], positions, "model.layers", _MODULES)


def test_an_ignore_list_with_digits_is_carried(llama: Path, tmp_path: Path) -> None:
    settings = {"quant_method": "compressed-tensors", "ignore": ["re:.*conv1d.*", "model.layers.1.mlp.up_proj"]}
    change_config(llama, quantization_config=settings)
    ls.edit_checkpoint(llama, "drop 0", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["ignore"] == ["re:.*conv1d.*", "model.layers.0.mlp.up_proj"]
    change_config(llama, quantization_config=settings | {"ignore": ["re:.*layers.1.mlp.*"]})
    with pytest.raises(ls.UnsupportedEditError, match="list the names of the modules instead"):
        ls.edit_checkpoint(llama, "drop 0", tmp_path / "refused")


@pytest.mark.parametrize(
    ("fields", "plan", "expected"),
    [
        ({"layer_types": list("abcd")}, "swap 1 2", {"layer_types": list("acbd")}),
        ({"no_rope_layers": [1, 0, 1, 0]}, "drop 0", {"no_rope_layers": [0, 1, 0]}),
        ({"mlp_only_layers": [1]}, "swap 1 2", {"mlp_only_layers": [2]}),
        ({"mlp_only_layers": [1, 3]}, "repeat 1; drop 3", {"mlp_only_layers": [1, 2]}),
        ({"odd": [0, 1, 2, 3]}, "drop 1", {"odd": [0, 1, 2]}),
        ({"first_k_dense_replace": 2}, "drop 0", {"first_k_dense_replace": 1}),
        ({"first_k_dense_replace": 2}, "repeat 1", {"first_k_dense_replace": 3}),
        ({"num_kv_shared_layers": 2}, "swap 2 3", {"num_kv_shared_layers": 2}),
        ({"num_kv_shared_layers": 2}, "drop 3", {"num_kv_shared_layers": 1}),
        ({"hybrid_override_pattern": "M-M*"}, "swap 1 3", {"hybrid_override_pattern": "M*M-"}),
        ({"overrides": {"1": "x", "3": "y"}}, "swap 1 2", {"overrides": {"2": "x", "3": "y"}}),
        (
            {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
            "drop 0",
            {"moe_layer_start_index": 0, "moe_layer_end_index": 2},
        ),
        ({"decoder_sparse_step": 2}, "swap 1 2", {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1]}),
        ({"attention_types": [[["g", "l"], 2]]}, "swap 1 2; drop 0", {"attention_types": [[["g", "l", "l"], 1]]}),
        ({"scale_attn_by_inverse_layer_idx": True}, "drop 3", {"scale_attn_by_inverse_layer_idx": True}),
        ({"layer_types": list("abcdX")}, "swap 1 2", {"layer_types": list("acbdX")}),
        (
            {"text_config": {"num_hidden_layers": 4, "layer_types": list("abcd")}},
            "drop 0",
            {"text_config": {"num_hidden_layers": 3, "layer_types": list("bcd")}},
        ),
        (
            {"moe_layer_start_index": 1, "moe_layer_end_index": -1},
            "reorder 1 2 3 0",
            {"moe_layer_start_index": 0, "moe_layer_end_index": 2},
        ),
        ({"eos_token_id": [5, 6, 7, 8]}, "swap 1 2", {"eos_token_id": [5, 6, 7, 8]}),
        ({"odd": [5, 6, 6, 7]}, "swap 1 2", {"odd": [5, 6, 6, 7]}),
        ({"sub": {"layer_types": list("abcd"), "x": 1}}, "swap 1 2", {"sub": {"layer_types": list("acbd"), "x": 1}}),
        ({"sub": {"deep": {"mlp_only_layers": [1]}}}, "drop 0", {"sub": {"deep": {"mlp_only_layers": [0]}}}),
        (
            {"linear_attn_config": {"kda_layers": [1, 2, 4]}},
            "swap 2 3",
            {"linear_attn_config": {"kda_layers": [1, 2, 3]}},
        ),
        ({"full_attn_layers": [4]}, "repeat 3; drop 0", {"full_attn_layers": [3, 4]}),
        ({"moe_layers_enum": "1,3"}, "repeat 1", {"moe_layers_enum": "1,2,4"}),
        ({"sub": {"first_k_dense_replace": 2}}, "drop 0", {"sub": {"first_k_dense_replace": 1}}),
        ({"rope_scaling": {"long_factor": [1, 2, 3, 4]}}, "drop 0", {"rope_scaling": {"long_factor": [1, 2, 3, 4]}}),
        ({"vision_config": {"layer_types": list("abcd")}}, "drop 0", {"vision_config": {"layer_types": list("abcd")}}),
        ({"odd_layers": [0, 1]}, "swap 2 3", {"odd_layers": [0, 1]}),
    ],
)
def test_config_fields_follow_the_route(fields: dict[str, Any], plan: str, expected: dict[str, Any]) -> None:
    config = {"model_type": "x", "num_hidden_layers": 4, **fields}
    new = rewrite(config, find_section(config), ls.Plan.parse(plan).route(4))
    assert {key: new[key] for key in expected} == expected
    assert new["num_hidden_layers"] == len(ls.Plan.parse(plan).route(4))
    assert config == {"model_type": "x", "num_hidden_layers": 4, **fields}


_PERIOD = {"full_attention_interval": 2, "layer_types": ["linear_attention", "full_attention"] * 2}


@pytest.mark.parametrize(
    ("fields", "plan", "expected"),
    [
        (_PERIOD, "swap 1 2", None),
        (_PERIOD, "drop 3", 2),
        (_PERIOD, "drop 0:2", 2),
        (_PERIOD, "drop 0 2", 1),
        (_PERIOD, "repeat 0", None),
        (_PERIOD, "repeat 0; repeat 2", 3),
        ({"sliding_window_pattern": "LG", "layer_types": ["sliding_attention", "full_attention"] * 2}, "drop 1", 3),
        ({"sliding_window_pattern": "LG", "layer_types": ["sliding_attention", "full_attention"] * 2}, "drop 3", "LG"),
        ({"sliding_window_pattern": 2}, "drop 1", 2),
        ({"no_rope_layer_interval": 2, "no_rope_layers": [1, 0, 1, 0]}, "swap 0 1", None),
        ({"interleave_moe_layer_step": 2, "moe_layers": [1, 3]}, "drop 0", None),
        ({"interleave_moe_layer_step": 2, "moe_layers": [1, 3]}, "drop 0 2", 1),
        ({"global_attn_every_n_layers": 2, "layer_types": ["full_attention", "sliding_attention"] * 2}, "drop 0", None),
        ({"max_window_layers": 2, "layer_types": list("abcd")}, "drop 0", 2),
        ({"index_topk_freq": 2, "indexer_types": ["full", "full", "shared", "full"]}, "drop 3", 2),
        ({"index_topk_freq": 2, "indexer_types": ["full", "full", "shared", "full"]}, "drop 2", 1),
    ],
)
def test_a_number_that_describes_a_list_follows_it_or_is_removed(
    fields: dict[str, Any], plan: str, expected: object
) -> None:
    config = {"num_hidden_layers": 4, **fields}
    new = rewrite(config, find_section(config), ls.Plan.parse(plan).route(4))
    assert new.get(next(iter(fields))) == expected
    assert new.keys() == (config.keys() if expected else config.keys() - {next(iter(fields))})


@pytest.mark.parametrize("name", ["qwen3_next", "exaone4", "llama4_text"])
@pytest.mark.parametrize("plan", ["drop 4", "drop 1 4"])
def test_files_and_models_keep_no_number_that_contradicts_their_list(tmp_path: Path, name: str, plan: str) -> None:
    field = {"qwen3_next": "full_attention_interval", "exaone4": "sliding_window_pattern"}.get(
        name, "no_rope_layer_interval"
    )
    model = tiny_model(name, **{field: 3})
    expected = None if plan == "drop 4" else 2
    model.save_pretrained(tmp_path / "source")
    before = dict(vars(model.config))
    ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "file")
    with ls.operate(model, plan):
        ls.save(model, tmp_path / "memory")
        for out in (tmp_path / "file", tmp_path / "memory"):
            assert json.loads((out / "config.json").read_text()).get(field) == expected
            reloaded = AutoModelForCausalLM.from_pretrained(out).eval()
            assert torch.equal(logits_of(reloaded, tokens()), logits_of(model, tokens()))
    assert vars(model.config) == before


def test_a_period_that_other_programs_take_from_the_position_is_noted(tmp_path: Path) -> None:
    kinds = [*["sliding_attention"] * 5, "full_attention"] * 2
    tiny_model("gemma3_text", num_hidden_layers=12, layer_types=kinds, sliding_window_pattern=6).save_pretrained(
        tmp_path / "source"
    )
    for plan, gone in (("drop 0:6", False), ("skip-mlp 2", False), ("drop 4", True), ("swap 5 6", True)):
        result = ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "out", overwrite=True, verify=False)
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert ("_sliding_window_pattern" in written, "sliding_window_pattern" in written) == (not gone, not gone)
        card = (tmp_path / "out" / "README.md").read_text()
        assert len(result.notes) == gone
        for note in result.notes:
            assert note in card
            assert "llama.cpp and mlx-lm would run another model" in note
            assert "whole groups of 6 layers" in note
            assert "GGUF" not in note, "llama.cpp reads no list of these types from the file"


@pytest.mark.parametrize("name", ["cohere2", "gemma2", "gpt_oss", "llama4_text", "smollm3"])
def test_every_family_that_is_read_by_position_has_a_note(tmp_path: Path, name: str) -> None:
    interval = {"no_rope_layer_interval": 4} if name in ("llama4_text", "smollm3") else {}
    tiny_model(name, num_hidden_layers=8, **interval).save_pretrained(tmp_path / "source")
    number = READ_BY_POSITION[name].number
    whole = ls.edit_checkpoint(tmp_path / "source", f"drop 0:{number}", tmp_path / "whole")
    broken = ls.edit_checkpoint(tmp_path / "source", "drop 1", tmp_path / "broken")
    assert (len(whole.notes), len(broken.notes)) == (0, 1)


def test_a_period_without_a_list_of_an_unknown_type_is_refused(llama: Path, tmp_path: Path) -> None:
    change_config(llama, model_type="unheard_of", full_attention_interval=3)
    ls.edit_checkpoint(llama, "drop 3:6", tmp_path / "out", verify=False)
    with pytest.raises(ls.UnsupportedEditError, match="full_attention_interval places the layers of one kind"):
        ls.edit_checkpoint(llama, "drop 1", tmp_path / "refused", verify=False)


@pytest.mark.parametrize(
    ("fields", "plan", "message"),
    [
        ({"mystery": [1, 2, 3, 4]}, "swap 1 2", "'mystery' is a list of 4 values for 4 layers"),
        ({"first_k_dense_replace": 2}, "swap 1 2", "first_k_dense_replace = 2"),
        ({"num_kv_shared_layers": 2}, "swap 0 1", "num_kv_shared_layers = 2"),
        ({"mlp_only_layers": [[1, 2]]}, "swap 0 1", "should hold layer numbers from 0 to 3"),
        ({"sub": {"kda_layers": [0, 4]}}, "swap 0 1", "'kda_layers' should hold layer numbers from 1 to 4"),
        ({"sub": {"mystery": [1, 2, 3, 4]}}, "swap 1 2", "'mystery' is a list of 4 values for 4 layers"),
        ({"odd_layers": [1, 2]}, "drop 0", r"'odd_layers' seems to hold layer numbers, \[1, 2\]"),
        ({"n_input_layers": 1}, "drop 3", "n_input_layers = 1 seems to count or name layers of 4"),
        ({"n_layers_in_coda": 2}, "repeat 1", "n_layers_in_coda = 2"),
        ({"loop": {"loop_layer_index_end": 3}}, "swap 0 1", "loop_layer_index_end = 3"),
        ({"layer_types": ["a", "b"]}, "swap 0 1", "has 2 values for 4 layers"),
        ({"scale_attn_by_inverse_layer_idx": True}, "swap 0 1", "scales the attention of each layer by its position"),
    ],
)
def test_fields_that_cannot_follow_are_refused_by_name(fields: dict[str, Any], plan: str, message: str) -> None:
    config = {"num_hidden_layers": 4, **fields}
    with pytest.raises(ls.UnsupportedEditError, match=message):
        rewrite(config, find_section(config), ls.Plan.parse(plan).route(4))


def test_numbers_that_count_something_else_than_layers_are_carried() -> None:
    config: dict[str, Any] = {"num_hidden_layers": 4, "mm_projector_layers": 2, "mtp_layers": 1, "encoder_layers": 4}
    config |= {"hidden_size_per_layer_input": 2, "loop_rank": 3, "frozen_layers": 0, "tie_layers": True}
    assert rewrite(config, find_section(config), Route([2, 1])) == {**config, "num_hidden_layers": 2}
    config["n_input_layers"] = 2
    assert rewrite(config, find_section(config), ls.Plan.parse("skip-mlp 1").route(4)) == config


def test_depth_under_its_other_names() -> None:
    for name in ("n_layer", "n_layers", "num_layers"):
        config = {name: 4}
        assert rewrite(config, find_section(config), Route([0, 1])) == {name: 2}
    nested = {"vision_config": {"num_hidden_layers": 9}, "text_config": {"num_hidden_layers": 4}}
    assert rewrite(nested, find_section(nested), Route([0]))["text_config"] == {"num_hidden_layers": 1}


def test_the_block_prefix_is_found_among_other_numbered_names() -> None:
    names = [f"m.layers.{i}.moe.experts.{e}.w" for i in range(3) for e in range(3)]
    names += [f"vision.blocks.{i}.w" for i in range(3)]
    assert find_block_prefix(names, 3).prefix == "m.layers"
    crossed = [f"vision_model.layers.{i}.w" for i in range(4)] + [f"language_model.layers.{i}.w" for i in range(5)]
    with pytest.raises(ls.SourceError, match="the tensors do not match"):
        find_block_prefix(crossed, 4)
    with pytest.raises(ls.UnsupportedEditError, match=r"could be the decoder: a.layers, b.layers"):
        find_block_prefix([f"{p}.layers.{i}.w" for p in "ab" for i in range(3)], 3)
    assert (
        find_block_prefix([f"{p}.layers.{i}.w" for p in "ab" for i in range(3)], 3, prefix="b.layers").prefix
        == "b.layers"
    )


def test_the_named_blocks_are_those_that_the_reload_check_compares(tmp_path: Path) -> None:
    from transformers import CsmConfig, CsmForConditionalGeneration

    depth = 3
    fields = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": depth, "num_attention_heads": 2}
    fields |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32, "num_codebooks": 2}
    config = CsmConfig(**fields, text_vocab_size=32, depth_decoder_config=fields | {"backbone_hidden_size": 16})
    model = CsmForConditionalGeneration(config)
    del model.codec_model  # 300 MB
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ls.UnsupportedEditError, match="backbone_model.layers, depth_decoder.model.layers; choose one"):
        ls.edit_checkpoint(tmp_path / "source", "swap 1", tmp_path / "out")
    result = ls.edit_checkpoint(tmp_path / "source", "drop 1", tmp_path / "out", blocks="backbone_model.layers")
    assert result.verified
    old, new = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "out")
    name = "{}.layers.{}.mlp.up_proj.weight".format
    assert torch.equal(new[name("backbone_model", 1)], old[name("backbone_model", 2)])
    assert torch.equal(new[name("depth_decoder.model", 2)], old[name("depth_decoder.model", 2)])


@pytest.mark.parametrize("tower", ["vision_model", "draft_model", "mtp", "speech_encoder"])
def test_a_tower_that_is_not_text_is_not_the_decoder_in_files_and_in_memory(tower: str) -> None:
    model = nn.ModuleDict(
        {name: nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1, 1) for _ in range(3))}) for name in (tower, "model")}
    )
    assert find_block_prefix(model.state_dict(), 3).prefix == "model.layers"
    assert find_block_list(model, 3).path == "model.layers"


def test_links_share_the_file_and_changed_shards_do_not(sharded: Path, tmp_path: Path) -> None:
    result = ls.edit_checkpoint(sharded, ls.swap(1), tmp_path / "out", link=True)
    same = {n.name for n in sharded.glob("*.safetensors") if n.samefile(tmp_path / "out" / n.name)}
    changed = {n.name for n in sharded.glob("*.safetensors")} - same
    assert same
    assert changed
    assert result.bytes_linked == sum((sharded / name).stat().st_size for name in same)
    touched = {n for n in tensors_of(sharded) if n.startswith(("model.layers.1.", "model.layers.2."))}
    assert changed == {name for name in changed if touched & set(read_header(sharded / name).tensors)}


def test_branches_of_unlike_blocks_are_skipped_together_as_one_by_one(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "source")  # the first two blocks have no experts
    ls.edit_checkpoint(tmp_path / "source", "skip-mlp 1 4", tmp_path / "together")
    ls.edit_checkpoint(tmp_path / "source", "skip-mlp 1", tmp_path / "one")
    ls.edit_checkpoint(tmp_path / "one", "skip-mlp 4", tmp_path / "both")
    together, both = tensors_of(tmp_path / "together"), tensors_of(tmp_path / "both")
    assert together.keys() == both.keys()
    assert all(torch.equal(tensor, both[name]) for name, tensor in together.items())
    assert not together["model.layers.1.mlp.down_proj.weight"].any()


def test_changed_branches_take_no_space_on_disk(tmp_path: Path) -> None:
    tiny_model("llama", intermediate_size=8192).save_pretrained(tmp_path / "source")
    ls.edit_checkpoint(tmp_path / "source", f"skip-mlp 0:{DEPTH}", tmp_path / "out")
    original, zeroed = ((tmp_path / d / "model.safetensors").stat() for d in ("source", "out"))
    assert zeroed.st_size - original.st_size < DISK_BLOCK_BYTES
    if original.st_blocks * 512 >= original.st_size:  # the file system reports allocated blocks
        assert zeroed.st_blocks < 0.8 * original.st_blocks
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert not file.get_tensor("model.layers.3.mlp.down_proj.weight").any()
        assert file.get_tensor("model.layers.3.mlp.up_proj.weight").any()
