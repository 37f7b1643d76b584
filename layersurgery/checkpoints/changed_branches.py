"""Find the tensors of a checkpoint that must change to skip or scale a branch of a block, or to turn units of it off.

The names come from the model that transformers would build. Which of its parameters write a branch into the residual
stream is found, and confirmed, by running a single block of it with random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..errors import UnsupportedEditError
from ..models.block_dependencies import blocks_read_by
from ..models.block_list import BlockList, find_block_list
from ..models.block_parts import BlockParts, find_block_parts
from ..models.block_probe import BlockProbe, record_block
from ..models.block_weights import BlockWeights
from ..models.config_fields import DecoderSection, Json, depth_field, find_section
from ..models.config_rewrite import rewrite
from ..models.means import Means, mean_specs, sample_of
from ..models.meta_model import load_hf_config, silence_transformers, write_derived_fields
from ..models.output_maps import OutputMap, OutputMaps
from ..models.weight_change import WeightChange
from ..plans.route import Route
from ..plans.visit import BRANCHES, Branch, Visit
from .checkpoint import Checkpoint
from .output_layout import ChangedTensors, Recode
from .safetensors_header import TensorInfo
from .tensor_names import TensorNames

# A probe model with more parameters runs in bfloat16; with more than the second limit, it does not run.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_FLOAT32_PARAMETERS = 500_000_000
_MAX_PARAMETERS = 4_000_000_000
_TINY_VOCABULARY = 256


def changed_tensors(
    checkpoint: Checkpoint,
    model: nn.Module,
    block_list: BlockList,
    tensor_names: TensorNames,
    route: Route,
    means: Means | None = None,
) -> ChangedTensors:
    """Find the tensors that change at each position of the route where a block is not run as it is.

    Args:
        checkpoint: the source.
        model: the model that the source is loaded as, on the meta device.
        block_list: its blocks.
        tensor_names: the tensors of each of their parameters.
        route: the source's blocks in their new order.
        means: the means of the source's branches, if the route adds any.

    Returns:
        Position in the route -> tensor name within the block -> how its bytes change; None for zeros.

    Raises:
        UnsupportedEditError: the tensors cannot be found, contain other weights too, or do not write the branch's
            output.
        PlanError: a block does not have a head or neuron of a number.
    """
    config, section = checkpoint.config, checkpoint.section
    infos = dict(checkpoint.tensors.tensors())
    weights_of_kind: dict[object, BlockWeights] = {}
    changed: dict[int, dict[str, Recode | None]] = {}
    for position, visit in enumerate(route):
        visit = visit.of_own_block
        if visit.whole:
            continue
        module = block_list.blocks[visit.block]
        kind = _class_and_shapes(module)
        if kind not in weights_of_kind:
            decoder_class = _find_decoder_class(model, block_list)
            weights_of_kind[kind] = _probe_weights(config, section, visit.block, module, decoder_class)
        weights, tensors = weights_of_kind[kind], changed.setdefault(position, {})
        for branch in visit.skipped:
            zeroed = _find_output_tensors(tensor_names, visit.block, module, branch, weights.parts)
            tensors.update(dict.fromkeys(zeroed))
        with torch.no_grad():
            changes = weights.changes(visit)
            of_branch = {branch: weights.parts.skips(branch) for branch in BRANCHES}
            specs = mean_specs(of_branch, visit, means, section.depth)
            if means is not None:
                _check_means(means, checkpoint, tensor_names, visit, module)
            changes += weights.mean_changes(visit.block, specs)
        for name, group in groupby(sorted(changes, key=lambda change: change.parameter), lambda c: c.parameter):
            of_parameter = tuple(group)
            for rest in _tensors_of(tensor_names, visit.block, name):
                info = infos[checkpoint.block_prefix.join(visit.block, rest)]
                if all(not change.factor and not change.offset and change.value is None for change in of_parameter):
                    tensors[rest] = None
                    continue
                _check_layout(info, rest, module.get_parameter(name), of_parameter)
                tensors[rest] = partial(_recode, info=info, changes=of_parameter)
    return changed


def _check_means(
    means: Means, checkpoint: Checkpoint, tensor_names: TensorNames, visit: Visit, module: nn.Module
) -> None:
    """Refuse means of another block than that of the files, by some weights of the branches that add their mean.

    Weights whose numbers the files hold in another form or order are not compared.

    Raises:
        PlanError: the means are of another block.
    """
    known = dict(module.named_parameters())
    for branch in visit.mean:
        mean = means.vectors.get((visit.block, branch))
        for parameter in () if mean is None else mean.samples:
            rests = tensor_names.names(visit.block, parameter) if parameter in known else ()
            if len(rests) != 1:
                continue
            name = checkpoint.block_prefix.join(visit.block, rests[0])
            info = dict(checkpoint.tensors.tensors())[name]
            if info.dtype in _DTYPES and info.shape == tuple(known[parameter].shape):
                (file,) = (file for file, header in checkpoint.tensors.shards.items() if name in header.tensors)
                with safe_open(checkpoint.tensors.directory / file, "pt") as tensors:
                    means.check_samples(visit.block, branch, {parameter: sample_of(tensors.get_tensor(name))})


def add_maps(
    changed: ChangedTensors,
    checkpoint: Checkpoint,
    block_list: BlockList,
    tensor_names: TensorNames,
    route: Route,
    maps: OutputMaps,
) -> ChangedTensors:
    """Add linear maps of what branches add to the tensors that change.

    Args:
        changed: the tensors that change for another reason, as `changed_tensors` returns them.
        checkpoint: the source.
        block_list: the blocks of the model that it is loaded as.
        tensor_names: the tensors of each of their parameters.
        route: the source's blocks in their new order.
        maps: the maps, by position in the route.

    Raises:
        UnsupportedEditError: the tensors of a parameter cannot be found, or hold no plain numbers.
    """
    infos = dict(checkpoint.tensors.tensors())
    both = {position: dict(tensors) for position, tensors in changed.items()}
    for position, output_maps in maps.items():
        block = route[position].block
        for output_map in output_maps:
            for rest in _tensors_of(tensor_names, block, output_map.parameter):
                info = infos[checkpoint.block_prefix.join(block, rest)]
                parameter = block_list.blocks[block].get_parameter(output_map.parameter)
                _check_layout(info, rest, parameter, [output_map])
                if rest in both.setdefault(position, {}):
                    raise UnsupportedEditError(f"the plan changes {rest} of block {block}, so no map is folded into it")
                both[position][rest] = partial(_recode, info=info, changes=[output_map])
    return both


def _tensors_of(tensor_names: TensorNames, block: int, parameter: str) -> tuple[str, ...]:
    """Return the tensors of a parameter.

    Raises:
        UnsupportedEditError: no tensor holds this parameter alone.
    """
    names = tensor_names.names(block, parameter)
    if not names:
        raise UnsupportedEditError(
            f"block {block}: no tensor of the checkpoint contains only {parameter}, which writes what a branch adds to "
            "the stream; branches of this architecture cannot be changed on disk"
        )
    return names


def _check_layout(
    info: TensorInfo, name: str, parameter: nn.Parameter, changes: Sequence[WeightChange | OutputMap]
) -> None:
    """Refuse a tensor that does not hold the parameter's numbers as they are."""
    if info.dtype not in _DTYPES:
        raise UnsupportedEditError(
            f"{name} has the data type {info.dtype}, of which no other numbers can be written; scale or turn off parts "
            f"of a checkpoint in {', '.join(_DTYPES)}"
        )
    is_expert = info.shape == tuple(parameter.shape)[1:] and len({*info.shape}) == len(info.shape) > 1
    if is_expert and all(isinstance(change, OutputMap) for change in changes):
        return
    if info.shape != tuple(parameter.shape) and not all(change.is_product for change in changes):
        raise UnsupportedEditError(
            f"{name} has the shape {info.shape}, and is loaded into a parameter of shape {tuple(parameter.shape)}, so "
            "the place of its heads, neurons or channels is not known"
        )


def _recode(data: bytearray, *, info: TensorInfo, changes: Sequence[WeightChange | OutputMap]) -> bytes:
    """Return the bytes of a tensor with its changes."""
    weight = torch.frombuffer(data, dtype=_DTYPES[info.dtype]).reshape(info.shape)
    for change in changes:
        weight = change.apply(weight)
    return weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _find_output_tensors(
    tensor_names: TensorNames, block: int, module: nn.Module, branch: Branch, parts: BlockParts
) -> list[str]:
    """Return the names, within the block, of the tensors that write a branch into the residual stream."""
    skips = parts.skips(branch)
    if not skips:
        raise UnsupportedEditError(
            f"block {block} ({type(module).__name__}) has no {branch} that can be skipped; drop the block instead"
        )
    if not all(skip.savable for skip in skips):
        raise UnsupportedEditError(
            f"block {block} ({type(module).__name__}): cannot determine which weights write its {branch} into the "
            "residual stream; skipping is not supported for this architecture"
        )
    output_tensors: list[str] = []
    for parameter in parts.outputs(branch):
        output_tensors += _tensors_of(tensor_names, block, parameter)
    return output_tensors


def _find_decoder_class(model: nn.Module, block_list: BlockList) -> Any:
    """Return the class of the innermost transformers model that contains the blocks; of a vision model, its decoder."""
    from transformers import PreTrainedModel

    path = block_list.path
    while path:
        path = path.rpartition(".")[0]
        if isinstance(owner := model.get_submodule(path), PreTrainedModel):
            return type(owner)
    return type(model)


def _probe_weights(
    config: Json, section: DecoderSection, block: int, module: nn.Module, decoder_class: Any
) -> BlockWeights:
    """Find the parts of a block, and its weights, by running a block of the same architecture with random weights."""
    name = f"block {block} ({type(module).__name__})"
    with torch.no_grad(), silence_transformers():
        model, position = _build_probe_model(config, section, block, module, decoder_class)
        blocks = find_block_list(model, getattr(model.config, depth_field(model.config)), type(module)).blocks
        call = record_block(model, blocks, position)
        parts = find_block_parts(blocks[position], call)
        if parts.skip_error:
            raise UnsupportedEditError(f"no branch of {name} can be skipped: {parts.skip_error}")
        return BlockWeights(BlockProbe(blocks[position], call, seed=1), parts, name)


def _class_and_shapes(module: nn.Module) -> tuple[object, ...]:
    """Return a module's class and its parameters' names and shapes; modules that agree in them have the same parts."""
    return (type(module), tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters()))


def _build_probe_model(
    config: Json, section: DecoderSection, block: int, module: nn.Module, decoder_class: Any
) -> tuple[Any, int]:
    """Build a model with only one block, random weights and a small vocabulary, but the source's classes and widths.

    Blocks that it reads keys or selected tokens of stay. If the config cannot describe these alone, all blocks before
    it stay, or all blocks.

    Returns:
        The model, and the position of the block in it.
    """
    from transformers import AutoModelForCausalLM

    fields = copy.deepcopy(section.get_fields(config))
    fields.setdefault("model_type", config.get("model_type"))
    fields |= {"vocab_size": _TINY_VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    decoder = find_section(fields, section.depth_fields[0])
    reason = "its config cannot describe this block alone"
    for route in (
        Route([*blocks_read_by(block, fields), block]),
        Route(range(block + 1)),
        Route.identity(section.depth),
    ):
        try:
            smaller = load_hf_config(write_derived_fields(fields, rewrite(fields, decoder, route), decoder, route))
        except UnsupportedEditError as error:
            reason = str(error)
            continue
        # The decoder of an image-text model may have no causal language model of its own.
        has_causal_model = type(smaller) in AutoModelForCausalLM._model_mapping
        build = AutoModelForCausalLM.from_config if has_causal_model else decoder_class._from_config
        try:
            with torch.device("meta"):
                meta_model = build(smaller)
        except Exception as error:  # a model's constructor may raise anything
            reason = f"transformers cannot build it: {str(error).partition(chr(10))[0][:200]}"
            continue
        position = route.blocks.index(block)
        built = find_block_list(meta_model, len(route), type(module)).blocks[position]
        if _class_and_shapes(built) != _class_and_shapes(module):
            continue
        size = sum(parameter.numel() for parameter in meta_model.parameters())
        if size > _MAX_PARAMETERS:
            reason = f"it would need {size / 1e9:.1f} billion parameters"
            continue
        model = build(smaller, dtype=torch.bfloat16 if size > _MAX_FLOAT32_PARAMETERS else torch.float32)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval(), position
    raise UnsupportedEditError(
        f"no branch of block {block} can be skipped, because the block cannot be run with random weights: {reason}"
    )
