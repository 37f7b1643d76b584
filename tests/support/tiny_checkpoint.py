"""A tokenizer with a token for each character, and a checkpoint that a sweep can be run on, both made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.zoo import VOCAB, tiny_model

LETTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-_\n"


def tiny_tokenizer(**special: str | None) -> Any:
    """Characters are tokens; 0 is padding, 1 begins and 2 ends a text, 3 is any other character."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {letter: number for number, letter in enumerate(LETTERS, 4)}
    assert len(words) <= VOCAB
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    given = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)


def checkpoint(path: Path, name: str = "llama", **fields: Any) -> Path:
    """A tiny model with that tokenizer."""
    tiny_model(name, **fields).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
