"""Edit the files of a checkpoint: rename tensors in the headers and copy their bytes, without loading the weights.

>>> import layersurgery as ls
>>> result = ls.edit_checkpoint("smollm2-135m", ls.swap(12), "swapped")
>>> ls.load("swapped").model.config.num_hidden_layers
30
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic_io import atomic_directory, check_output
from ..errors import PlanError, SourceError, UnsupportedEditError
from ..models.config_fields import (
    IDENTICAL_LAYER_TYPES,
    POSITIONAL_ONLY,
    POSITIONAL_WITH_LIST,
    DecoderSection,
    Json,
    find_section,
    new_positions,
    non_default_fields,
    rewrite,
)
from ..models.unsupported import refuse_architecture, refuse_route
from ..plans.plan import Plan
from ..plans.route import Route
from .model_card import model_card
from .output_layout import Layout, plan_output_files
from .quantization import rename_layers
from .shard_writer import Progress, link_shard, write_shards
from .sources import COPIED_FILES, Source, find_source
from .tensor_index import INDEX, SINGLE, BlockPrefix, TensorIndex, find_block_prefix, read_json, read_tensor_index

# Files other than config.json that name layers in their quantization settings.
_QUANTIZATION_FILES = ("quantize_config.json", "hf_quant_config.json")
_QUANTIZATION_KEYS = frozenset(("quantization_config", "compression_config"))
# Quantized formats in which zero bytes mean zero weights.
_ZERO_BYTES_ARE_ZERO = frozenset(("fp8", "fbgemm_fp8", "mxfp4"))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as its files describe it.

    Attributes:
        source: the directory of its files and its provenance.
        config: its config.json.
        section: the section of the config that describes the decoder.
        tensors: its tensors.
        block_prefix: the prefix of the decoder blocks in the tensor names.
    """

    source: Source
    config: Json
    section: DecoderSection
    tensors: TensorIndex
    block_prefix: BlockPrefix

    @property
    def depth(self) -> int:
        """Return the number of decoder blocks."""
        return self.section.depth

    @property
    def fields(self) -> Json:
        """Return the section of the config that describes the decoder."""
        return self.section.get_fields(self.config)


def read_checkpoint(source: Source, *, blocks: str | None = None, tensors: TensorIndex | None = None) -> Checkpoint:
    """Read the config and the headers of a checkpoint.

    Args:
        source: the checkpoint.
        blocks: prefix of the decoder blocks' tensors, if it cannot be found automatically ("model.layers").
        tensors: the tensors of the checkpoint, if they have already been read.

    Raises:
        SourceError: files are damaged or missing, or config and tensors belong to different models.
        UnsupportedEditError: several lists of layers could be the decoder.
    """
    config = read_json(source.directory / "config.json")
    section = _find_decoder_section(config)
    tensors = read_tensor_index(source.directory) if tensors is None else tensors
    prefix = find_block_prefix(tensors.names(), section.depth, section.extra_blocks, blocks)
    return Checkpoint(source, config, section, tensors, prefix)


def _find_decoder_section(config: Json) -> DecoderSection:
    # The config class of transformers is asked only if the fields do not suffice, because importing it is slow.
    try:
        return find_section(config)
    except SourceError:
        from ..models.meta_model import resolve_section

        return resolve_section(config)


@dataclass(frozen=True, slots=True)
class PreparedEdit:
    """An edited checkpoint that has been checked but not written.

    Attributes:
        checkpoint: the source.
        plan: the edits.
        route: the source's blocks in the order in which the new model runs them.
        config: the new config.json.
        layout: the new safetensors files.
        verified: whether the reload check was run.
    """

    checkpoint: Checkpoint
    plan: Plan
    route: Route
    config: Json
    layout: Layout
    verified: bool

    @property
    def nbytes(self) -> int:
        """Return the size of the safetensors files to write or link, in bytes."""
        return self.layout.nbytes


@dataclass(frozen=True, slots=True)
class EditResult:
    """An edited checkpoint that was written.

    Attributes:
        path: directory of the new checkpoint.
        plan: the edits.
        route: the source's blocks in the order in which the new model runs them.
        depth: number of blocks of the source.
        bytes_written: size of the safetensors files that were copied (or shared by the file system).
        bytes_linked: size of the safetensors files that were hard-linked.
        seconds: time from the first byte to the finished directory.
        verified: whether the reload check was run.
    """

    path: Path
    plan: Plan
    route: Route
    depth: int
    bytes_written: int
    bytes_linked: int
    seconds: float
    verified: bool


def prepare_edit(checkpoint: Checkpoint, plan: Plan, *, verify: bool = True) -> PreparedEdit:
    """Compute the config and the file layout of an edited checkpoint, and check that it would reload as intended.

    Nothing is written.

    Args:
        checkpoint: the source.
        plan: the edits.
        verify: run the reload check.

    Raises:
        PlanError: the plan does not fit the model, or changes nothing.
        UnsupportedEditError: no checkpoint of this architecture can represent the edited model.
    """
    section = checkpoint.section
    route = plan.route(section.depth)
    if route.is_identity(section.depth):
        raise PlanError(f"'{plan}' leaves the model unchanged, so there is nothing to write")
    fields = {"model_type": checkpoint.config.get("model_type"), **checkpoint.fields}
    refuse_architecture(fields)
    refuse_route(fields, route)
    config = _edit_config(checkpoint, route, verify=verify)
    if verify:
        _check_reload(checkpoint, config, route)
    to_zero = _tensors_to_zero(checkpoint, route)
    layout = plan_output_files(
        checkpoint.tensors,
        checkpoint.block_prefix,
        new_positions(route, section),
        lambda position, rest: rest in to_zero.get(position, ()),
    )
    return PreparedEdit(checkpoint, plan, route, config, layout, verify)


def _check_reload(checkpoint: Checkpoint, config: Json, route: Route) -> None:
    """Check, without weights, that the new checkpoint would be loaded as the source's blocks along the route."""
    from ..models.block_list import find_block_list
    from ..models.reload_check import ReloadCheck
    from .tensor_names import match_names

    splits = map(checkpoint.block_prefix.split, checkpoint.tensors.names())
    file_tensors = {split[1] for split in splits if split is not None}
    reload_check = ReloadCheck.build(checkpoint.config, config, checkpoint.section, route, file_tensors)
    reload_check.check()
    path = find_block_list(reload_check.source, checkpoint.depth).path
    match_names(reload_check.source, path, checkpoint.block_prefix, checkpoint.tensors.names())


def _edit_config(checkpoint: Checkpoint, route: Route, *, verify: bool) -> Json:
    section = checkpoint.section
    config = rewrite(checkpoint.config, section, route)
    identical_layer_types = checkpoint.config.get("model_type") in IDENTICAL_LAYER_TYPES and not non_default_fields(
        checkpoint.fields, POSITIONAL_WITH_LIST
    )
    if verify or not identical_layer_types:
        from ..models.meta_model import is_known_model_type, write_derived_fields

        if verify or is_known_model_type(checkpoint.config):
            config = write_derived_fields(checkpoint.config, config, section, route)
    positional = non_default_fields(checkpoint.fields, POSITIONAL_ONLY)
    if positional and not verify and route.blocks != tuple(range(section.depth)):
        raise UnsupportedEditError(
            f"config.json: {', '.join(positional)} can make layers differ by position, so only the reload check can "
            "show whether the result would be right; run without --no-verify"
        )
    for fields in (config, section.get_fields(config)) if section.path else (config,):
        for key in _QUANTIZATION_KEYS & fields.keys():
            fields[key] = _renumber_layers(fields[key], checkpoint, route)
    return config


def _renumber_layers(value: Any, checkpoint: Checkpoint, route: Route) -> Any:
    """Renumber the layers that quantization settings name."""
    positions = new_positions(route, checkpoint.section)
    list_name = checkpoint.block_prefix.prefix.rpartition(".")[2]
    return rename_layers(value, lambda block: positions.get(block, []), list_name)


def _tensors_to_zero(checkpoint: Checkpoint, route: Route) -> Mapping[int, frozenset[str]]:
    """Return the names, within the block, of the tensors to zero at each position where a branch is skipped."""
    if all(visit.whole for visit in route):
        return {}
    settings = [
        fields[key]
        for fields in (checkpoint.config, checkpoint.fields)
        for key in _QUANTIZATION_KEYS & fields.keys()
        if fields[key]
    ]
    method = settings[0].get("quant_method") if settings and isinstance(settings[0], dict) else None
    if settings and method not in _ZERO_BYTES_ARE_ZERO:
        raise UnsupportedEditError(
            f"the checkpoint is quantized ({method}), and zero bytes do not mean zero weights in this format, so a "
            "branch of it cannot be zeroed; skip the branch in the unquantized checkpoint"
        )
    from .zeroed_branches import tensors_to_zero

    return tensors_to_zero(
        checkpoint.config, checkpoint.section, checkpoint.block_prefix, checkpoint.tensors.names(), route
    )


def edit_checkpoint(
    model: str | os.PathLike[str],
    plan: Plan | str,
    out: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    link: bool = False,
    verify: bool = True,
    blocks: str | None = None,
    progress: Progress | None = None,
) -> EditResult:
    """Write the edited checkpoint of a model, as plain safetensors that any Hugging Face pipeline loads.

    After an error, the output is unchanged: no partial files remain, and an existing checkpoint at `out` is kept.

    Args:
        model: Hub ID, local directory, `.gguf` file, or "smollm2-135m".
        plan: the edits, or their text.
        out: the new directory; by default `<name>-<plan>` in the current directory.
        revision: branch, tag or commit on the Hub.
        overwrite: replace an existing checkpoint at `out`, once the new one is complete.
        link: hard-link files that do not change. They are then the same files as the source's: a change to one changes
            both.
        verify: run the reload check first. It needs torch and transformers; without it, a swap needs neither.
        blocks: prefix of the decoder blocks' tensors, if it cannot be found automatically.
        progress: called repeatedly with the number of bytes written since the last call, by one thread at a time.

    Returns:
        The directory, and how it was made.

    Raises:
        PlanError: the plan does not fit the model, or changes nothing.
        SourceError: the source cannot be found or read.
        UnsupportedEditError: no checkpoint of this architecture can represent the edited model.
        OutputError: `out` exists or cannot be written.

    Example:
        >>> import layersurgery as ls
        >>> result = ls.edit_checkpoint("smollm2-135m", "drop 20; drop 24", "dropped")
        >>> print(result.path, result.route)
        dropped 0:20 21:24 25:30
    """
    if isinstance(plan, str):
        plan = Plan.parse(plan)
    source = find_source(model, revision=revision)
    target = Path(out) if out is not None else default_output(source, plan)
    check_output(target, source.directory, overwrite=overwrite)
    prepared = prepare_edit(read_checkpoint(source, blocks=blocks), plan, verify=verify)
    return write_edit(prepared, target, overwrite=overwrite, link=link, progress=progress)


def default_output(source: Source, plan: Plan) -> Path:
    """Return the default output directory, `./<name>-<plan slug>`."""
    return Path(f"{source.name}-{plan.slug}")


def write_edit(
    prepared: PreparedEdit, out: Path, *, overwrite: bool = False, link: bool = False, progress: Progress | None = None
) -> EditResult:
    """Write a prepared edit to `out`, completely or not at all.

    Args:
        prepared: the edit.
        out: the new directory.
        overwrite: replace an existing checkpoint at `out`, once the new one is complete.
        link: hard-link files that do not change.
        progress: called with the number of bytes written since the last call.

    Raises:
        SourceError: a source file cannot be read, or was changed after its header was read.
        OutputError: `out` exists or cannot be written; no partial output remains.
    """
    started = time.perf_counter()
    report = progress or _no_progress
    linked = [shard for shard in prepared.layout.shards if link and shard.unchanged]
    written = [shard for shard in prepared.layout.shards if shard not in linked]
    needed = sum(shard.nbytes for shard in written)
    with atomic_directory(out, bytes_needed=needed, overwrite=overwrite) as directory:
        for shard in linked:
            if link_shard(shard, directory):
                report(shard.nbytes)
            else:
                written.append(shard)
        linked = [shard for shard in linked if shard not in written]
        write_shards(written, directory, report)
        _write_text(directory / "config.json", _format_json(prepared.config))
        if prepared.layout.index is not None:
            _write_text(directory / INDEX, prepared.layout.index)
        _copy_other_files(prepared, directory)
        checkpoint = prepared.checkpoint
        card = model_card(
            checkpoint.source, prepared.plan, prepared.route, checkpoint.depth, verified=prepared.verified
        )
        _write_text(directory / "README.md", card)
    return EditResult(
        path=out,
        plan=prepared.plan,
        route=prepared.route,
        depth=prepared.checkpoint.depth,
        bytes_written=sum(shard.nbytes for shard in written),
        bytes_linked=sum(shard.nbytes for shard in linked),
        seconds=time.perf_counter() - started,
        verified=prepared.verified,
    )


def _no_progress(count: int) -> None:
    pass


def _format_json(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can escape it, but UTF-8 cannot encode it
        text = json.dumps(value, indent=2)
    return text + "\n"


def _write_text(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _copy_other_files(prepared: PreparedEdit, directory: Path) -> None:
    """Copy the other files of the model: tokenizer, templates, generation config, license, custom code."""
    root = prepared.checkpoint.source.directory
    written = {path.name for path in directory.iterdir()} | {SINGLE, INDEX, "README.md"}
    for pattern in COPIED_FILES:
        for path in sorted(root.glob(pattern)):
            target = directory / path.relative_to(root)
            if not path.is_file() or target.exists() or target.name in written or target.name.endswith(".index.json"):
                continue
            target.parent.mkdir(exist_ok=True)
            if path.name in _QUANTIZATION_FILES:
                value = _renumber_layers(read_json(path), prepared.checkpoint, prepared.route)
                _write_text(target, _format_json(value))
            else:
                shutil.copyfile(path, target)
                with target.open("rb") as copied:
                    os.fsync(copied.fileno())
