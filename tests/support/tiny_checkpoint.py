"""Make a tokenizer with one token per character, and a tiny checkpoint for sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.zoo import VOCAB, tiny_model

LETTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-_\n"


def tiny_tokenizer(**special: str | None) -> Any:
    """Return a tokenizer whose tokens are characters; id 0 is padding, 1 starts and 2 ends a text, 3 is unknown."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {
        letter: number for number, letter in enumerate(LETTERS, 4)
    }
    assert len(vocabulary) <= VOCAB
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special_tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def checkpoint(path: Path, name: str = "llama", **fields: Any) -> Path:
    """Save a tiny model with this tokenizer, and return the directory."""
    tiny_model(name, **fields).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
