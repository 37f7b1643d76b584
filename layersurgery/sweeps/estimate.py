"""Estimate the memory, loaded bytes and floating-point operations of a sweep from a config alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from ..metrics import tiled
from ..models.block_costs import active_share, is_expert
from ..models.block_list import find_decoder_blocks, text_config
from ..plans.route import Route
from ..plans.variants import Variant
from ..runtime.device_map import DeviceMap, MaxMemory
from ..runtime.matmul_rate import matmul_rate
from .memory import MemoryModel, MemoryUse, suggest_batch_size, tensor_bytes
from .propagation import count_columns, propagation_bytes, schedule_for_propagation
from .read_positions import ReadPositions
from .schedule import LAYER_MAJOR, Schedule, layer_major, schedule
from .weight_placement import CPU, DISK, WeightPlacement, build_meta_model, pack_weights, place_weights

if TYPE_CHECKING:
    from .measurer import Measurer

_HALF = ("bfloat16", "float16")
_WORTH_SAYING = 5e12  # floating-point operations: about a minute of two cores


@dataclass(frozen=True, slots=True)
class TextSize:
    """Say how much text is measured.

    Attributes:
        sequences: number of sequences.
        length: number of tokens of the longest one.
        tokens: number of tokens, without padding.
        positions: number of positions at which blocks must run. Where sequences begin alike, fewer than tokens.
        read: number of positions whose predictions must be read.
        noun: what a sequence is: "sequence", or "request" of a task.
    """

    sequences: int
    length: int
    tokens: int
    positions: int
    read: float
    noun: str = "sequence"


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
        sums: what propagation keeps of each sequence, in main memory; 0 without it.
        order: order of the schedule, "depth-first" or "layer-major".
        resident_blocks: layer by layer: number of blocks that are loaded at the same time; else None.
        bytes_loaded_per_batch: bytes of offloaded weights that one batch loads.
        sequences: number of sequences in a batch.
        batches: number of batches.
        block_calls: number of block calls in a batch.
        readouts: number of readouts in a batch.
        flops: floating-point operations of matrix products for the whole text (two for each multiplication and
            addition).
        block_calls_apart: number of block calls in a batch if no call was shared between edited models.
        seconds: the time of these products at the speed of large products on this machine, a lower bound; None if it
            was not measured.
        measured: how much text is measured.
        tasks: the cost of the tasks that are measured after the text; None if there are none.
        taken: the blocks of other checkpoints, which stay in memory.
        source: one such checkpoint, which is in main memory while its blocks are taken, as large as the model.
    """

    parameters: int
    device: str
    devices: str
    weights: dict[str, int]
    in_flight_bytes: int
    memory: MemoryUse
    text: int
    program: int
    sums: int
    order: str
    resident_blocks: int | None
    bytes_loaded_per_batch: int
    sequences: int
    batches: int
    block_calls: int
    readouts: int
    flops: float
    block_calls_apart: int
    measured: TextSize
    seconds: float | None = None
    tasks: Estimate | None = None
    taken: int = 0
    source: int = 0

    @property
    def peak(self) -> dict[str, int]:
        """Return the largest number of bytes in use at the same time on each device, without disks."""
        peak = {location: size for location, size in self.weights.items() if location != DISK}
        peak.setdefault(CPU, 0)
        loading = peak[CPU] + self.program + self.taken * (self.device == CPU) + self.source
        peak[self.device] = peak.get(self.device, 0) + self.taken
        peak[self.device] += self.in_flight_bytes + self.memory.working
        peak[CPU] = max(peak[CPU] + self.text + self.program + self.sums, loading if self.source else 0)
        return peak


def estimate(
    config: Any,
    variants: Sequence[Variant],
    *,
    tokens: int = 0,
    context: int = 0,
    size: TextSize | None = None,
    dtype: str = "float32",
    device: str = CPU,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    batch_size: int | None = None,
    order: str | None = None,
    blocks: str | None = None,
    read: ReadPositions | None = None,
    quantize: str | None = None,
    propagation: bool = False,
) -> Estimate:
    """Estimate the cost of measuring edited models on text.

    Args:
        config: a transformers config.
        variants: the edited models, without the unedited one.
        tokens: number of tokens of the text.
        context: number of tokens of one sequence.
        size: how much text is measured, where sequences have several lengths; `tokens`, `context` and `read` are not
            used then.
        dtype: dtype of the weights.
        device: the device to compute on if there is no device map.
        device_map: a map from modules to devices, or the name of a method that makes one ("auto").
        max_memory: memory that each device may use, if a device map is made.
        batch_size: number of sequences in a batch; by default chosen from the memory that is free on this machine now.
        order: order of the schedule, as for `sweep`.
        blocks: path of the list of blocks, if it cannot be found automatically.
        read: the positions at which predictions are read; None for all.
        quantize: format to which linear layers are quantized, "nf4" or "int8".
        propagation: measure how much what later blocks add changes, too.

    Returns:
        The estimated cost.

    Raises:
        SourceError: transformers cannot build the model.
        PlanError: the device map does not cover the model.
    """
    model = build_meta_model(config, dtype)
    block_list = find_decoder_blocks(model, blocks)
    stored, stored_blocks = model, block_list
    if quantize is not None:  # its weights have other sizes, and the same products
        stored = build_meta_model(config, dtype)
        pack_weights(stored, quantize)
        stored_blocks = find_decoder_blocks(stored, blocks)
    placement = place_weights(stored, stored_blocks, device, device_map, max_memory, dtype)
    size = size or _packed(tokens, context, read)
    routes = list(dict.fromkeys(variant.route for variant in variants))
    taken = {(visit.source, visit.block) for route in routes for visit in route if visit.source}
    plan = _make_schedule(routes, placement, order, propagation=propagation)
    needs = _memory_model(model, list(block_list.blocks), placement.compute_device)
    needs = replace(
        needs,
        weights=needs.weights - tensor_bytes(model) + tensor_bytes(stored),
        observed=propagation_bytes(plan, needs.width) if propagation else 0,
    )
    batch = min(size.sequences, batch_size or suggest_batch_size(needs, plan, size.length, placement.compute_device))
    readouts = len(routes) + 1
    readout_flops = 2.0 * needs.width * needs.vocabulary
    block_flops = _flops_per_token(config, list(block_list.blocks), needs.width, size.positions / size.sequences)
    return Estimate(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        device=placement.device,
        devices=placement.description,
        weights=placement.weights,
        in_flight_bytes=plan.bytes_in_flight(placement.offloaded) + placement.offloaded_outside,
        memory=needs.predict(plan, batch, size.length),
        text=2 * 8 * size.sequences * size.length,
        program=int(psutil.Process().memory_info().rss),
        sums=8 * size.sequences * count_columns(plan) if propagation else 0,
        order=plan.name,
        resident_blocks=plan.resident_blocks,
        bytes_loaded_per_batch=plan.bytes_read(placement.offloaded, placement.offloaded_outside),
        sequences=batch,
        batches=math.ceil(size.sequences / batch),
        block_calls=plan.calls,
        readouts=readouts,
        flops=size.positions * _whole_calls(plan, routes) * block_flops + size.read * readouts * readout_flops,
        block_calls_apart=plan.calls_without_sharing,
        measured=size,
        taken=sum(tensor_bytes(block_list.blocks[block]) for _, block in taken),
        source=tensor_bytes(model) if taken else 0,
    )


def shortest_time(measurer: Measurer, tokens: int, context: int) -> float | None:
    """Return the seconds that a measurement's matrix products take at the speed of large ones, a lower bound.

    Args:
        measurer: what is measured.
        tokens: number of tokens of the text.
        context: number of tokens of one sequence.

    Returns:
        None if the products are too few to be worth a measurement of the speed, which takes half a second, or if no
        bound is known: for tasks, whose requests share contexts, and for half precision on a CPU.
    """
    runner, config = measurer.runner, text_config(measurer.runner.model)
    weight = next((weight for weight in runner.model.parameters() if not weight.is_meta), None)
    device, dtype = (CPU, "float32") if weight is None else (str(weight.device), str(weight.dtype).partition(".")[2])
    read = measurer.read
    if not (read is None or isinstance(read, ReadPositions)) or (device == CPU and dtype in _HALF):
        return None
    of_block = _flops_per_token(config, runner.blocks, runner.width, context)
    readouts = (len(measurer.routes) + 1) * _share_read(read, context) if measurer.reads_logits else 0.0
    calls = _whole_calls(measurer.schedule, measurer.routes)
    flops: float = tokens * (calls * of_block + readouts * 2.0 * runner.width * config.vocab_size)
    if flops < _WORTH_SAYING:
        return None
    return flops / matmul_rate(device, dtype if dtype in _HALF else "float32")  # packed weights are computed in another


def _whole_calls(plan: Schedule, routes: Iterable[Route]) -> int:
    """Return the number of block calls without those of which a branch is skipped: a lower bound of the work."""
    return max(0, plan.calls - sum(bool(visit.skipped) for route in routes for visit in route))


def _share_read(read: ReadPositions | None, context: int) -> float:
    """Return the share of the positions that are read."""
    return 1.0 if read is None else read.number(context - 1) / (context - 1)


def _packed(tokens: int, context: int, read: ReadPositions | None) -> TextSize:
    """Return the size of a text that is cut into sequences of one length."""
    context = min(context, max(2, tokens))
    sequences = math.ceil(tokens / context)
    positions = sequences * context
    return TextSize(sequences, context, positions, positions, positions * _share_read(read, context))


def _make_schedule(
    routes: Sequence[Route], placement: WeightPlacement, order: str | None, *, propagation: bool
) -> Schedule:
    """Return the schedule; layer by layer if weights of blocks are offloaded and no order is given."""
    depth = len(placement.offloaded)
    if order is None and propagation and not any(placement.offloaded):
        return schedule_for_propagation(routes, depth)
    by_layer = any(placement.offloaded) if order is None else order == LAYER_MAJOR
    return layer_major(routes, depth) if by_layer else schedule(routes, depth)


def _memory_model(model: Any, blocks: Sequence[nn.Module], device: torch.device) -> MemoryModel:
    width = int(getattr(text_config(model), "hidden_size", 0) or model.get_input_embeddings().weight.shape[1])
    output = model.get_output_embeddings()
    vocabulary = int(text_config(model).vocab_size if output is None else output.weight.shape[0])
    return MemoryModel.from_model(
        model, blocks, width=width, vocabulary=vocabulary, tile_elements=tiled.tile_elements(device)
    )


def _flops_per_token(config: Any, blocks: Sequence[nn.Module], width: int, context: float) -> float:
    """Return the floating-point operations of one token in the average block.

    They are the products with the block's matrices (in a mixture of experts, only with the active experts), and
    attention to half of the context.
    """
    share = active_share(config.get_text_config(decoder=True))
    matrices = sum(
        parameter.numel() * (share if is_expert(name) else 1)
        for block in blocks
        for name, parameter in block.named_parameters()
        if parameter.dim() > 1
    )
    return 2.0 * matrices / len(blocks) + 2.0 * context * width
