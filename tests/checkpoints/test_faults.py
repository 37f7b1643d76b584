"""Invalid input and failures give a clear error, lose no data and leave no partial output."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from safetensors.torch import load_file, save_file

import layersurgery as ls
from layersurgery.atomic_io import directory_lock
from layersurgery.checkpoints import shard_writer
from layersurgery.errors import LayerSurgeryWarning
from tests.checkpoints.test_edit import change_config, resave
from tests.support.zoo import DEPTH, tiny_model


def nothing_written(parent: Path, *allowed: str) -> None:
    assert {path.name for path in parent.iterdir()} == set(allowed)


def test_no_config(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(ls.SourceError, match=r"has no config.json; give a directory"):
        ls.edit_checkpoint(tmp_path / "source", ls.swap(1), tmp_path / "out")
    (tmp_path / "source" / "model.GGUF").touch()
    with pytest.raises(ls.SourceError, match=r"give the file .*model.GGUF itself"):
        ls.edit_checkpoint(tmp_path / "source", ls.swap(1), tmp_path / "out")
    with pytest.raises(ls.SourceError, match=r"transformers cannot read .*model.GGUF"):
        ls.edit_checkpoint(tmp_path / "source" / "model.GGUF", ls.swap(1), tmp_path / "out")
    nothing_written(tmp_path, "source")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://huggingface.co/org/name", "is the address of a page; give the Hub ID instead: org/name$"),
        ("https://huggingface.co/org/name/tree/main", "give the Hub ID instead: org/name$"),
        ("hf.co/org/name.v1/blob/v2/config.json", "give the Hub ID instead: org/name.v1, at revision 'v2'"),
        ("https://huggingface.co/gpt2?x=1", "give the Hub ID instead: gpt2$"),
        ("hf://org/name", "give the Hub ID instead: org/name$"),
        ("https://huggingface.co/datasets/org/name", "not that of a model; give the Hub ID of a model"),
    ],
)
def test_the_address_of_a_page_is_not_a_model(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ls.SourceError, match=message):
        ls.edit_checkpoint(name, ls.swap(1), tmp_path / "out")


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ls.SourceError, match=r"lora is a PEFT adapter of org/base and not a whole model. Merge it"):
        ls.edit_checkpoint(tmp_path / "lora", ls.swap(1), tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "model.GGUF"])
def test_a_pointer_of_git_lfs_is_not_the_file(llama: Path, tmp_path: Path, name: str) -> None:
    (llama / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    model = llama / name if name.endswith("GGUF") else llama
    with pytest.raises(ls.SourceError, match=f"{name} is a git-lfs pointer .*git lfs pull"):
        ls.edit_checkpoint(model, ls.swap(1), tmp_path / "out")
    nothing_written(tmp_path, "llama")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "a pickle, which can run code.*from_pretrained.*save_pretrained"),
        ("other.safetensors", "neither model.safetensors nor"),
        ("adapter_config.json", "PEFT adapter.*merge_and_unload"),
        ("notes.txt", "has no safetensors weights"),
    ],
)
def test_no_safetensors(llama: Path, tmp_path: Path, name: str, message: str) -> None:
    (llama / "model.safetensors").unlink()
    (llama / name).write_bytes(b"{}")
    with pytest.raises(ls.SourceError, match=message):
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out")


@pytest.mark.parametrize("verify", [True, False])
def test_an_adapter_next_to_the_weights(llama: Path, tmp_path: Path, verify: bool) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(llama))
    with pytest.raises(ls.UnsupportedEditError, match=r"adapter \(adapter_config.json\) next to .*merge_and_unload"):
        ls.edit_checkpoint(llama, ls.drop(1), tmp_path / "out", verify=verify)
    nothing_written(tmp_path, "llama")
    assert ls.inspect(llama).depth == DEPTH


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "",
            "language_model.",
            r"loads language_model.model.layers.0 into none of .* LlamaForCausalLM \(model.layers\)",
        ),
        ("model.layers", "model.blocks", "loads model.blocks.0 into none of the lists of 6 modules"),
        (".self_attn.q_proj", ".attention.wq", "loaded into model.layers.0.self_attn.q_proj.weight and 5 more"),
        ("layers.3.mlp", "layers.3.ffn", "loaded into model.layers.3.mlp.gate_proj.weight and 2 more"),
    ],
)
def test_weights_under_names_that_the_class_does_not_load(
    llama: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    resave(llama, lambda tensors: {name.replace(old, new, 1): value for name, value in tensors.items()})
    with pytest.raises(ls.LayerSurgeryError, match=message):
        ls.edit_checkpoint(llama, ls.drop(1), tmp_path / "out")
    nothing_written(tmp_path, "llama")


@pytest.mark.parametrize("content", ["", "{", "[]", "{'a': 1}", "[" * 100_000])
def test_a_config_that_is_not_a_json_object(llama: Path, tmp_path: Path, content: str) -> None:
    (llama / "config.json").write_text(content)
    with pytest.raises(ls.SourceError, match="config.json"):
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out")


def test_a_truncated_shard(sharded: Path, tmp_path: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 10)
    with pytest.raises(ls.SourceError, match=f"{shard.name}.*truncated download"):
        ls.edit_checkpoint(sharded, ls.swap(1), tmp_path / "out")
    nothing_written(tmp_path, "sharded")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../secret.safetensors", "not a file name in this directory"),
        ("/etc/passwd", "not a file name in this directory"),
        ("a\\b.safetensors", "not a file name in this directory"),
        (7, "not a file name in this directory"),
        ("model-00009-of-00009.safetensors", "which is missing"),
    ],
)
def test_an_index_that_names_a_wrong_file(sharded: Path, tmp_path: Path, file: object, message: str) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(ls.SourceError, match=message):
        ls.edit_checkpoint(sharded, ls.swap(1), tmp_path / "out")


def test_an_index_that_disagrees_with_its_files(sharded: Path, tmp_path: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    norm, embeddings = (index["weight_map"][f"model.{name}.weight"] for name in ("norm", "embed_tokens"))
    assert norm != embeddings
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"model.norm.weight": embeddings}}))
    with pytest.raises(ls.SourceError, match=f"places 'model.norm.weight' in {embeddings}, but it is in {norm}"):
        ls.edit_checkpoint(sharded, ls.swap(1), tmp_path / "out")
    path.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ls.SourceError, match="no weight_map"):
        ls.edit_checkpoint(sharded, ls.swap(1), tmp_path / "out")


def test_a_tensor_that_only_the_index_has(sharded: Path, tmp_path: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    ghost = "model.layers.1.self_attn.rotary_emb.inv_freq"
    index["weight_map"][ghost] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ls.SourceError, match=f"names {ghost}, and no file has it.*run the reload check"):
        ls.edit_checkpoint(sharded, ls.swap(1), tmp_path / "out", verify=False)
    with pytest.warns(LayerSurgeryWarning, match=f"{ghost}, which no file has and the model does not need"):
        result = ls.edit_checkpoint(sharded, ls.swap(1), tmp_path / "out")
    assert len(result.notes) == 1
    assert ghost not in (tmp_path / "out" / path.name).read_text()
    assert ls.load(tmp_path / "out").model.config.num_hidden_layers == DEPTH
    for needed in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        shutil.rmtree(tmp_path / "lost", ignore_errors=True)
        shutil.copytree(sharded, tmp_path / "lost")
        file = tmp_path / "lost" / index["weight_map"][needed]
        tensors = load_file(file)
        del tensors[needed]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ls.SourceError, match=f"names {needed}, and no file has it; fetch the checkpoint again"):
            ls.edit_checkpoint(tmp_path / "lost", ls.swap(1), tmp_path / "out2")


def test_a_tied_head_that_only_the_index_has(tmp_path: Path) -> None:
    tiny_model("llama-tied").save_pretrained(tmp_path / "source", max_shard_size="60KB")
    path = tmp_path / "source" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.warns(LayerSurgeryWarning, match=r"lm_head.weight, which no file has and the model does not need"):
        ls.edit_checkpoint(tmp_path / "source", ls.swap(1), tmp_path / "out")


def test_a_block_count_that_is_not_the_configs(llama: Path, tmp_path: Path) -> None:
    change_config(llama, num_hidden_layers=8)
    with pytest.raises(ls.SourceError, match=r"declares 8 layers.*model.layers.0 to model.layers.5 \(6\)"):
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out")


def test_a_config_without_a_depth(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    del config["num_hidden_layers"], config["model_type"]
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ls.SourceError, match="no number of layers"):
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out")


def test_an_unknown_per_layer_field(llama: Path, tmp_path: Path) -> None:
    change_config(llama, mystery=[1, 2, 3, 4, 5, 6])
    with pytest.raises(ls.UnsupportedEditError, match="'mystery' is a list of 6 values for 6 layers"):
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out")
    nothing_written(tmp_path, "llama")


def test_a_model_type_that_transformers_does_not_know(llama: Path, tmp_path: Path) -> None:
    change_config(llama, model_type="from_the_future", auto_map={"AutoModelForCausalLM": "remote.Code"})
    with pytest.raises(
        ls.UnsupportedEditError, match=r"does not know the model type 'from_the_future' \(it comes with its own code"
    ):
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out")
    assert ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out", verify=False).verified is False
    with pytest.raises(ls.UnsupportedEditError, match="does not know the model type"):
        ls.edit_checkpoint(llama, ls.skip_mlp(1), tmp_path / "skip", verify=False)


@pytest.mark.parametrize("model_type", ["zamba2", "longcat_flash", "xlm"])
def test_architectures_that_share_across_layers(llama: Path, tmp_path: Path, model_type: str) -> None:
    change_config(llama, model_type=model_type)
    with pytest.raises(ls.UnsupportedEditError, match=f"{model_type} .*cannot be edited"):
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out", verify=False)


def test_positions_read_by_the_class_only_need_the_check(llama: Path, tmp_path: Path) -> None:
    change_config(llama, interleave_moe_layer_step=2)
    with pytest.raises(ls.UnsupportedEditError, match="interleave_moe_layer_step can make layers differ by position"):
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out", verify=False)


def test_a_branch_of_a_quantized_checkpoint_is_not_zeroed(llama: Path, tmp_path: Path) -> None:
    change_config(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ls.UnsupportedEditError, match=r"quantized \(gptq\)"):
        ls.edit_checkpoint(llama, ls.skip_mlp(1), tmp_path / "out")


@pytest.mark.parametrize(
    ("tensors", "dtype", "message"),
    [
        ({"scales": torch.ones(1), "biases": torch.ones(1)}, torch.uint32, r"down_proj.weight holds integers \(U32\)"),
        ({}, torch.int8, r"down_proj.weight holds integers \(I8\)"),
        ({"scales": torch.ones(1)}, torch.float32, "down_proj.scales scales or shifts a weight to zero"),
        ({"weight_scale": torch.ones(1)}, torch.float8_e4m3fn, "down_proj.weight_scale scales or shifts"),
        ({"weight_zero_point": torch.ones(1)}, torch.float16, "down_proj.weight_zero_point scales or shifts"),
    ],
)
def test_a_branch_whose_zeros_would_not_be_zero_is_not_zeroed(
    llama: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, message: str
) -> None:
    module = "model.layers.1.mlp.down_proj"
    more = {f"{module}.{name}": value for name, value in tensors.items()}
    resave(
        llama,
        lambda old: (
            {name: value.to(dtype) if name == f"{module}.weight" else value for name, value in old.items()} | more
        ),
    )
    for verify in (True, False):
        with pytest.raises(ls.UnsupportedEditError, match=message):
            ls.edit_checkpoint(llama, ls.skip_mlp(1), tmp_path / "out", verify=verify)
    nothing_written(tmp_path, "llama")
    ls.edit_checkpoint(llama, ls.skip_mlp(2), tmp_path / "out")  # another block's weights are plain


def test_settings_of_mlx_follow_and_refuse_a_skip(llama: Path, tmp_path: Path) -> None:
    settings = {"group_size": 64, "bits": 4, "model.layers.3.mlp.down_proj": {"bits": 8}, "lm_head": False}
    change_config(llama, quantization=settings)
    with pytest.raises(ls.UnsupportedEditError, match=r"quantized \(quantization in config.json\)"):
        ls.edit_checkpoint(llama, ls.skip_mlp(1), tmp_path / "out")
    ls.edit_checkpoint(llama, ls.drop(1), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert written == {"group_size": 64, "bits": 4, "model.layers.2.mlp.down_proj": {"bits": 8}, "lm_head": False}


def test_the_checks_do_not_use_the_callers_random_state(llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    ls.edit_checkpoint(llama, ls.skip_mlp(1), tmp_path / "out")
    assert torch.equal(torch.rand(3), expected)


def test_a_plan_that_changes_nothing(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ls.PlanError, match="leaves the model unchanged"):
        ls.edit_checkpoint(llama, "swap 1 2; swap 1 2", tmp_path / "out")


def test_an_output_that_exists(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ls.edit_checkpoint(llama, ls.swap(1), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ls.OutputError, match=r"exists already; choose another output, or replace it \(`overwrite`\)"):
        ls.edit_checkpoint(llama, ls.swap(2), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    ls.edit_checkpoint(llama, ls.drop(2), out, overwrite=True)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 5
    nothing_written(tmp_path, "llama", "out")


def test_an_empty_directory_is_used(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    ls.edit_checkpoint(llama, ls.swap(1), out)
    assert (out / "config.json").exists()
    (tmp_path / "saved").mkdir()
    ls.save(tiny_model("llama"), tmp_path / "saved")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    with pytest.raises(ls.OutputError, match="exists already"):
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "link")
    nothing_written(tmp_path, "llama", "out", "saved", "empty", "link")


def test_a_snapshot_of_the_hubs_cache_is_named_by_its_repository(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--org--small-1B" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(llama, snapshot)
    monkeypatch.chdir(tmp_path)
    out = ls.edit_checkpoint(snapshot, ls.swap(1)).path
    assert out == Path("small-1B-swap-1-2")
    card = (out / "README.md").read_text()
    assert "base_model: org/small-1B" in card
    assert f"at revision `{snapshot.name}`" in card
    assert str(tmp_path) not in card


def test_only_checkpoints_are_replaced(llama: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(precious)
    for out in (precious, file, link):
        with pytest.raises(ls.OutputError, match="is not replaced"):
            ls.edit_checkpoint(llama, ls.swap(1), out, overwrite=True)
    assert (precious / "thesis.tex").read_text() == "years of work"


def test_a_checkpoint_with_other_work_in_it_is_not_replaced(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ls.edit_checkpoint(llama, ls.swap(1), out)
    (out / "checkpoint-500").mkdir()
    with pytest.raises(ls.OutputError, match="it holds the directory checkpoint-500"):
        ls.edit_checkpoint(llama, ls.swap(2), out, overwrite=True)
    assert (out / "checkpoint-500").is_dir()


def test_a_run_killed_between_its_two_renames_is_mended_by_the_next(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ls.edit_checkpoint(llama, ls.swap(1), out)
    out.rename(tmp_path / ".out.replaced-01234567")
    with pytest.raises(ls.OutputError, match="created by another process in the meantime"):
        ls.edit_checkpoint(llama, ls.swap(2), out)  # the old checkpoint is restored, and not replaced without overwrite
    assert "`swap 1 2`" in (out / "README.md").read_text()
    nothing_written(tmp_path, "llama", "out")


def test_a_source_that_is_saved_again_while_it_is_read(llama: Path, tmp_path: Path) -> None:
    from layersurgery.checkpoints.checkpoint import read_checkpoint
    from layersurgery.checkpoints.edit_checkpoint import write_edit
    from layersurgery.checkpoints.prepared_edit import plan_edit
    from layersurgery.checkpoints.sources import find_source

    planned = plan_edit(read_checkpoint(find_source(llama)), ls.swap(1))
    resave(llama, lambda tensors: {name: value + 1 for name, value in tensors.items()})
    with pytest.raises(ls.SourceError, match="not the file from which the header was read"):
        write_edit(planned, tmp_path / "out")
    nothing_written(tmp_path, "llama")


def test_output_and_source_within_each_other(llama: Path, tmp_path: Path) -> None:
    for out in (llama, llama / "inside", tmp_path, llama / ".." / "llama"):
        with pytest.raises(ls.OutputError, match="overlap: one contains the other"):
            ls.edit_checkpoint(llama, ls.swap(1), out, overwrite=True)


def test_too_little_room_is_said_before_writing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    with pytest.raises(ls.OutputError, match=r"0.00 GB free and out needs .* GB; free some space.*\(`link`\)"):
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out")
    nothing_written(tmp_path, "llama")


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "is full; no partial output was left"), (errno.EIO, "Input/output error")]
)
def test_a_disk_that_fails_midway(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("layersurgery.checkpoints.shard_writer.copy_bytes", fail)
    with pytest.raises(ls.OutputError, match=message):
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out")
    nothing_written(tmp_path, "llama")


def test_a_really_full_disk(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if (
        getattr(os, "geteuid", lambda: 1)()  # Windows has none
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode
    ):
        pytest.skip("cannot mount a small file system here")
    try:
        with pytest.raises(ls.OutputError, match="GB free and out needs"):
            ls.edit_checkpoint(llama, ls.swap(1), small / "out")
        # Another process takes the room after it was looked at.
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
        with pytest.raises(ls.OutputError, match="is full; no partial output was left"):
            ls.edit_checkpoint(llama, ls.swap(1), small / "out")
        nothing_written(small)
    finally:
        subprocess.run(["umount", small], check=True)


def test_no_permission(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    if getattr(os, "geteuid", int)():
        closed.chmod(0o500)
    else:  # root may write anywhere, so the answer is played

        def refuse(self: Path, *args: object, **kwargs: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ls.OutputError, match="cannot write .*Permission denied"):
        ls.edit_checkpoint(llama, ls.swap(1), closed / "out")


def test_a_parent_that_is_a_file(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ls.OutputError, match="cannot write"):
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "file" / "out")


def test_any_exception_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out", progress=interrupt)
    nothing_written(tmp_path, "llama")


def test_a_source_that_shrinks_while_it_is_read(llama: Path, tmp_path: Path) -> None:
    done: list[int] = []

    def shrink(count: int) -> None:
        if not done:
            done.append(count)
            with (llama / "model.safetensors").open("r+b") as file:
                file.truncate(2000)

    with pytest.raises(ls.SourceError, match="was changed while it was read"):
        ls.edit_checkpoint(llama, "drop 1; drop 4", tmp_path / "out", progress=shrink)
    nothing_written(tmp_path, "llama")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EXDEV, errno.EINVAL])
def test_bytes_move_where_the_kernel_cannot_copy(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    ls.edit_checkpoint(llama, "drop 1; repeat 3", tmp_path / "by-kernel")
    monkeypatch.setattr(os, "copy_file_range", fail)
    monkeypatch.setattr(shard_writer, "_USER_CHUNK", 1000)
    ls.edit_checkpoint(llama, "drop 1; repeat 3", tmp_path / "by-hand")
    files = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("by-kernel", "by-hand")]
    assert files[0] == files[1]


def test_links_fall_back_to_copies(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", fail)
    result = ls.edit_checkpoint(sharded, ls.swap(1), tmp_path / "out", link=True)
    assert result.bytes_linked == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(list(sharded.glob("*.safetensors")))


_SLOW = """
import sys, time
import layersurgery as ls
def crawl(count):
    print("moving", flush=True)
    time.sleep(0.05)
ls.edit_checkpoint(sys.argv[1], "swap 1 2", sys.argv[2], verify=False, overwrite=True, progress=crawl)
"""


@pytest.mark.parametrize("wait", [0.0, 0.05, 0.2])
def test_killed_in_the_middle(sharded: Path, tmp_path: Path, wait: float) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", _SLOW, str(sharded), str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"moving\n"
    time.sleep(wait)
    process.kill()
    process.wait()
    process.stdout.close()
    assert not out.exists()
    partial = [path for path in tmp_path.iterdir() if path.name.startswith(".out.partial-")]
    assert len(partial) == 1
    # Its leftovers are not a checkpoint, and the next run removes them.
    assert not (partial[0] / "config.json").exists()
    ls.edit_checkpoint(sharded, ls.swap(1), out)
    nothing_written(tmp_path, "sharded", "out")


def test_an_output_that_appears_meanwhile_is_not_replaced(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear(count: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("theirs")

    with pytest.raises(ls.OutputError, match="created by another process in the meantime"):
        ls.edit_checkpoint(llama, ls.swap(1), out, progress=appear)
    assert (out / "config.json").read_text() == "theirs"
    nothing_written(tmp_path, "llama", "out")


def test_a_run_does_not_clear_away_another_that_lives(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", _SLOW, str(sharded), str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"moving\n"
    ls.edit_checkpoint(sharded, ls.swap(2), out)
    assert process.wait(timeout=60) == 0
    process.stdout.close()
    nothing_written(tmp_path, "sharded", "out")
    assert "`swap 1 2`" in (out / "README.md").read_text()


def test_a_killed_runs_directory_is_kept_while_another_process_has_its_lock(llama: Path, tmp_path: Path) -> None:
    partial, lock = tmp_path / ".out.partial-01234567", tmp_path / ".lock.out.partial-01234567"
    partial.mkdir()
    code = (
        "import os, sys, filelock\n"
        "filelock.lock_descriptor(os.open(sys.argv[1], os.O_CREAT | os.O_RDWR), blocking=False)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out", verify=False)
        assert partial.exists()
        process.kill()
    ls.edit_checkpoint(llama, ls.swap(2), tmp_path / "out", verify=False, overwrite=True)
    nothing_written(tmp_path, "llama", "out")


def test_a_file_system_without_locks(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock, "lock_descriptor", fail)
    left = tmp_path / ".out.partial-01234567"
    left.mkdir()
    ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out", verify=False)
    with directory_lock(tmp_path):
        pass
    nothing_written(tmp_path, "llama", "out", left.name)  # it may be in use, so it stays


def test_a_locked_directory(tmp_path: Path) -> None:
    with directory_lock(tmp_path):
        nothing_written(tmp_path)
        message = "another process is writing to .*choose another output"
        with pytest.raises(ls.OutputError, match=message), directory_lock(tmp_path):
            pass
    with directory_lock(tmp_path):
        pass


def test_a_killed_process_unlocks_its_directory(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom layersurgery.atomic_io import directory_lock\n"
        "with directory_lock(Path(sys.argv[1])):\n    print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(ls.OutputError, match="another process is writing to"), directory_lock(tmp_path):
            pass
        process.kill()
    with directory_lock(tmp_path):
        pass


def test_the_models_are_built_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layersurgery.models import meta_model, reload_check

    built: list[int] = []

    def build(config: dict[str, Any]) -> Any:
        built.append(config["num_hidden_layers"])
        return original(config)

    original = meta_model.build_meta_model
    monkeypatch.setattr(meta_model, "build_meta_model", build)
    monkeypatch.setattr(reload_check, "build_meta_model", build)
    ls.edit_checkpoint(llama, "skip-mlp 1; drop 2", tmp_path / "checked")
    assert built == [DEPTH, DEPTH - 1]
    built.clear()
    ls.edit_checkpoint(llama, "skip-mlp 1; drop 2", tmp_path / "unchecked", verify=False)
    assert built == [DEPTH]


def test_killed_while_replacing_keeps_a_whole_checkpoint(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ls.edit_checkpoint(sharded, ls.swap(3), out)
    process = subprocess.Popen([sys.executable, "-c", _SLOW, str(sharded), str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert "`swap 3 4`" in (out / "README.md").read_text()
    assert len(list(out.glob("*.safetensors"))) == len(list(sharded.glob("*.safetensors")))


def test_a_tensor_named_in_two_files(sharded: Path, tmp_path: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: torch.zeros(1)}, second)
    with pytest.raises(ls.SourceError, match=f"{name}.* is in both"):
        ls.edit_checkpoint(sharded, ls.swap(1), tmp_path / "out")


def test_weights_of_another_shape_than_the_config_says_still_move(llama: Path, tmp_path: Path) -> None:
    # Renaming does not need shapes; a source that would not load is not made worse, nor refused for it.
    resave(llama, lambda tensors: tensors | {"model.norm.weight": torch.zeros(5)})
    assert ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out").verified


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_sync_directories(number: int, llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Some network file systems say so; another error is one."""
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    if number == errno.EIO:
        with pytest.raises(ls.OutputError, match="cannot write"):
            ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out")
        return
    ls.edit_checkpoint(llama, ls.swap(1), tmp_path / "out")
    assert (tmp_path / "out/config.json").is_file()
