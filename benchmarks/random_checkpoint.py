"""Write a checkpoint of Pythia-6.9b's geometry with random weights to an offline hub cache, shard by shard.

Geometry, names, dtypes and the buffers of old GPT-NeoX checkpoints are taken from config.json and safetensors index of
EleutherAI/pythia-6.9b-deduped. The tokenizer is the embedded model's: all its ids are smaller than Pythia's vocabulary.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from layersurgery.checkpoints.model_packages import EMBEDDED
from layersurgery.checkpoints.sources import find_source

NAME = "EleutherAI/pythia-6.9b-deduped"
REVISION = "0" * 40
WIDTH, DEPTH, VOCABULARY, CONTEXT, HEADS = 4096, 32, 50432, 2048, 32
SHARD_BYTES = 5_000_000_000
CONFIG = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": 4 * WIDTH,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": CONTEXT,
    "model_type": "gpt_neox",
    "num_attention_heads": HEADS,
    "num_hidden_layers": DEPTH,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": VOCABULARY,
}


def list_tensors(width: int, depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of all weights, in the order of the model."""
    yield "gpt_neox.embed_in.weight", (VOCABULARY, width)
    for block in range(depth):
        prefix = f"gpt_neox.layers.{block}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", (width,)
            yield f"{prefix}{norm}.bias", (width,)
        yield f"{prefix}attention.bias", (1, 1, CONTEXT, CONTEXT)
        yield f"{prefix}attention.masked_bias", ()
        yield f"{prefix}attention.rotary_emb.inv_freq", (width // HEADS // 8,)
        for name, rows, columns in (
            ("attention.query_key_value", 3 * width, width),
            ("attention.dense", width, width),
            ("mlp.dense_h_to_4h", 4 * width, width),
            ("mlp.dense_4h_to_h", width, 4 * width),
        ):
            yield f"{prefix}{name}.weight", (rows, columns)
            yield f"{prefix}{name}.bias", (rows,)
    yield "gpt_neox.final_layer_norm.weight", (width,)
    yield "gpt_neox.final_layer_norm.bias", (width,)
    yield "embed_out.weight", (VOCABULARY, width)


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return a random weight, or a buffer's true value, as its name requires."""
    if name.endswith("attention.bias"):
        return torch.ones(shape, dtype=torch.bool).tril()
    if name.endswith("masked_bias"):
        return torch.tensor(-1e4, dtype=torch.float16)
    if name.endswith("inv_freq"):
        steps = torch.arange(0, 2 * shape[0], 2) / (2 * shape[0])
        return (1 / 10000**steps).half()
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.float16)
    return (torch.randn(shape, generator=generator) * 0.02).half()


def write_random_checkpoint(
    hub: Path, *, width: int = WIDTH, depth: int = DEPTH, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write the checkpoint to a hub cache, unless it is there, and return the snapshot's directory.

    config.json is written last, so an interrupted write is done again by the next call.

    Args:
        hub: the cache's `hub` directory ($HF_HOME/hub).
        width: width of the residual stream; smaller for a quick test.
        depth: number of blocks; smaller for a quick test.
        shard_bytes: size at which a new shard starts.
    """
    repository = hub / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    if (snapshot / "config.json").exists():
        return snapshot
    shutil.rmtree(snapshot, ignore_errors=True)
    snapshot.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in list_tensors(width, depth):
        nbytes = torch.Size(shape).numel() * 2
        if size and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    weight_map: dict[str, str] = {}
    total = 0
    for number, entries in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: random_tensor(name, shape, generator) for name, shape in entries}
        total += sum(value.nbytes for value in shard.values())
        weight_map |= dict.fromkeys(shard, file)
        save_file(shard, snapshot / file, metadata={"format": "pt"})
        print(f"{file}: {sum(value.nbytes for value in shard.values()) / 1e9:.2f} GB", flush=True)
        del shard
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    embedded = find_source(EMBEDDED).directory
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded / file, snapshot / file)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(REVISION, encoding="utf-8")
    config = CONFIG | {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    (snapshot / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return snapshot


if __name__ == "__main__":
    print(write_random_checkpoint(Path(sys.argv[1])))
