"""Load a model and its tokenizer from any source: the Hub, a directory, or a GGUF file."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, NamedTuple

from ..errors import PlanError, SourceError
from ..models.model_class import find_model_classes
from ..quick_imports import quick_imports
from ..units import format_list
from .quantize_on_load import quantization_config
from .sources import Source, find_source


class Loaded(NamedTuple):
    """A model and its tokenizer (None if the checkpoint has no tokenizer)."""

    model: Any
    tokenizer: Any


def load(
    model: str | os.PathLike[str],
    *,
    dtype: Any = "auto",
    device: Any = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: str | None = None,
    **options: Any,
) -> Loaded:
    """Load a language model in evaluation mode, and its tokenizer, with transformers.

    A model that also reads images or sound is loaded as a whole, unless transformers can load its text decoder alone.
    Everything here gives it text only.

    Args:
        model: Hub ID, local directory, `.gguf` file, or "smollm2-135m".
        dtype: dtype of the weights: a torch dtype, its name, or "auto" for the dtype of the checkpoint.
        device: the device of all weights ("cpu", "cuda:1"), instead of `device_map`.
        device_map: placement of the weights, as in accelerate ("auto", "cuda", or a map from modules to devices).
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run the code that comes with the model and its tokenizer; without it, it is never run.
        quantize: quantize the linear layers while the model is loaded: "nf4" (4 bits) or "int8"; the unembedding stays
            as it is. It needs bitsandbytes: `pip install 'layersurgery[quantize]'`.
        options: further arguments for `from_pretrained` of AutoModelForCausalLM, or of AutoModelForMultimodalLM for a
            model that the first does not know.

    Returns:
        The model and its tokenizer, as a named tuple.

    Raises:
        SourceError: the model is not found, transformers cannot load it, weights are missing from the checkpoint, or
            bitsandbytes is missing.
        PlanError: both a device and a device map are given, the device does not exist, or the model cannot be quantized
            in this way.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> model.config.num_hidden_layers
        30
    """
    dtype = _torch_dtype(dtype)  # before anything is fetched
    source = replace(find_source(model, revision=revision), trust_remote_code=trust_remote_code)
    loaded = load_weights(source, dtype=dtype, device=device, device_map=device_map, quantize=quantize, **options)
    return Loaded(loaded, tokenizer_of(source))


def load_weights(
    source: Source,
    *,
    dtype: Any = "auto",
    device: Any = None,
    device_map: Any = None,
    quantize: str | None = None,
    **options: Any,
) -> Any:
    """Load the model of a checkpoint in evaluation mode, without its tokenizer; arguments and errors are `load`'s."""
    with quick_imports():
        import transformers.generation.utils  # noqa: F401 - as the next line
        import transformers.modeling_utils  # noqa: F401 - the slow part, which transformers imports later
        from transformers import AutoConfig

        from ..models.quantized import is_quantized, keep_unpacked, quantizer_of
        from ..models.text_model import find_text_model

    dtype = _torch_dtype(dtype)
    if device is not None:
        device_map = _placed_on(device, device_map)
    if quantize is not None:
        if "quantization_config" in options:
            raise PlanError("`quantize` and `quantization_config` were both given; give one of them")
        options["quantization_config"] = quantization_config(quantize, source, dtype)
    arguments = {
        "dtype": dtype, "device_map": device_map, "trust_remote_code": source.trust_remote_code, **options
    }  # fmt: skip
    refusal: SourceError | None = None
    try:
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
        for model_class, own_config in find_model_classes(config):
            config_argument = {} if own_config is config else {"config": own_config}
            loaded, report = model_class.from_pretrained(
                source.directory, output_loading_info=True, **config_argument, **arguments
            )
            absent = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind, ())]
            if not absent:
                break
            refusal = refusal or SourceError(
                f"{source.label} lacks {format_list(sorted(absent))}, which {type(loaded).__name__} needs, so some "
                "weights would be random. Check that it is a complete checkpoint of a language model"
            )
        else:
            assert refusal is not None
            raise refusal
    except Exception as error:  # config classes, constructors and weight loaders raise any exception
        raise refusal or SourceError(f"transformers cannot load {source.label}: {reason_of(error)}") from error
    if quantizer_of(loaded) is not None:
        keep_unpacked(loaded)
    if quantize is not None and not any(map(is_quantized, loaded.modules())):
        raise SourceError(f"{source.label} has no linear layer that bitsandbytes quantizes; omit `quantize`")
    return find_text_model(loaded.eval())


def _torch_dtype(dtype: Any) -> Any:
    """Return the torch dtype of a name; "auto" and a dtype stay as they are.

    Raises:
        SourceError: torch has no dtype of this name.
    """
    import torch

    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    torch_dtype = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(torch_dtype, torch.dtype):
        raise SourceError(f"{dtype!r} is not a torch dtype; use float32, bfloat16, float16 or auto")
    return torch_dtype


def _placed_on(device: Any, device_map: Any) -> dict[str, Any]:
    """Return the device map that puts all weights on one device.

    Raises:
        PlanError: there is another device map, or the device does not exist.
    """
    import torch

    if device_map is not None:
        raise PlanError(f"`device` ({device}) and `device_map` ({device_map}) were both given; give one of them")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:  # of torch without CUDA
        raise PlanError(f"`device` {device!r} cannot be used: {str(error).partition(chr(10))[0]}") from None
    return {"": device}


def reason_of(error: Exception) -> str:
    """Say why transformers cannot load something; code of the model that is not trusted has its own remedy."""
    if "trust_remote_code" in str(error):
        return (
            "it comes with its own code, which is run only if you ask for it. Read the code; if you trust it, give "
            "trust_remote_code=True (--trust-remote-code)"
        )
    return f"{type(error).__name__}: {error}"


def tokenizer_of(source: Source) -> Any:
    """Load the tokenizer of a checkpoint; return None if it has no tokenizer.

    Raises:
        SourceError: there is a tokenizer, but transformers cannot load it.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((source.directory / name).exists() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # tokenizer loaders raise any exception
        raise SourceError(f"transformers cannot load the tokenizer of {source.label}: {reason_of(error)}") from error
