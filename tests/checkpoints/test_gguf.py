"""Check that a GGUF file is read once and converted as transformers does it, and that a kill leaves nothing."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

import layersurgery as ls
from layersurgery.checkpoints import gguf_conversion, model_packages, sources
from layersurgery.checkpoints.gguf_conversion import convert_once
from layersurgery.checkpoints.model_packages import packaged_file
from tests.checkpoints.test_faults import nothing_written

WIDTH, HEADS, VOCABULARY = 32, 4, 300


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERSURGERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path: Path, blocks: int = 2) -> dict[str, np.ndarray]:
    """Write a llama with random weights and a byte tokenizer; return the weights by their names in the file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", *(f"t{number}" for number in range(VOCABULARY - 2))])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    for block in range(blocks):
        shapes |= {f"blk.{block}.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{block}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{block}.{name}": (2 * WIDTH, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{block}.ffn_down"] = (WIDTH, 2 * WIDTH)
    generator = np.random.default_rng(0)
    weights = {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name, value in weights.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_conversion_reads_the_file_once_and_equals_that_of_transformers(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "plain").mkdir()
    gguf_conversion._convert(tmp_path / "tiny.gguf", tmp_path / "plain")
    read: list[Path] = []
    tables: list[Any] = []
    own = gguf.GGUFReader.__init__, gguf.get_tensor_name_map

    def count(self: Any, path: Any, *args: Any) -> None:
        read.append(path)
        own[0](self, path, *args)

    def count_tables(*args: Any) -> Any:
        tables.append(args)
        return own[1](*args)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", count)
    monkeypatch.setattr(gguf, "get_tensor_name_map", count_tables)
    reader = gguf.GGUFReader
    target = convert_once(tmp_path / "tiny.gguf")
    assert (len(read), len(tables)) == (1, 1)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, count_tables)
    assert "license: mit" in (target / "README.md").read_text()
    (target / "README.md").unlink()
    files = {path.name: path.read_bytes() for path in target.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    tensors = load_file(target / "model.safetensors")
    assert np.array_equal(tensors["model.layers.1.mlp.down_proj.weight"], weights["blk.1.ffn_down"])
    assert np.array_equal(tensors["lm_head.weight"], weights["output"])
    # Memory order of llama.cpp's rotary embedding: the two halves of each head are interleaved.
    heads = weights["blk.1.attn_q"].reshape(HEADS, WIDTH // HEADS // 2, 2, WIDTH).swapaxes(1, 2)
    assert np.array_equal(tensors["model.layers.1.self_attn.q_proj.weight"], heads.reshape(WIDTH, WIDTH))
    nothing_written(cache, target.name)
    assert convert_once(tmp_path / "tiny.gguf") == target
    assert len(read) == 1


def test_a_damaged_file_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    own = gguf.GGUFReader, gguf.get_tensor_name_map
    with (tmp_path / "tiny.gguf").open("r+b") as file:
        file.truncate(9000)
    with pytest.raises(ls.SourceError, match=r"transformers cannot read .*tiny.gguf"):
        convert_once(tmp_path / "tiny.gguf")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own
    assert not cache.exists()


def test_a_cache_without_room_is_said(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    write_gguf(tmp_path / "tiny.gguf")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    with pytest.raises(ls.SourceError, match=r"cannot be written: .* 0.00 GB free .* LAYERSURGERY_CACHE"):
        convert_once(tmp_path / "tiny.gguf")
    assert not cache.exists()


def test_another_process_that_converts_first_is_no_error(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    target = gguf_conversion.conversion_directory(tmp_path / "tiny.gguf")

    def overtaken(_: Path, partial: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("theirs")

    monkeypatch.setattr(gguf_conversion, "_convert", overtaken)
    assert convert_once(tmp_path / "tiny.gguf") == target
    assert (target / "config.json").read_text() == "theirs"
    nothing_written(cache, target.name)


_STUCK = """
import sys, time
from pathlib import Path
from layersurgery.checkpoints import gguf_conversion
def stick(file, target):
    (target / "model.safetensors").write_text("half of it")
    print("converting", flush=True)
    time.sleep(60)
gguf_conversion._convert = stick
gguf_conversion.convert_once(Path(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_killed_conversion_is_removed_by_the_next_use_of_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "killed.gguf")
    write_gguf(tmp_path / "other.gguf")
    monkeypatch.setattr(
        gguf_conversion, "_convert", lambda _, partial: (partial / "config.json").write_text("converted")
    )
    other = convert_once(tmp_path / "other.gguf")
    for sent in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-c", _STUCK, str(tmp_path / "killed.gguf")],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"converting\n"
        assert convert_once(tmp_path / "other.gguf") == other  # a conversion that goes on is left alone
        assert len(list(cache.glob(".killed-*.partial-*/model.safetensors"))) == 1
        process.send_signal(sent)
        process.wait()
        process.stdout.close()
        assert (len(list(cache.glob(".killed-*"))) == 0) == (sent == signal.SIGINT)
    convert_once(tmp_path / "other.gguf")  # already converted
    nothing_written(cache, other.name)


@pytest.fixture
def in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a model of two packages with a piece of its file each, under the name of Gemma."""
    write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    modules = tuple(f"tiny_part{number}" for number in (1, 2))
    for module, piece in zip(modules, (whole[:5000], whole[5000:]), strict=True):
        data = tmp_path / "site" / module / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        (data / f"tiny.gguf.{module[-5:]}").write_bytes(piece)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    gemma = model_packages.PACKAGED["gemma3-270m"]
    tiny = replace(gemma, modules=modules, sha256=hashlib.sha256(whole).hexdigest())
    monkeypatch.setattr(model_packages, "PACKAGED", {**model_packages.PACKAGED, "gemma3-270m": tiny})
    monkeypatch.setattr(sources, "PACKAGED", model_packages.PACKAGED)
    return tmp_path


def test_a_model_in_pieces_is_joined_and_its_terms_go_with_it(in_pieces: Path, cache: Path) -> None:
    assert sources.needs_conversion("gemma3-270m")
    source = sources.find_source("gemma3-270m")
    assert (source.label, source.name) == ("google/gemma-3-270m", "gemma3-270m")
    assert packaged_file("gemma3-270m").read_bytes() == (in_pieces / "tiny.gguf").read_bytes()
    assert not sources.needs_conversion("gemma3-270m")
    out = ls.edit_checkpoint("gemma3-270m", "swap 0 1", in_pieces / "edited").path
    assert "Gemma Terms of Use" in (out / "NOTICE").read_text()
    assert "license: gemma" in (out / "README.md").read_text()
    with pytest.raises(ls.SourceError, match="only Hub models have revisions"):
        sources.find_source("gemma3-270m", revision="main")


def test_pieces_of_another_file_leave_nothing(in_pieces: Path, cache: Path) -> None:
    with next((in_pieces / "site" / "tiny_part2" / "data").iterdir()).open("ab") as piece:
        piece.write(b"more")
    with pytest.raises(ls.SourceError, match="do not have the expected hash; install the packages again"):
        sources.find_source("gemma3-270m")
    assert not cache.exists()


def test_a_model_whose_packages_are_missing_names_the_extra(
    in_pieces: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(in_pieces / "site" / "tiny_part2")
    importlib.invalidate_caches()
    with pytest.raises(ls.SourceError, match=r"run: pip install 'layersurgery\[gemma\]'"):
        ls.load("gemma3-270m")
    assert not cache.exists()
