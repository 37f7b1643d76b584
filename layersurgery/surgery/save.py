"""Saving an edited model so that it surely comes back as itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..atomic_io import atomic_directory, check_output
from ..errors import UnsupportedEditError
from .live_check import adapters, check_reloads_equal, transformers_model


def save(
    model: nn.Module, out: str | os.PathLike[str], *, tokenizer: Any = None, overwrite: bool = False, **options: Any
) -> Path:
    """`save_pretrained`, guarded: what would not reload to the same function is refused, and the directory appears whole or not at all.

    Args:
        model: a transformers model, edited or not, or a wrapper around one.
        out: the new directory.
        tokenizer: saved beside it, so that a pipeline needs nothing else.
        overwrite: replace an existing checkpoint at `out`, once the new one is complete.
        options: for `save_pretrained`, such as `max_shard_size`.

    Returns:
        The directory.

    Raises:
        UnsupportedEditError: no checkpoint of this architecture can say this model; says which block and what differs.
        OutputError: `out` exists, or cannot be written; nothing is left behind.
    """
    target = Path(out)
    check_output(target, None, overwrite=overwrite)
    if found := adapters(model):
        raise UnsupportedEditError(
            f"{found[-1]} is an adapter of PEFT, which a checkpoint of the model does not hold; merge it first (merge_and_unload)"
        )
    check_reloads_equal(model)
    inner = transformers_model(model)
    size = sum(
        parameter.numel() * parameter.element_size() for _, parameter in inner.named_parameters(remove_duplicate=False)
    )
    with atomic_directory(target, bytes_needed=size, overwrite=overwrite) as directory:
        inner.save_pretrained(directory, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    return target
