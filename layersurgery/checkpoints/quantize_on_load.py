"""Quantize a model to 4 or 8 bits while it is loaded, with bitsandbytes."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from ..errors import PlanError, SourceError
from .sources import Source

FORMATS = ("nf4", "int8")
_DTYPES = ("float32", "bfloat16", "float16")


def check_quantize(quantize: str, source: Source, dtype: Any = "auto") -> None:
    """Refuse a quantization that cannot be made.

    Args:
        quantize: one of `FORMATS`.
        source: the model.
        dtype: dtype of the weights that stay as they are, or its name, or "auto".

    Raises:
        PlanError: the format is unknown, the dtype cannot be used with it, or the model is quantized already.
        SourceError: bitsandbytes is not installed.
    """
    if quantize not in FORMATS:
        raise PlanError(f"`quantize` {quantize!r} is unknown; use {' or '.join(FORMATS)}")
    name = str(dtype).removeprefix("torch.")
    if name not in (*_DTYPES, "auto"):
        raise PlanError(f"`quantize` {quantize} does not compute in {name}; use `dtype` {', '.join(_DTYPES)} or auto")
    settings = _config(source).get("quantization_config")
    if settings:
        method = settings.get("quant_method") or "quantization_config in its config.json"
        raise PlanError(f"{source.label} is quantized already ({method}) and is loaded as it is; omit `quantize`")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SourceError(
            f"`quantize` {quantize} needs the package bitsandbytes, which is not installed; run: "
            "pip install 'layersurgery[quantize]'"
        )


def quantization_config(quantize: str, source: Source, dtype: Any) -> Any:
    """Return the settings with which transformers quantizes a model while it loads it.

    4-bit weights are NF4 in blocks of 64 with float32 scales. They are multiplied in the dtype of the other weights.

    Args:
        quantize: one of `FORMATS`.
        source: the model.
        dtype: dtype of the other weights, or "auto" for that of the checkpoint.

    Raises:
        PlanError: as for `check_quantize`.
        SourceError: as for `check_quantize`.
    """
    import torch
    from transformers import BitsAndBytesConfig

    check_quantize(quantize, source, dtype)
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if dtype == "auto":
        config = _config(source)
        inner = config.get("text_config") or {}
        values = (owner.get(name) for owner in (inner, config) for name in ("dtype", "torch_dtype"))
        dtype = getattr(torch, str(next(filter(None, values), "float32")).removeprefix("torch."), torch.float32)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_compute_dtype=dtype)


def _config(source: Source) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((source.directory / "config.json").read_text("utf-8"))
    return fields
