"""Compute the config and the files of an edited checkpoint, and check them, before anything is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlanError, SourceError, UnsupportedEditError
from ..models.config_fields import (
    IDENTICAL_LAYER_TYPES,
    POSITIONAL_ONLY,
    POSITIONAL_WITH_LIST,
    Json,
    new_positions,
    non_default_fields,
)
from ..models.config_periods import broken_periods, describe_position_readers
from ..models.config_rewrite import breaks_prefix, rewrite
from ..models.unsupported import refuse_architecture, refuse_route
from ..plans.plan import Plan
from ..plans.route import Route
from ..quick_imports import quick_imports
from ..units import format_list
from .checkpoint import Checkpoint
from .other_files import plan_other_files
from .output_layout import Layout, plan_output_files
from .quantization import renumber_settings
from .tensor_index import ADAPTER_CONFIG, INDEX, MERGE_ADAPTER

if TYPE_CHECKING:
    from torch import nn

    from ..models.block_list import BlockList
    from .tensor_names import TensorNames

_QUANTIZATION_KEYS = frozenset(("quantization_config", "compression_config", "quantization"))  # the last is MLX's
# Quantized formats in which zero bytes mean zero weights.
_ZERO_BYTES_ARE_ZERO = frozenset(("fp8", "fbgemm_fp8", "mxfp4"))
# Names of tensors, next to a weight, from which a quantized format computes the weight's values.
_OFFSET = re.compile(r"biases$|zero|offset|shift")
_SCALE_OR_OFFSET = re.compile(rf"scale|absmax|quant|codebook|{_OFFSET.pattern}")


@dataclass(frozen=True, slots=True)
class PreparedEdit:
    """An edited checkpoint that has been checked but not written.

    Attributes:
        checkpoint: the source.
        plan: the edits.
        route: the source's blocks in the order in which the new model runs them.
        positions: the positions in the new model of each block that is kept.
        config: the new config.json.
        layout: the new safetensors files.
        other_files: the other files by their path in the directory, with their new content as JSON, or None for a copy.
        verified: whether the reload check was run.
        notes: what users of the source or of the result should know.
    """

    checkpoint: Checkpoint
    plan: Plan
    route: Route
    positions: Mapping[int, list[int]]
    config: Json
    layout: Layout
    other_files: Mapping[Path, Any]
    verified: bool
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Return the size of the safetensors files to write or link, in bytes."""
        return self.layout.nbytes


def prepare_edit(checkpoint: Checkpoint, plan: Plan, *, verify: bool = True) -> PreparedEdit:
    """Compute the config and the file layout of an edited checkpoint, and check that it would reload as intended.

    Nothing is written.

    Args:
        checkpoint: the source.
        plan: the edits.
        verify: run the reload check.

    Raises:
        PlanError: the plan does not fit the model, or changes nothing.
        SourceError: a tensor is missing from the files.
        UnsupportedEditError: no checkpoint of this architecture can represent the edited model.
    """
    route = plan.route(checkpoint.depth)
    if route.is_identity(checkpoint.depth):
        raise PlanError(f"'{plan}' leaves the model unchanged, so there is nothing to write")
    fields = {"model_type": checkpoint.config.get("model_type"), **checkpoint.fields}
    refuse_architecture(fields)
    if (checkpoint.source.directory / ADAPTER_CONFIG).exists():
        raise UnsupportedEditError(
            f"{checkpoint.source.label} has a PEFT adapter ({ADAPTER_CONFIG}) next to its weights; transformers loads "
            f"both, and the adapter names layers of the unedited model. {MERGE_ADAPTER}, or edit a copy of the "
            f"directory without {ADAPTER_CONFIG}"
        )
    refuse_route(fields, route)
    notes = _check_absent(checkpoint, verify=verify)
    positions = new_positions(route, checkpoint.section)
    config = _edit_config(checkpoint, route, positions, verify=verify)
    blocks = _check_reload(checkpoint, config, route) if verify else None
    layout = plan_output_files(
        checkpoint.tensors, checkpoint.block_prefix, positions, _tensors_to_zero(checkpoint, route, blocks)
    )
    readers = describe_position_readers(str(fields["model_type"]), checkpoint.section.get_fields(config), len(route))
    notes += (readers,) if readers else ()
    files, left_out = plan_other_files(checkpoint, route, positions)
    if left_out:
        notes += (f"left out, because they describe layers of the source in an unknown format: {', '.join(left_out)}",)
    return PreparedEdit(checkpoint, plan, route, positions, config, layout, files, verify, notes)


def _check_absent(checkpoint: Checkpoint, *, verify: bool) -> tuple[str, ...]:
    """Refuse tensors that only the index has, if the model needs them; return a note of the others."""
    absent = checkpoint.tensors.absent
    if not absent:
        return ()
    where = f"{INDEX} of {checkpoint.source.label} names"
    if not verify:
        raise SourceError(
            f"{where} {format_list(absent)}, and no file has it; fetch the checkpoint again, or run the reload check "
            "(verify), which shows whether the model needs it"
        )
    from ..models.meta_model import build_meta_model
    from .tensor_names import find_needed

    if needed := find_needed(build_meta_model(checkpoint.config), absent):
        raise SourceError(f"{where} {format_list(needed)}, and no file has it; fetch the checkpoint again")
    return (f"{where} {format_list(absent)}, which no file has and the model does not need; left out of the new index",)


def _match_blocks(checkpoint: Checkpoint, model: nn.Module) -> tuple[nn.Module, BlockList, TensorNames]:
    """Return the model that a checkpoint is loaded as, its blocks, and the tensors of each of their parameters."""
    from .tensor_names import find_loaded_list, match_names

    names = list(checkpoint.tensors.names())
    block_list = find_loaded_list(model, checkpoint.block_prefix, names)
    return model, block_list, match_names(model, block_list.path, checkpoint.block_prefix, names)


def _check_reload(checkpoint: Checkpoint, config: Json, route: Route) -> tuple[nn.Module, BlockList, TensorNames]:
    """Check, without weights, that the new checkpoint would be loaded as the source's blocks along the route.

    Returns:
        The model that the source is loaded as, its blocks, and the tensors of each of their parameters.
    """
    with quick_imports():
        from ..models.meta_model import build_meta_model
        from ..models.reload_check import ReloadCheck

    source = build_meta_model(checkpoint.config)
    blocks = _match_blocks(checkpoint, source)
    splits = map(checkpoint.block_prefix.split, checkpoint.tensors.names())
    file_tensors = {split[1] for split in splits if split is not None}
    _check_complete(checkpoint, *blocks)
    edited = build_meta_model(config)
    ReloadCheck(source, edited, checkpoint.section, route, frozenset(file_tensors), blocks=blocks[1].path).check()
    return blocks


def _check_complete(checkpoint: Checkpoint, model: nn.Module, blocks: BlockList, tensors: TensorNames) -> None:
    """Refuse blocks whose parameters have other names in the files, or none: a reload would make them random."""
    from .tensor_names import find_missing

    if any(_QUANTIZATION_KEYS & fields.keys() for fields in (checkpoint.config, checkpoint.fields)):
        return  # packed weights have names that only the format's own loader knows
    if missing := find_missing(model, blocks, tensors):
        raise SourceError(
            f"no tensor of {checkpoint.source.label} is loaded into {format_list(missing)}, so a reload would make it "
            f"random. The checkpoint is incomplete, or its tensors have names that {type(model).__name__} does not load"
        )


def _edit_config(checkpoint: Checkpoint, route: Route, positions: Mapping[int, list[int]], *, verify: bool) -> Json:
    section = checkpoint.section
    config = checkpoint.config
    if breaks_prefix(checkpoint.fields, route):
        from ..models.meta_model import is_known_model_type, write_prefix_list

        if is_known_model_type(config):
            config = write_prefix_list(config, section)
    config = rewrite(config, section, route)
    identical_layer_types = checkpoint.config.get("model_type") in IDENTICAL_LAYER_TYPES and not non_default_fields(
        checkpoint.fields, POSITIONAL_WITH_LIST
    )
    if verify or not identical_layer_types:
        from ..models.meta_model import is_known_model_type, write_derived_fields

        if verify or is_known_model_type(checkpoint.config):
            config = write_derived_fields(checkpoint.config, config, section, route)
        elif broken := broken_periods(checkpoint.fields, section.depth, route):
            raise UnsupportedEditError(
                f"config.json: {', '.join(broken)} places the layers of one kind, {route} breaks its period, and "
                f"transformers does not know the model type {checkpoint.config.get('model_type')!r}; rearrange layers "
                "only by whole periods"
            )
    positional = non_default_fields(checkpoint.fields, POSITIONAL_ONLY)
    if positional and not verify and route.blocks != tuple(range(section.depth)):
        raise UnsupportedEditError(
            f"config.json: {', '.join(positional)} can make layers differ by position, so only the reload check can "
            "show whether the result would be right; run it (verify)"
        )
    for fields in (config, section.get_fields(config)) if section.path else (config,):
        for key in _QUANTIZATION_KEYS & fields.keys():
            fields[key] = renumber_settings(fields[key], checkpoint, positions)
    return config


def _tensors_to_zero(
    checkpoint: Checkpoint, route: Route, blocks: tuple[nn.Module, BlockList, TensorNames] | None
) -> Mapping[int, frozenset[str]]:
    """Return the names, within the block, of the tensors to zero at each position where a branch is skipped.

    Args:
        checkpoint: the source.
        route: the source's blocks in their new order.
        blocks: what `_match_blocks` returns, if it has been called already.
    """
    if all(visit.whole for visit in route):
        return {}
    settings = {
        key: fields[key]
        for fields in (checkpoint.config, checkpoint.fields)
        for key in sorted(_QUANTIZATION_KEYS & fields.keys())
        if fields[key]
    }
    methods = {
        (value.get("quant_method") if isinstance(value, dict) else None) or f"{key} in config.json"
        for key, value in settings.items()
    }
    if other := sorted(map(str, methods - _ZERO_BYTES_ARE_ZERO)):
        raise _not_zero(f"the checkpoint is quantized ({', '.join(other)})")
    from ..models.meta_model import build_meta_model
    from .zeroed_branches import tensors_to_zero

    blocks = blocks or _match_blocks(checkpoint, build_meta_model(checkpoint.config))
    zeroed = tensors_to_zero(checkpoint.config, checkpoint.section, *blocks, route)
    for position, rests in zeroed.items():
        _check_zeros_mean_zero(checkpoint, route[position].block, rests, blocks[1:], packed=bool(methods))
    return zeroed


def _check_zeros_mean_zero(
    checkpoint: Checkpoint, block: int, zeroed: Set[str], blocks: tuple[BlockList, TensorNames], *, packed: bool
) -> None:
    """Refuse tensors of a block whose zeros other tensors of their module would turn into other weights.

    Args:
        checkpoint: the source.
        block: the block.
        zeroed: the names, within the block, of the tensors to zero.
        blocks: the blocks of the model, and the tensors of each of their parameters.
        packed: whether the format is one in which integers and scales are known to be harmless.

    Raises:
        UnsupportedEditError: a tensor holds integers, or has scales or offsets; gives its name.
    """
    block_list, tensor_names = blocks
    parameters = block_list.blocks[block].state_dict().keys()
    own = {rest for name, rests in tensor_names.tensors[block].items() if name in parameters for rest in rests}
    modules = {rest.rpartition(".")[0] for rest in zeroed}
    infos = {
        split[1]: info
        for name, info in checkpoint.tensors.tensors()
        if (split := checkpoint.block_prefix.split(name)) and split[0] == block
    }
    for rest in sorted(zeroed):
        if infos[rest].dtype.startswith(("I", "U")) and not packed:
            raise _not_zero(f"{checkpoint.block_prefix.join(block, rest)} holds integers ({infos[rest].dtype})")
    for rest in sorted(infos.keys() - own):  # the model's own parameters have been probed
        module, _, last = rest.rpartition(".")
        if module in modules and (_OFFSET if packed else _SCALE_OR_OFFSET).search(last):
            raise _not_zero(f"{checkpoint.block_prefix.join(block, rest)} scales or shifts a weight to zero")


def _not_zero(why: str) -> UnsupportedEditError:
    return UnsupportedEditError(
        f"{why}, and zero bytes do not mean zero weights in this format, so a branch of it cannot be zeroed; skip the "
        "branch in the unquantized checkpoint"
    )
