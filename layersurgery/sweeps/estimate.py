"""Estimate the memory, loaded bytes and floating-point operations of a sweep from a config alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from ..errors import PlanError, SourceError
from ..models.block_list import find_decoder_blocks, text_config
from ..plans.variants import Variant
from ..runtime.device_map import AUTO, DeviceMap, MaxMemory, describe
from ..units import format_list
from .memory import MemoryModel, MemoryUse, suggest_batch_size
from .schedule import LAYER_MAJOR, layer_major, schedule

CPU, DISK = "cpu", "disk"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimated cost of a sweep. Sizes are in bytes.

    Attributes:
        parameters: number of the model's parameters.
        device: the device on which blocks are computed; offloaded weights are loaded to it.
        devices: description of the device map.
        weights: bytes of weights by location (a device, "cpu" or "disk").
        in_flight_bytes: offloaded weights that are on the device together: the resident blocks and the prefetched one.
        memory: memory that one batch needs while it is measured.
        text: all token ids and their mask, in main memory.
        program: memory that this process uses already (Python, torch and more).
        order: order of the schedule, "depth-first" or "layer-major".
        resident_blocks: layer by layer: number of blocks that are loaded at the same time; else None.
        bytes_loaded_per_batch: bytes of offloaded weights that one batch loads.
        sequences: number of sequences in a batch.
        batches: number of batches.
        block_calls: number of block calls in a batch.
        readouts: number of readouts in a batch.
        flops: floating-point operations of matrix products for the whole text (two for each multiplication and
            addition).
    """

    parameters: int
    device: str
    devices: str
    weights: dict[str, int]
    in_flight_bytes: int
    memory: MemoryUse
    text: int
    program: int
    order: str
    resident_blocks: int | None
    bytes_loaded_per_batch: int
    sequences: int
    batches: int
    block_calls: int
    readouts: int
    flops: float

    @property
    def peak(self) -> dict[str, int]:
        """Return the largest number of bytes in use at the same time on each device, without disks."""
        peak = {location: size for location, size in self.weights.items() if location != DISK}
        peak.setdefault(CPU, 0)
        peak[self.device] = peak.get(self.device, 0) + self.in_flight_bytes + self.memory.working
        peak[CPU] += self.text + self.program
        return peak


def estimate(
    config: Any,
    variants: Sequence[Variant],
    *,
    tokens: int,
    context: int,
    dtype: str = "float32",
    device: str = CPU,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    batch_size: int | None = None,
    order: str | None = None,
    blocks: str | None = None,
) -> Estimate:
    """Estimate the cost of measuring edited models on text.

    Args:
        config: a transformers config.
        variants: the edited models, without the unedited one.
        tokens: number of tokens of the text.
        context: number of tokens of one sequence.
        dtype: dtype of the weights.
        device: the device to compute on if there is no device map.
        device_map: a map from modules to devices, or the name of a method that makes one ("auto").
        max_memory: memory that each device may use, if a device map is made.
        batch_size: number of sequences in a batch; by default chosen from the memory that is free on this machine now.
        order: order of the schedule, as for `sweep`.
        blocks: path of the list of blocks, if it cannot be found automatically.

    Returns:
        The estimated cost.

    Raises:
        SourceError: transformers cannot build the model.
        PlanError: the device map does not cover the model.
    """
    model = _build_meta_model(config, dtype)
    block_list = find_decoder_blocks(model, blocks)
    path, decoder_blocks = block_list.path, list(block_list.blocks)
    placement = {"": device} if device_map is None else _resolve_device_map(model, device_map, max_memory, dtype)
    main = next((str(location) for location in placement.values() if str(location) not in (CPU, DISK)), CPU)
    weights = _bytes_by_location(model, placement, main)
    offload_locations = (DISK,) if main == CPU else (CPU, DISK)
    block_weights = [
        _bytes_by_location(block, placement, main, f"{path}.{number}") for number, block in enumerate(decoder_blocks)
    ]
    offloaded = [sum(sizes.get(location, 0) for location in offload_locations) for sizes in block_weights]
    context = min(context, max(2, tokens))
    routes = list(dict.fromkeys(variant.route for variant in variants))
    by_layer = any(offloaded) if order is None else order == LAYER_MAJOR
    plan = layer_major(routes, len(decoder_blocks)) if by_layer else schedule(routes, len(decoder_blocks))
    width = _stream_width(model)
    output = model.get_output_embeddings()
    vocabulary = int(text_config(model).vocab_size if output is None else output.weight.shape[0])
    needs = MemoryModel.from_model(model, decoder_blocks, width=width, vocabulary=vocabulary)
    sequences = math.ceil(tokens / context)
    compute_device = torch.device((int(main) if main.isdecimal() else main) if torch.cuda.is_available() else CPU)
    batch_sequences = min(sequences, batch_size or suggest_batch_size(needs, plan, context, compute_device))
    offloaded_outside = sum(weights.get(location, 0) for location in offload_locations) - sum(offloaded)
    readouts = len(routes) + 1
    block_flops = _flops_per_token(config, decoder_blocks, width, context)
    return Estimate(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        device=main,
        devices=describe(placement, path) if device_map is not None else device,
        weights=weights,
        in_flight_bytes=plan.bytes_in_flight(offloaded) + offloaded_outside,
        memory=needs.predict(plan, batch_sequences, context),
        text=2 * 8 * sequences * context,
        program=int(psutil.Process().memory_info().rss),
        order=plan.name,
        resident_blocks=plan.resident_blocks,
        bytes_loaded_per_batch=plan.bytes_read(offloaded, offloaded_outside),
        sequences=batch_sequences,
        batches=math.ceil(sequences / batch_sequences),
        block_calls=plan.calls,
        readouts=readouts,
        flops=sequences * context * (plan.calls * block_flops + readouts * 2.0 * width * needs.vocabulary),
    )


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
    model = _build_meta_model(config, "float32")
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


def _build_meta_model(config: Any, dtype: str) -> Any:
    """Build the model on the meta device, without memory for its weights."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype, torch.float32))
    except Exception as error:  # a constructor may raise anything
        raise SourceError(
            f"transformers cannot build the model of this config: {type(error).__name__}: {error}"
        ) from error


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


def _stream_width(model: Any) -> int:
    """Return the width of the residual stream."""
    return int(getattr(text_config(model), "hidden_size", 0) or model.get_input_embeddings().weight.shape[1])


def _flops_per_token(config: Any, blocks: Sequence[nn.Module], width: int, context: int) -> float:
    """Return the floating-point operations of one token in the average block.

    They are the products with the block's matrices (in a mixture of experts, only with the active experts), and
    attention to half of the context.
    """
    text = config.get_text_config(decoder=True)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    experts = next((value for name in names if isinstance(value := getattr(text, name, None), int) and value), 1)
    share = min(1.0, (getattr(text, "num_experts_per_tok", None) or experts) / experts)
    matrices = sum(
        parameter.numel() * (share if "experts" in name and "shared" not in name else 1)
        for block in blocks
        for name, parameter in block.named_parameters()
        if parameter.dim() > 1
    )
    return 2.0 * matrices / len(blocks) + 2.0 * context * width
