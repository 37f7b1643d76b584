"""Find modules whose weights a quantizer holds in its own format, and read what they compute with.

Such a weight is not read from what is stored: the rows of an identity matrix, passed through the module, are the
weights that it multiplies with. So no format needs a decoder here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from .block_list import unwrap_transformers

# The attribute by which a 4-bit linear layer of bitsandbytes knows that the CPU could run its packed form.
CPU_PACKING = "support_avx512bf16_for_cpu"


def quantizer_of(model: nn.Module) -> Any:
    """Return the transformers quantizer that a model was loaded with; None if its weights are not quantized."""
    return getattr(unwrap_transformers(model), "hf_quantizer", None)


def quantizer_name(model: nn.Module) -> str:
    """Return the name of a quantized model's format, such as "bitsandbytes"."""
    method = quantizer_of(model).quantization_config.quant_method
    return str(getattr(method, "value", method))


def is_quantized(module: nn.Module) -> bool:
    """Check whether a module's weight is not a plain tensor of floating-point numbers of at least 16 bits."""
    weight = module._parameters.get("weight")
    if weight is None:
        return False
    is_plain = type(weight) in (torch.Tensor, nn.Parameter) or type(weight).__name__ == "DTensor"
    return not is_plain or not weight.is_floating_point() or weight.element_size() == 1


def quantized_shape(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a quantized linear layer; its weight may hold packed numbers.

    Raises:
        UnsupportedEditError: the module does not tell them.
    """
    inputs, outputs = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        raise UnsupportedEditError(f"a {type(module).__name__} does not tell how many inputs and outputs it has")
    return inputs, outputs


def quantized_numbers(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers a model's quantized weights stand for, and how many their tensors hold."""
    modules = {id(module._parameters["weight"]): module for module in model.modules() if is_quantized(module)}
    weights = [module.get_parameter("weight") for module in modules.values()]
    return sum(math.prod(quantized_shape(module)) for module in modules.values()), sum(w.numel() for w in weights)


@torch.no_grad()
def quantized_rows(module: nn.Module, most: int) -> Iterator[torch.Tensor]:
    """Return the weight of a quantized linear layer with one row for each input, (inputs, outputs).

    Args:
        module: the layer, in evaluation mode.
        most: the largest number of rows at a time.
    """
    weight = module._parameters["weight"]
    assert weight is not None
    dtype = getattr(module, "compute_dtype", None)
    if not isinstance(dtype, torch.dtype):
        dtype = weight.dtype if weight.is_floating_point() and weight.element_size() > 1 else torch.float32
    inputs, _ = quantized_shape(module)
    bias = module(torch.zeros(1, inputs, dtype=dtype, device=weight.device))
    for start in range(0, inputs, most):
        numbers = torch.arange(start, min(start + most, inputs), device=weight.device)
        yield module(nn.functional.one_hot(numbers, inputs).to(dtype)) - bias


def keep_unpacked(model: nn.Module) -> None:
    """Make bitsandbytes compute with 4-bit weights as it stores them.

    On CPUs with AVX-512 BF16, it would pack them at the first forward, round their scales to bfloat16, and compute in
    bfloat16, whatever the model's dtype.
    """
    undo_cpu_packing(model)
    for module in model.modules():
        if CPU_PACKING in vars(module):
            setattr(module, CPU_PACKING, False)


def undo_cpu_packing(model: nn.Module) -> None:
    """Undo how bitsandbytes packs 4-bit weights for CPUs with AVX-512 BF16, without changing what they mean.

    The next forward packs them again. bitsandbytes undoes it by itself whenever a state dict is made, but leaves the
    scales transposed (0.50), or quantizes them a second time, so that model and checkpoint are other models then.
    """
    for module in model.modules():
        weight: Any = module._parameters.get("weight")
        state: Any = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            scales = state.absmax.T.reshape(-1).float()
            state.original_nested = False  # the scales stay as they are
            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
            weight.quant_state.absmax = scales


def lasting_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of a model, which is the same before and after its first forward.

    The scales of 4-bit weights of bitsandbytes are in bfloat16, as that forward may leave them.
    """
    undo_cpu_packing(model)
    state: dict[str, torch.Tensor] = model.state_dict()
    for name, module in model.named_modules():
        format_4bit = getattr(module._parameters.get("weight"), "quant_state", None)
        if format_4bit is not None:
            prefix = f"{name}.weight."
            for key in [key for key in state if key.startswith(prefix)]:
                del state[key]
            scales = format_4bit.absmax
            if format_4bit.nested:
                from bitsandbytes.functional import dequantize_blockwise

                scales = dequantize_blockwise(scales, format_4bit.state2) + format_4bit.offset
            state[f"{prefix}{format_4bit.quant_type}.{format_4bit.blocksize}"] = scales.bfloat16()
    return state
