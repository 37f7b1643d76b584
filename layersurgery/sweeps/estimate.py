"""What a sweep would take in memory, traffic and arithmetic, from a config alone: no weight is read, and nothing is run."""

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
from .memory import MemoryModel, MemoryUse, suggest_batch_size
from .schedule import LAYER_MAJOR, layer_major, schedule

CPU, DISK = "cpu", "disk"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a sweep would take. Bytes, unless a name says otherwise.

    Attributes:
        parameters: of the model.
        device: where blocks compute; those kept elsewhere are brought there.
        devices: the device map in words.
        weights: on each place (devices, "cpu", "disk").
        passing: weights of offloaded blocks that are on the device for a while: those at hand, and the next one.
        forecast: what a batch takes while it is measured.
        text: all token ids and their mask, in main memory.
        program: Python, torch and what else this process holds already.
        order: "depth-first" or "layer-major".
        at_home: layer by layer, blocks at hand together.
        read_a_batch: weights brought in for each batch.
        sequences: measured at once.
        batches: so many there are.
        block_calls: for a batch.
        readouts: for a batch.
        flops: of multiplications, for all of the text.
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
        """The most that each place holds at a time, disks left out."""
        found = {place: count for place, count in self.weights.items() if place != DISK}
        found.setdefault(CPU, 0)
        found[self.device] = found.get(self.device, 0) + self.in_flight_bytes + self.memory.working
        found[CPU] += self.text + self.program
        return found


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
    """What it would take to measure edited models on text.

    Args:
        config: a transformers config.
        variants: the edited models, the unedited one left out.
        tokens: of the text.
        context: tokens of a sequence.
        dtype: of the weights.
        device: where to compute, where there is no device map.
        device_map: of modules to devices, or a way to make one.
        max_memory: that each device may give, for making one.
        batch_size: sequences at once; otherwise by the memory that is free here now.
        order: which way to go, as for `sweep`.
        blocks: path of the list of blocks, where it cannot be found.

    Raises:
        SourceError: transformers cannot build the model.
        PlanError: the device map does not fit it.
    """
    model = _unfilled(config, dtype)
    found = find_decoder_blocks(model, blocks)
    path, runner = found.path, list(found.blocks)
    placed = {"": device} if device_map is None else _mapped(model, device_map, max_memory, dtype)
    main = next((str(place) for place in placed.values() if str(place) not in (CPU, DISK)), CPU)
    weights = _by_place(model, placed, main)
    elsewhere = (DISK,) if main == CPU else (CPU, DISK)
    blocks_at = [_by_place(block, placed, main, f"{path}.{number}") for number, block in enumerate(runner)]
    away = [sum(at.get(place, 0) for place in elsewhere) for at in blocks_at]
    context = min(context, max(2, tokens))
    routes = list(dict.fromkeys(variant.route for variant in variants))
    lazily = any(away) if order is None else order == LAYER_MAJOR
    plan = layer_major(routes, len(runner)) if lazily else schedule(routes, len(runner))
    width = _width(model)
    output = model.get_output_embeddings()
    vocabulary = int(text_config(model).vocab_size if output is None else output.weight.shape[0])
    needs = MemoryModel.of(model, runner, width=width, vocabulary=vocabulary)
    sequences = math.ceil(tokens / context)
    here = torch.device((int(main) if main.isdecimal() else main) if torch.cuda.is_available() else CPU)
    at_once = min(sequences, batch_size or suggest_batch_size(needs, plan, context, here))
    outside = sum(weights.get(place, 0) for place in elsewhere) - sum(away)
    readouts = len(routes) + 1
    return Estimate(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        device=main,
        devices=describe(placed, path) if device_map is not None else device,
        weights=weights,
        in_flight_bytes=plan.bytes_in_flight(away) + outside,
        memory=needs.predict(plan, at_once, context),
        text=2 * 8 * sequences * context,
        program=int(psutil.Process().memory_info().rss),
        order=plan.name,
        resident_blocks=plan.resident_blocks,
        bytes_loaded_per_batch=plan.bytes_read(away, outside),
        sequences=at_once,
        batches=math.ceil(sequences / at_once),
        block_calls=plan.calls,
        readouts=readouts,
        flops=sequences * context * (plan.calls * _block_flops(config, runner, width, context) + readouts * 2.0 * width * needs.vocabulary),
    )  # fmt: skip


def blocks_on_disk(config: Any, blocks: str | None = None) -> DeviceMap:
    """A device map with all blocks on disk, and the rest in main memory: for weights that are looked at once each.

    Args:
        config: a transformers config.
        blocks: path of the list of blocks, where it cannot be found.

    Raises:
        SourceError: transformers cannot build the model.
    """
    model = _unfilled(config, "float32")
    found = find_decoder_blocks(model, blocks)
    above = {".".join(found.path.split(".")[:end]) for end in range(found.path.count(".") + 2)} | {""}
    spread: dict[str, int | str] = {f"{found.path}.{number}": DISK for number in range(len(found.blocks))}
    for owner in sorted(above - {found.path}):
        module = model.get_submodule(owner)
        beside = [
            name
            for name, _ in (
                *module.named_children(),
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            )
        ]
        names = [f"{owner}.{name}" if owner else name for name in beside]
        spread |= {name: CPU for name in names if name not in above}
    return spread


def _unfilled(config: Any, dtype: str) -> Any:
    """The model without memory for its weights."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype, torch.float32))
    except Exception as error:  # a constructor may raise anything
        raise SourceError(
            f"transformers cannot build the model of this config: {type(error).__name__}: {error}"
        ) from error


def _mapped(model: Any, device_map: DeviceMap, max_memory: MaxMemory | None, dtype: str) -> dict[str, Any]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    if isinstance(device_map, dict):
        names = [name for name, _ in model.named_parameters()]
        if lost := [
            name
            for name in names
            if not any(not key or name == key or name.startswith(f"{key}.") for key in device_map)
        ]:
            raise PlanError(
                f"--device-map says nothing of {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
            )
        return device_map
    if device_map not in AUTO:
        return {"": device_map}
    options = {
        "no_split_module_classes": list(getattr(model, "_no_split_modules", None) or ()),
        "dtype": getattr(torch, dtype),
    }
    if max_memory is None:  # as transformers does, some is left free
        max_memory = {device: int(0.9 * size) for device, size in get_max_memory().items()}
    if device_map != "sequential":
        max_memory = get_balanced_memory(model, max_memory, low_zero=device_map == "balanced_low_0", **options)
    return dict(infer_auto_device_map(model, max_memory=max_memory, **options))


def _by_place(module: nn.Module, placed: dict[str, Any], main: str, prefix: str = "") -> dict[str, int]:
    """Bytes of parameters by where a map puts them, and of buffers, which stay where they are worked with."""
    found: dict[str, int] = {}
    parameters = dict(module.named_parameters())
    for name, tensor in (*parameters.items(), *module.named_buffers()):
        path = f"{prefix}.{name}" if prefix else name
        keys = [key for key in placed if not key or path == key or path.startswith(f"{key}.")]
        place = str(placed[max(keys, key=len)]) if keys and name in parameters else main
        found[place] = found.get(place, 0) + tensor.nbytes
    return found


def _width(model: Any) -> int:
    """Of the residual stream."""
    return int(getattr(text_config(model), "hidden_size", 0) or model.get_input_embeddings().weight.shape[1])


def _block_flops(config: Any, blocks: Sequence[nn.Module], width: int, context: int) -> float:
    """Of one token through the mean block: its matrices, of a mixture's only the chosen experts, and attention to half of the context."""
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
