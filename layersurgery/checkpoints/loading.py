"""Loading a model from any source that the command line takes."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from ..errors import SourceError
from .sources import Source, find_source


class Loaded(NamedTuple):
    """A model and its tokenizer; None where the checkpoint brings no tokenizer."""

    model: Any
    tokenizer: Any


def load(
    model: str | os.PathLike[str],
    *,
    dtype: Any = "auto",
    device_map: Any = None,
    revision: str | None = None,
    **options: Any,
) -> Loaded:
    """Load a causal language model in evaluation mode, and its tokenizer, through transformers.

    Args:
        model: hub id, local directory, `.gguf` file, or "smollm2-135m".
        dtype: of the weights: a torch dtype, its name, or "auto" for the checkpoint's own.
        device_map: where to put them, as accelerate understands it ("auto", "cuda", a map of modules to devices).
        revision: branch, tag or commit on the hub.
        options: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        SourceError: not found, or transformers cannot load it.

    Example:
        >>> model, tokenizer = ls.load("smollm2-135m")  # doctest: +SKIP
    """
    import torch
    from transformers import AutoModelForCausalLM

    if isinstance(dtype, str) and dtype != "auto":
        known = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(known, torch.dtype):
            raise SourceError(f"{dtype!r} is no dtype of torch; write float32, bfloat16, float16 or auto")
        dtype = known
    source = find_source(model, revision=revision)
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            source.directory, dtype=dtype, device_map=device_map, output_loading_info=True, **options
        )
    except Exception as error:  # a config class, a constructor or a reader of weights may raise anything
        raise SourceError(f"transformers cannot load {source.label}: {type(error).__name__}: {error}") from error
    if wrong := sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind, ())):
        raise SourceError(
            f"{source.label} lacks {wrong[0]}" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "") + f", which "
            f"{type(loaded).__name__} needs, so the model would be partly random; is it the checkpoint of a causal language model, and whole?"
        )
    return Loaded(loaded.eval(), tokenizer_of(source))


def tokenizer_of(source: Source) -> Any:
    """The tokenizer that a checkpoint brings; None where it brings none.

    Raises:
        SourceError: it is there, and transformers cannot load it.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((source.directory / name).exists() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(source.directory)
    except Exception as error:  # a tokenizer's reader may raise anything
        raise SourceError(
            f"transformers cannot load the tokenizer of {source.label}: {type(error).__name__}: {error}"
        ) from error
