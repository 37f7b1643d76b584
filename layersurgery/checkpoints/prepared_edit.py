"""Compute the config and the files of an edited checkpoint, and check them.

`plan_edit` does what needs no torch. So the bytes can be copied while `check_edit` imports torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
from ..models.unsupported import MEASURE_MEANS, refuse_architecture, refuse_route
from ..plans.plan import Plan
from ..plans.route import Route
from ..quick_imports import quick_imports
from ..units import format_list
from .block_sources import OtherCheckpoint, Sources, check_taken, read_others, taken_tensors
from .checkpoint import Checkpoint
from .other_files import plan_other_files
from .output_layout import ChangedTensors, Layout, Shard, TakenTensors, plan_output_files
from .packed_zeros import check_zeros_mean_zero, quantization_methods, refuse_packed_zeros
from .quantization import QUANTIZATION_KEYS, renumber_settings
from .tensor_index import ADAPTER_CONFIG, INDEX, MERGE_ADAPTER

if TYPE_CHECKING:
    from torch import nn

    from ..models.block_list import BlockList
    from ..models.means import Means
    from ..models.output_maps import OutputMaps
    from .tensor_names import TensorNames


@dataclass(frozen=True, slots=True)
class PlannedEdit:
    """Hold what the files alone decide of an edited checkpoint: the headers, config.json and the other files.

    Attributes:
        checkpoint: the source.
        plan: the edits.
        route: the source's blocks in the order in which the new model runs them.
        positions: the positions in the new model of each block that is kept.
        config: the new config.json, without the lists that its class may derive.
        layout: the safetensors files, as if no branch were changed.
        other_files: the other files by their path in the directory, with their new content as JSON, or None for a copy.
        verify: whether `check_edit` runs the reload check.
        notes: what users of the source or of the result should know.
        maps: linear maps of what branches add, by the position in the route.
        others: the other checkpoints of which blocks are taken.
        taken: the tensors of these blocks, by the position in the route.
        means: the means of the model's branches, for edits that add them.
    """

    checkpoint: Checkpoint
    plan: Plan
    route: Route
    positions: Mapping[int, list[int]]
    config: Json
    layout: Layout
    other_files: Mapping[Path, Any]
    verify: bool
    notes: tuple[str, ...] = ()
    maps: OutputMaps = field(default_factory=dict)
    others: tuple[OtherCheckpoint, ...] = ()
    taken: TakenTensors = field(default_factory=dict)
    means: Means | None = None

    @property
    def nbytes(self) -> int:
        """Return the size of the safetensors files to write or link, in bytes."""
        return self.layout.nbytes

    @property
    def settled_shards(self) -> list[Shard]:
        """Return the safetensors files that `check_edit` cannot change: those without a block with a changed branch."""
        changed = {position for position, visit in enumerate(self.route) if not visit.whole} | {*self.maps}
        prefix = self.checkpoint.block_prefix
        return [
            shard
            for shard in self.layout.shards
            if not any((split := prefix.split(name)) and split[0] in changed for name in shard.tensors)
        ]


@dataclass(frozen=True, slots=True)
class PreparedEdit:
    """Hold an edited checkpoint that has been checked, and that may be written.

    Attributes:
        config: the new config.json.
        layout: the new safetensors files.
        notes: what users of the source or of the result should know.
    """

    config: Json
    layout: Layout
    notes: tuple[str, ...] = ()


def plan_edit(
    checkpoint: Checkpoint,
    plan: Plan,
    *,
    verify: bool = True,
    maps: OutputMaps | None = None,
    sources: Sources | None = None,
    means: Means | None = None,
) -> PlannedEdit:
    """Compute what the files alone decide of an edited checkpoint, and refuse what they alone forbid.

    This is quick, and needs neither torch nor transformers. Nothing is written.

    Args:
        checkpoint: the source.
        plan: the edits.
        verify: run the reload check in `check_edit`.
        maps: linear maps of what branches add, by the position in the route.
        sources: the names of models that the plan takes blocks of, by the name of the source.
        means: the means of the model's branches, for edits that add them.

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
    if means is None and (adding := next((visit for visit in route if visit.mean), None)):
        raise PlanError(f"{adding} adds a mean that is not known; {MEASURE_MEANS}")
    if checkpoint.tensors.absent and not verify:
        raise SourceError(
            f"{_describe_absent(checkpoint)}, and no file has it; fetch the checkpoint again, or run the reload check "
            "(`verify`), which shows whether the model needs it"
        )
    positions = new_positions(route, checkpoint.section)
    config = _edit_config(checkpoint, route, positions, verify=verify)
    refuse_packed_zeros(checkpoint, route)
    others = read_others(route, sources)
    taken = taken_tensors(checkpoint, route, others)
    layout = plan_output_files(checkpoint.tensors, checkpoint.block_prefix, positions, {}, taken)
    files, left_out = plan_other_files(checkpoint, route, positions)
    notes = (
        (f"left out, because they describe layers of the source in an unknown format: {', '.join(left_out)}",)
        if left_out
        else ()
    )
    return PlannedEdit(
        checkpoint, plan, route, positions, config, layout, files, verify, notes, maps or {}, others, taken, means
    )


def check_edit(planned: PlannedEdit) -> PreparedEdit:
    """Compute the rest of an edited checkpoint, and check that it would reload as intended.

    Nothing is written. Imports transformers for the reload check, for a changed branch, and for a config whose class
    derives lists of layers.

    Raises:
        SourceError: the model needs a tensor that no file has.
        UnsupportedEditError: no checkpoint of this architecture can represent the edited model.
    """
    checkpoint, route = planned.checkpoint, planned.route
    notes = _check_absent(checkpoint)
    config = _derive_config(planned)
    blocks = _check_reload(checkpoint, config, route) if planned.verify else None
    if planned.others:
        from ..models.meta_model import build_meta_model

        blocks = blocks or _match_blocks(checkpoint, build_meta_model(checkpoint.config))
        check_taken(blocks[0], planned.others, blocks[1].path)
    layout = planned.layout
    if changed := _find_changed_tensors(checkpoint, route, blocks, planned.maps, planned.means):
        layout = plan_output_files(
            checkpoint.tensors, checkpoint.block_prefix, planned.positions, changed, planned.taken
        )
    model_type = {"model_type": checkpoint.config.get("model_type"), **checkpoint.fields}["model_type"]
    readers = describe_position_readers(str(model_type), checkpoint.section.get_fields(config), len(route))
    return PreparedEdit(config, layout, notes + ((readers,) if readers else ()) + planned.notes)


def _describe_absent(checkpoint: Checkpoint) -> str:
    return f"{INDEX} of {checkpoint.source.label} names {format_list(checkpoint.tensors.absent)}"


def _check_absent(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Refuse tensors that only the index has, if the model needs them; return a note of the others."""
    absent = checkpoint.tensors.absent
    if not absent:
        return ()
    from ..models.meta_model import build_meta_model
    from .tensor_names import find_needed

    if needed := find_needed(build_meta_model(checkpoint.config), absent):
        raise SourceError(
            f"{INDEX} of {checkpoint.source.label} names {format_list(needed)}, and no file has it; fetch the "
            "checkpoint again"
        )
    return (
        f"{_describe_absent(checkpoint)}, which no file has and the model does not need; left out of the new index",
    )


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

    if any(QUANTIZATION_KEYS & fields.keys() for fields in (checkpoint.config, checkpoint.fields)):
        return  # packed weights have names that only the format's own loader knows
    if missing := find_missing(model, blocks, tensors):
        raise SourceError(
            f"no tensor of {checkpoint.source.label} is loaded into {format_list(missing)}, so a reload would make it "
            f"random. The checkpoint is incomplete, or its tensors have names that {type(model).__name__} does not load"
        )


def _edit_config(checkpoint: Checkpoint, route: Route, positions: Mapping[int, list[int]], *, verify: bool) -> Json:
    """Rewrite config.json as far as its own fields tell how."""
    section = checkpoint.section
    config = checkpoint.config
    if breaks_prefix(
        checkpoint.fields, route
    ):  # rare: the list comes from the config class, so transformers is imported
        from ..models.meta_model import is_known_model_type, write_prefix_list

        if is_known_model_type(config):
            config = write_prefix_list(config, section)
    config = rewrite(config, section, route)
    positional = non_default_fields(checkpoint.fields, POSITIONAL_ONLY)
    if positional and not verify and route.blocks != tuple(range(section.depth)):
        raise UnsupportedEditError(
            f"config.json: {', '.join(positional)} can make layers differ by position, so only the reload check can "
            "show whether the result would be right; run it (`verify`)"
        )
    for fields in (config, section.get_fields(config)) if section.path else (config,):
        for key in QUANTIZATION_KEYS & fields.keys():
            fields[key] = renumber_settings(fields[key], checkpoint, positions)
    return config


def _derive_config(planned: PlannedEdit) -> Json:
    """Return the new config.json with the lists that its class would derive wrongly from positions."""
    checkpoint, route = planned.checkpoint, planned.route
    identical_layer_types = checkpoint.config.get("model_type") in IDENTICAL_LAYER_TYPES and not non_default_fields(
        checkpoint.fields, POSITIONAL_WITH_LIST
    )
    if identical_layer_types and not planned.verify:
        return planned.config
    from ..models.meta_model import is_known_model_type, write_derived_fields

    if planned.verify or is_known_model_type(checkpoint.config):
        return write_derived_fields(checkpoint.config, planned.config, checkpoint.section, route)
    if broken := broken_periods(checkpoint.fields, checkpoint.section.depth, route):
        raise UnsupportedEditError(
            f"config.json: {', '.join(broken)} places the layers of one kind, {route} breaks its period, and "
            f"transformers does not know the model type {checkpoint.config.get('model_type')!r}; rearrange layers "
            "only by whole periods"
        )
    return planned.config


def _find_changed_tensors(
    checkpoint: Checkpoint,
    route: Route,
    blocks: tuple[nn.Module, BlockList, TensorNames] | None,
    maps: OutputMaps,
    means: Means | None,
) -> ChangedTensors:
    """Return the tensors whose bytes change, at each position where a branch is changed.

    Args:
        checkpoint: the source.
        route: the source's blocks in their new order.
        blocks: what `_match_blocks` returns, if it has been called already.
        maps: linear maps of what branches add, by the position in the route.
        means: the means of the model's branches, for edits that add them.
    """
    if all(visit.of_own_block.whole for visit in route) and not maps:
        return {}
    from ..models.meta_model import build_meta_model
    from .changed_branches import add_maps, changed_tensors

    blocks = blocks or _match_blocks(checkpoint, build_meta_model(checkpoint.config))
    changed = changed_tensors(checkpoint, *blocks, route, means)
    packed = bool(quantization_methods(checkpoint))
    for position, tensors in changed.items():
        check_zeros_mean_zero(checkpoint, route[position].block, tensors.keys(), blocks[1:], packed=packed)
    return add_maps(changed, checkpoint, *blocks[1:], route, maps)
