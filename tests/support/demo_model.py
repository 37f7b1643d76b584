"""Small models under the names that the pages use, so that their commands run as written, and in seconds.

`smollm2-135m` becomes a llama of 30 random blocks, 32 wide, with a tokenizer of 600 words made from Python's help text;
`EleutherAI/pythia-6.9b-deduped` a GPT-NeoX of 32 blocks in an offline hub cache. What the pages show was said by the real model;
`pytest -m weekly -n 0 tests/project/test_readme.py tests/project/test_examples.py` runs them all on it.
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

from benchmarks.random_checkpoint import make as make_pythia
from layersurgery.analyses import neuron_probes
from layersurgery.checkpoints import sources

DEPTH, WIDTH, WORDS = 30, 32, 600


def tokenizer() -> Any:
    """Pairs of bytes, merged as Python's help text suggests."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    made.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<end>", pad_token="<end>")


def make(cache: Path) -> None:
    """Put it where the conversion of the embedded model would be kept."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
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
    target = cache / sources._conversion_of(sources.embedded_file()).name
    words = tokenizer()
    model = LlamaForCausalLM(config)
    plant(model, [number for word, number in words.get_vocab().items() if word.endswith("ing")])
    model.save_pretrained(target)
    words.save_pretrained(target)
    origin = sources._EMBEDDED_ORIGIN
    (target / "README.md").write_text(f"---\nlicense: apache-2.0\nbase_model: {origin}\n---\n", "utf-8")


@torch.no_grad()
def plant(model: LlamaForCausalLM, tokens: list[int]) -> None:
    """Neurons that promote and that suppress some tokens: random weights in a width of 32 have none that would be called so."""
    words = model.model.embed_tokens.weight
    words[:, -1] = 0
    words[tokens] = torch.eye(WIDTH)[-1]
    for block in model.model.layers[-4:]:
        for neuron in range(12):
            block.mlp.down_proj.weight[:, neuron] = torch.eye(WIDTH)[-1] * (-1) ** neuron


def stand_in(patch: pytest.MonkeyPatch, place: Path, *, real: bool = False) -> None:
    """From now on the names mean the small models.

    Args:
        patch: that undoes it.
        place: a directory for them.
        real: the embedded model by its name, all the same.
    """
    if not real:
        if not (place / "cache").exists():
            make(place / "cache")
        patch.setenv("LAYERSURGERY_CACHE", str(place / "cache"))
        patch.setattr(neuron_probes, "NEURONS", 4)  # fits of regressions are what a probe takes its time for
        patch.setattr(neuron_probes, "SHUFFLES", 2)
    with redirect_stdout(io.StringIO()):
        make_pythia(place / "hub", width=128, depth=32, shard_bytes=10_000_000)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
