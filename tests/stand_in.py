"""Small models under the names that the pages use, so that their commands run as written, and in seconds.

`smollm2-135m` becomes a llama of 30 random blocks, 32 wide, with a tokenizer of 600 words made from Python's help text;
`EleutherAI/pythia-6.9b-deduped` a GPT-NeoX of 32 blocks in an offline hub cache. What the pages show was said by the real model;
`pytest -m weekly -n 0 tests/test_readme.py tests/test_examples.py` runs them all on it.
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

from benchmarks.pythia import make as make_pythia
from layersurgery import sources

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
    LlamaForCausalLM(config).save_pretrained(target)
    tokenizer().save_pretrained(target)
    origin = sources._EMBEDDED_ORIGIN
    (target / "README.md").write_text(f"---\nlicense: apache-2.0\nbase_model: {origin}\n---\n", "utf-8")


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
    with redirect_stdout(io.StringIO()):
        make_pythia(place / "hub", width=128, depth=32, shard_bytes=10_000_000)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
