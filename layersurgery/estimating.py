"""What a sweep would take in memory, traffic and arithmetic, from a config alone: no weight is read, and nothing is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from .blocks import locate, text_config
from .errors import PlanError, SourceError
from .families import Variant
from .forecasting import Forecast, Needs, sequences_at_once
from .placing import AUTO, DeviceMap, MaxMemory, describe
from .trie import LAYER_MAJOR, layer_major, schedule

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
    passing: int
    forecast: Forecast
    text: int
    program: int
    order: str
    at_home: int | None
    read_a_batch: int
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
        found[self.device] = found.get(self.device, 0) + self.passing + self.forecast.working
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
    found = locate(model, blocks)
    path, stack = found.path, list(found.blocks)
    placed = {"": device} if device_map is None else _mapped(model, device_map, max_memory, dtype)
    weights = _by_place(model, placed)
    main = next((str(place) for place in placed.values() if str(place) not in (CPU, DISK)), CPU)
    elsewhere = (DISK,) if main == CPU else (CPU, DISK)
    away = [
        sum(_by_place(block, placed, f"{path}.{number}").get(place, 0) for place in elsewhere)
        for number, block in enumerate(stack)
    ]
    routes = list(dict.fromkeys(variant.route for variant in variants))
    lazily = any(away) if order is None else order == LAYER_MAJOR
    plan = layer_major(routes, len(stack)) if lazily else schedule(routes, len(stack))
    width = _width(model)
    needs = Needs.of(model, stack, width=width)
    sequences = math.ceil(tokens / context)
    here = torch.device(main if main == CPU or torch.cuda.is_available() else CPU)
    at_once = min(sequences, batch_size or sequences_at_once(needs, plan, context, here))
    outside = sum(weights.get(place, 0) for place in elsewhere) - sum(away)
    visits = plan.brought if lazily else tuple(range(len(stack))) * (1 + (plan.calls - plan.depth) // max(1, plan.depth))
    readouts = len(routes) + 1
    return Estimate(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        device=main,
        devices=describe(placed, path) if device_map is not None else device,
        weights=weights,
        passing=max(away) * ((plan.at_home or 0) + 1) + outside,
        forecast=needs.forecast(plan, at_once, context),
        text=2 * 8 * sequences * context,
        program=int(psutil.Process().memory_info().rss),
        order=plan.name,
        at_home=plan.at_home,
        read_a_batch=sum(away[block] for block in visits) + outside,
        sequences=at_once,
        batches=math.ceil(sequences / at_once),
        block_calls=plan.calls,
        readouts=readouts,
        flops=sequences * context * (plan.calls * _block_flops(config, stack[0], width, context) + readouts * 2.0 * width * needs.vocabulary),
    )  # fmt: skip


def _unfilled(config: Any, dtype: str) -> Any:
    """The model without memory for its weights."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype, torch.float32))
    except Exception as error:  # a constructor may raise anything
        raise SourceError(f"transformers cannot build the model of this config: {type(error).__name__}: {error}") from error


def _mapped(model: Any, device_map: DeviceMap, max_memory: MaxMemory | None, dtype: str) -> dict[str, Any]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if isinstance(device_map, dict):
        names = [name for name, _ in model.named_parameters()]
        if lost := [
            name for name in names if not any(not key or name == key or name.startswith(f"{key}.") for key in device_map)
        ]:
            raise PlanError(f"--device-map says nothing of {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""))
        return device_map
    if device_map not in AUTO:
        return {"": device_map}
    options = {"no_split_module_classes": list(getattr(model, "_no_split_modules", None) or ()), "dtype": getattr(torch, dtype)}
    if device_map != "sequential":
        max_memory = get_balanced_memory(model, max_memory, low_zero=device_map == "balanced_low_0", **options)
    return dict(infer_auto_device_map(model, max_memory=max_memory, **options))


def _by_place(module: nn.Module, placed: dict[str, Any], prefix: str = "") -> dict[str, int]:
    """Bytes of parameters and buffers by where a map puts them; buffers that no checkpoint holds are never on a disk."""
    found: dict[str, int] = {}
    kept = set(module.state_dict())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        path = f"{prefix}.{name}" if prefix else name
        keys = [key for key in placed if not key or path == key or path.startswith(f"{key}.")]
        place = str(placed[max(keys, key=len)]) if keys and name in kept else CPU
        found[place] = found.get(place, 0) + tensor.nbytes
    return found


def _width(model: Any) -> int:
    """Of the residual stream."""
    return int(getattr(text_config(model), "hidden_size", 0) or model.get_input_embeddings().weight.shape[1])


def _block_flops(config: Any, block: nn.Module, width: int, context: int) -> float:
    """Of one token through one block: its matrices, of a mixture's only the chosen experts, and attention to half of the context."""
    text = config.get_text_config(decoder=True)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    experts = next((value for name in names if isinstance(value := getattr(text, name, None), int) and value), 1)
    share = min(1.0, (getattr(text, "num_experts_per_tok", None) or experts) / experts)
    matrices = sum(
        parameter.numel() * (share if "experts" in name and "shared" not in name else 1)
        for name, parameter in block.named_parameters()
        if parameter.dim() > 1
    )
    return 2.0 * matrices + 2.0 * context * width
