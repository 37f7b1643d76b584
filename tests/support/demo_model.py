"""Make small models under the names that the pages use, so that the pages' commands run as written, in seconds.

`smollm2-135m` becomes a llama of 30 random blocks of width 32, with a tokenizer of 600 tokens trained on Python's help
text. `EleutherAI/pythia-6.9b-deduped` becomes a GPT-NeoX of 32 blocks in an offline hub cache. The output that the
pages show comes from the real model. To run the pages on it:
`pytest -m weekly -n 0 tests/project/test_readme.py tests/project/test_examples.py`
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.random_checkpoint import write_random_checkpoint
from layersurgery.analyses import neuron_probes
from layersurgery.checkpoints.gguf_conversion import conversion_directory
from layersurgery.checkpoints.model_packages import EMBEDDED, PACKAGED, packaged_file

DEPTH, WIDTH, VOCAB_SIZE = 30, 32, 600


def make_tokenizer() -> Any:
    """Return a byte-pair tokenizer that was trained on Python's help text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<end>"],
        initial_alphabet=alphabet,
        show_progress=False,
        max_token_length=8,
    )
    bpe.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", bos_token="<end>", pad_token="<end>")


def make_demo_model(cache: Path) -> None:
    """Write the small model to the directory in `cache` that holds the converted embedded model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    target = cache / conversion_directory(packaged_file(EMBEDDED)).name
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(config)
    add_prediction_neurons(
        model, [token_id for token, token_id in tokenizer.get_vocab().items() if token.endswith("ing")]
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    origin = PACKAGED[EMBEDDED].origin
    (target / "README.md").write_text(f"---\nlicense: apache-2.0\nbase_model: {origin}\n---\n", "utf-8")


@torch.no_grad()
def add_prediction_neurons(model: LlamaForCausalLM, token_ids: list[int]) -> None:
    """Set neurons of the last four blocks so that they promote or suppress some tokens.

    Random weights of width 32 have no neurons that the analyses would count as prediction or suppression neurons.
    """
    embeddings = model.model.embed_tokens.weight
    embeddings[:, -1] = 0
    embeddings[token_ids] = torch.eye(WIDTH)[-1]
    for block in model.model.layers[-4:]:
        for neuron in range(12):
            block.mlp.down_proj.weight[:, neuron] = torch.eye(WIDTH)[-1] * (-1) ** neuron


def use_demo_model(patch: pytest.MonkeyPatch, directory: Path, *, real: bool = False) -> None:
    """Make the names refer to the small models.

    Args:
        patch: undoes it at the end of the test.
        directory: where the small models are, or are written to.
        real: keep the real model under the name smollm2-135m.
    """
    if not real:
        if not (directory / "cache").exists():
            make_demo_model(directory / "cache")
        patch.setenv("LAYERSURGERY_CACHE", str(directory / "cache"))
        patch.setattr(neuron_probes, "NEURONS", 4)  # probes spend their time on fitting regressions
        patch.setattr(neuron_probes, "SHUFFLES", 2)
    with redirect_stdout(io.StringIO()):
        write_random_checkpoint(directory / "hub", width=128, depth=32, shard_bytes=10_000_000)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(directory / "hub"))
