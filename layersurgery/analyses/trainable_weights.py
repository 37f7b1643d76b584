"""Choose the weights of a model that are trained: LoRA in the linear layers of its blocks, or all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import SourceError, UnsupportedEditError
from ..models.block_list import find_decoder_blocks, unwrap_transformers
from ..models.quantized import is_quantized
from ..runtime.offload import offloaded

if TYPE_CHECKING:
    from .heal_training import TrainingOptions


def check_trainable(student: nn.Module, how: str) -> None:
    """Refuse a model whose weights cannot be trained here.

    Raises:
        UnsupportedEditError: weights are quantized, offloaded, or too coarse to be trained in full.
    """
    if any(map(is_quantized, student.modules())):
        raise UnsupportedEditError(
            "the model to heal is quantized, and what is trained would have to be merged into quantized weights; heal "
            "the unquantized checkpoint, and quantize the result when it is loaded"
        )
    if offloaded(student) or any(parameter.is_meta for parameter in student.parameters()):
        raise UnsupportedEditError(
            "weights of the model to heal are offloaded, and training needs all of them in memory; load it without a "
            "device map"
        )
    coarse = {parameter.dtype for parameter in student.parameters()} - {torch.float32, torch.float64}
    if how == "full" and coarse:
        raise UnsupportedEditError(
            f"training all weights needs them in float32, since small steps are lost in {str(coarse.pop())[6:]}; load "
            "the model in float32 (`dtype`), with `mixed_precision` bf16 to compute in half precision, or train LoRA"
        )


@contextmanager
def trainable_weights(student: nn.Module, options: TrainingOptions, seed: int) -> Iterator[Callable[[], None]]:
    """Choose the weights to train: LoRA in the blocks' linear layers, or all. Modules of zeros stay zero.

    A branch that an edit skips on disk is an output projection of zeros.

    Args:
        student: the model.
        options: what is trained.
        seed: seed of LoRA's first matrices.

    Yields:
        A function that merges what was trained into the model's own weights. Without it, LoRA is removed at the end.

    Raises:
        UnsupportedEditError: blocks share weights, or have no linear layers.
        SourceError: PEFT is not installed.
    """
    zeros = [module for module in student.modules() if _is_zero(module)]
    required = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    adapted: Any = None

    def merge() -> None:
        nonlocal adapted
        if adapted is not None:
            adapted.merge_and_unload()
            adapted = None

    try:
        if options.how == "full":
            for parameter in student.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            for module in zeros:
                module.requires_grad_(False)
        else:
            for parameter in student.parameters():
                parameter.requires_grad_(False)
            adapted = _add_lora(student, options.rank, seed, zeros)
        yield merge
    finally:
        if adapted is not None:
            adapted.unload()
        for parameter, was_required in required:
            parameter.requires_grad_(was_required)


def _is_zero(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1 and not bool(weight.any())


def _add_lora(student: nn.Module, rank: int, seed: int, zeros: list[nn.Module]) -> Any:
    from transformers.pytorch_utils import Conv1D

    peft = _import_peft()
    inner = unwrap_transformers(student)
    blocks = find_decoder_blocks(inner)
    layers = {
        f"{blocks.path}.{name}": module
        for name, module in blocks.blocks.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear | Conv1D) and not any(module is zero for zero in zeros)
    }
    weights = [id(module.weight) for module in layers.values()]
    if len(set(weights)) < len(weights):
        raise UnsupportedEditError(
            "blocks share their weights (a repeated block in memory), and merging LoRA would add it to them once for "
            "each; write the edited checkpoint, in which each has its own weights, and heal that, or train all weights "
            "(`how` full)"
        )
    if not layers:
        raise UnsupportedEditError("the blocks have no linear layers for LoRA; train all weights (`how` full)")
    transposed = any(isinstance(module, Conv1D) for module in layers.values())
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=[*layers], fan_in_fan_out=transposed
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(inner, config)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise SourceError(
            "healing with LoRA needs the package peft, which is not installed; run: pip install 'layersurgery[heal]', "
            "or train all weights (`how` full)"
        ) from None
    return peft
