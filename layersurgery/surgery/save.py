"""Save an edited model only if a reload gives the same model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..atomic_io import atomic_directory, check_output
from ..errors import UnsupportedEditError
from ..models.quantized import quantizer_name, quantizer_of, undo_cpu_packing
from .live_check import adapters, check_reloads_equal, transformers_model

# Formats of quantized weights that save_pretrained writes and from_pretrained reads without a change.
_EXACT_FORMATS = frozenset(("bitsandbytes", "torchao"))


def save(
    model: nn.Module,
    out: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    blocks: str | None = None,
    card: str | None = None,
    **options: Any,
) -> Path:
    """Save a model with `save_pretrained`, and refuse a model that would not reload to the same function.

    The directory is written completely or not at all.

    Args:
        model: a transformers model, edited or not, or a wrapper around one.
        out: the new directory.
        tokenizer: saved to the same directory, so that a pipeline needs no other files.
        overwrite: replace an existing checkpoint at `out`, once the new one is complete.
        blocks: path of the list of blocks, if it cannot be found automatically.
        card: text of the model card, README.md; None for none.
        options: further arguments for `save_pretrained`, such as `max_shard_size`.

    Returns:
        The directory.

    Raises:
        PlanError: `model` is not a loaded model.
        UnsupportedEditError: no checkpoint of this architecture can represent this model. The error names the block and
            the difference. Or a quantized model's format cannot be saved exactly.
        OutputError: `out` exists or cannot be written; no partial output remains.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> model = ls.operate_(model, "drop 20")
        >>> print(ls.save(model, "without-20", tokenizer=tokenizer))
        without-20
    """
    inner, target = transformers_model(model), Path(out)
    check_output(target, None, overwrite=overwrite)
    if adapter_paths := adapters(model):
        raise UnsupportedEditError(
            f"{adapter_paths[-1]} is a PEFT adapter, which a checkpoint of the model does not contain; merge it first "
            "(merge_and_unload)"
        )
    _check_quantization(inner)
    check_reloads_equal(model, blocks)
    size = sum(
        parameter.numel() * parameter.element_size() for _, parameter in inner.named_parameters(remove_duplicate=False)
    )
    undo_cpu_packing(inner)
    with atomic_directory(target, bytes_needed=size, overwrite=overwrite) as directory:
        inner.save_pretrained(directory, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        if card is not None:
            (directory / "README.md").write_text(card, "utf-8")
    inner.name_or_path = str(target)  # PEFT saves this as the base of an adapter that is added later
    return target


def _check_quantization(model: Any) -> None:
    """Refuse a quantized model in whose format a checkpoint cannot be written, or may reload as another model."""
    quantizer = quantizer_of(model)
    if quantizer is None:
        return
    name = quantizer_name(model)
    if name not in _EXACT_FORMATS or not quantizer.is_serializable():
        problem = (
            "transformers cannot write"
            if not quantizer.is_serializable()
            else "have not been shown to reload as the same numbers"
        )
        raise UnsupportedEditError(
            f"the model is quantized by {name}, whose weights {problem}; edit the unquantized checkpoint (layersurgery "
            "in the terminal, edit_checkpoint in Python), and quantize that when it is loaded"
        )
