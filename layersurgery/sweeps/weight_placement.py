"""Find where a device map puts the weights of a model, from its config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import PlanError, SourceError
from ..models.block_list import BlockList, find_decoder_blocks
from ..models.model_class import build_model
from ..runtime.device_map import AUTO, DeviceMap, MaxMemory, describe
from ..units import format_list

CPU, DISK = "cpu", "disk"


@dataclass(frozen=True, slots=True)
class WeightPlacement:
    """Location of a model's weights.

    Attributes:
        device: the device on which blocks are computed; offloaded weights are loaded to it.
        description: description of the device map.
        weights: bytes of weights by location (a device, "cpu" or "disk").
        offloaded: bytes of offloaded weights of each block.
        offloaded_outside: bytes of offloaded weights outside the blocks.
    """

    device: str
    description: str
    weights: dict[str, int]
    offloaded: list[int]
    offloaded_outside: int

    @property
    def compute_device(self) -> torch.device:
        """Return the device on which blocks are computed; the CPU on a machine without it."""
        if not torch.cuda.is_available():
            return torch.device(CPU)
        return torch.device(int(self.device) if self.device.isdecimal() else self.device)


def place_weights(
    model: nn.Module,
    block_list: BlockList,
    device: str,
    device_map: DeviceMap | None,
    max_memory: MaxMemory | None,
    dtype: str,
) -> WeightPlacement:
    """Place the weights of a model on devices.

    Args:
        model: the model, on the meta device.
        block_list: its list of blocks.
        device: the device to compute on if there is no device map.
        device_map: a map from modules to devices, or the name of a method that makes one ("auto").
        max_memory: memory that each device may use, if a device map is made.
        dtype: dtype of the weights.

    Raises:
        PlanError: the device map does not cover the model.
    """
    path = block_list.path
    placement = {"": device} if device_map is None else _resolve_device_map(model, device_map, max_memory, dtype)
    main = next((str(location) for location in placement.values() if str(location) not in (CPU, DISK)), CPU)
    offload_locations = (DISK,) if main == CPU else (CPU, DISK)

    def offloaded(sizes: dict[str, int]) -> int:
        return sum(sizes.get(location, 0) for location in offload_locations)

    weights = _bytes_by_location(model, placement, main)
    in_blocks = [
        offloaded(_bytes_by_location(block, placement, main, f"{path}.{number}"))
        for number, block in enumerate(block_list.blocks)
    ]
    description = device if device_map is None else describe(placement, path)
    return WeightPlacement(main, description, weights, in_blocks, offloaded(weights) - sum(in_blocks))


def blocks_on_disk(config: Any, blocks: str | None = None) -> DeviceMap:
    """Make a device map with all blocks on disk and all other modules in main memory.

    It suits work that reads each block's weights only once.

    Args:
        config: a transformers config.
        blocks: path of the list of blocks, if it cannot be found automatically.

    Returns:
        A map from module names to "disk" or "cpu".

    Raises:
        SourceError: transformers cannot build the model.
    """
    model = build_meta_model(config, "float32")
    block_list = find_decoder_blocks(model, blocks)
    path = block_list.path
    parents = {".".join(path.split(".")[:end]) for end in range(path.count(".") + 2)} | {""}
    device_map: dict[str, int | str] = {f"{path}.{number}": DISK for number in range(len(block_list.blocks))}
    for parent in sorted(parents - {path}):
        module = model.get_submodule(parent)
        child_names = [
            name
            for name, _ in (
                *module.named_children(),
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            )
        ]
        names = [f"{parent}.{name}" if parent else name for name in child_names]
        device_map |= {name: CPU for name in names if name not in parents}
    return device_map


def build_meta_model(config: Any, dtype: str) -> Any:
    """Build the model on the meta device, without memory for its weights.

    Args:
        config: a transformers config.
        dtype: dtype of the weights.

    Raises:
        SourceError: transformers cannot build the model.
    """
    # A config of the model's own code exists only where that code was trusted.
    is_trusted = type(config).__module__.startswith("transformers_modules")
    try:
        with torch.device("meta"):
            return build_model(config, dtype=getattr(torch, dtype, torch.float32), trust_remote_code=is_trusted)
    except Exception as error:  # a constructor may raise anything
        raise SourceError(
            f"transformers cannot build the model of this config: {type(error).__name__}: {error}"
        ) from error


def pack_weights(model: Any, quantize: str) -> None:
    """Give the linear layers of a model on the meta device the sizes of quantized ones, scales included.

    Args:
        model: the model; its unembedding is not quantized.
        quantize: "nf4" (blocks of 64 numbers with a float32 scale), or "int8" (a float32 scale for each output).
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D) and module is not head:
            numbers = module.weight.numel()
            outputs = module.weight.shape[1 if type(module) is Conv1D else 0]
            size = numbers // 2 + 4 * math.ceil(numbers / 64) if quantize == "nf4" else numbers + 4 * outputs
            module.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)


def _resolve_device_map(model: Any, device_map: DeviceMap, max_memory: MaxMemory | None, dtype: str) -> dict[str, Any]:
    """Return a device map as a dictionary; let accelerate make it if only the name of a method is given."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    if isinstance(device_map, dict):
        names = [name for name, _ in model.named_parameters()]
        if missing := [
            name
            for name in names
            if not any(not key or name == key or name.startswith(f"{key}.") for key in device_map)
        ]:
            raise PlanError(
                f"the device map gives no device for {format_list(missing)}; give one to each parameter or to a module "
                "around it"
            )
        return device_map
    if device_map not in AUTO:
        return {"": device_map}
    options = {
        "no_split_module_classes": list(getattr(model, "_no_split_modules", None) or ()),
        "dtype": getattr(torch, dtype),
    }
    if max_memory is None:  # leave some memory free, as transformers does
        max_memory = {device: int(0.9 * size) for device, size in get_max_memory().items()}
    if device_map != "sequential":
        max_memory = get_balanced_memory(model, max_memory, low_zero=device_map == "balanced_low_0", **options)
    return dict(infer_auto_device_map(model, max_memory=max_memory, **options))


def _bytes_by_location(module: nn.Module, placement: dict[str, Any], main: str, prefix: str = "") -> dict[str, int]:
    """Sum the bytes of a module's tensors by location.

    Parameters are where the device map puts them. Buffers stay on the device that computes.

    Args:
        module: the module.
        placement: the device map.
        main: the device that computes.
        prefix: the module's path in the model.
    """
    sizes: dict[str, int] = {}
    parameters = dict(module.named_parameters())
    for name, tensor in (*parameters.items(), *module.named_buffers()):
        path = f"{prefix}.{name}" if prefix else name
        keys = [key for key in placement if not key or path == key or path.startswith(f"{key}.")]
        location = str(placement[max(keys, key=len)]) if keys and name in parameters else main
        sizes[location] = sizes.get(location, 0) + tensor.nbytes
    return sizes
