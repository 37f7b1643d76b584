"""Surgery on a checkpoint's files: tensors are renamed in headers and their bytes streamed; no model is built.

>>> edit_checkpoint("EleutherAI/pythia-6.9b-deduped", swap(12), "pythia-swapped")  # doctest: +SKIP
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

# Files that name layers in their quantisation settings, beside config.json.
_QUANTIZATION_FILES = ("quantize_config.json", "hf_quant_config.json")
_QUANTIZATION_KEYS = frozenset(("quantization_config", "compression_config"))
# Quantised formats in which a weight of zero bytes is a weight of zeros.
_ZERO_IS_ZERO = frozenset(("fp8", "fbgemm_fp8", "mxfp4"))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as its files describe it: config, headers, and where the decoder blocks are."""

    source: Source
    config: Json
    section: DecoderSection
    tensors: TensorIndex
    block_prefix: BlockPrefix

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return self.section.depth

    @property
    def fields(self) -> Json:
        """The part of the config that describes the decoder."""
        return self.section.of(self.config)


def read_checkpoint(source: Source, *, blocks: str | None = None, weights: TensorIndex | None = None) -> Checkpoint:
    """Read config and headers.

    Args:
        source: where the files are.
        blocks: prefix of the decoder blocks' tensors, where it cannot be found ("model.layers").
        weights: the headers, where they were read already.

    Raises:
        SourceError: damaged, incomplete, or config and tensors of different models.
        UnsupportedEditError: an architecture that cannot be edited.
    """
    config = read_json(source.directory / "config.json")
    section = _section(config)
    weights = read_tensor_index(source.directory) if weights is None else weights
    prefix = find_block_prefix(weights.names(), section.depth, section.extra, blocks)
    return Checkpoint(source, config, section, weights, prefix)


def _section(config: Json) -> DecoderSection:
    try:
        return find_section(config)
    except SourceError:
        from ..models.meta_model import resolve_section

        return resolve_section(config)


@dataclass(frozen=True, slots=True)
class PreparedEdit:
    """An edited checkpoint before it is written."""

    checkpoint: Checkpoint
    plan: Plan
    route: Route
    config: Json
    layout: Layout
    verified: bool

    @property
    def nbytes(self) -> int:
        """Bytes of weights to write or link."""
        return self.layout.nbytes


@dataclass(frozen=True, slots=True)
class EditResult:
    """What was written.

    Attributes:
        path: the new checkpoint's directory.
        plan: the edits made.
        route: the source's blocks in the order the new model runs them.
        depth: blocks of the source.
        bytes_written: weights' bytes copied (or shared by the file system).
        bytes_linked: weights' bytes in hard-linked files.
        seconds: from the first byte to the finished directory.
        verified: whether the reload check ran.
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
    """Work out everything about the edited checkpoint, and check that a reload would be the model meant; writes nothing.

    Raises:
        PlanError: the plan does not fit the model, or changes nothing.
        UnsupportedEditError: no checkpoint of this architecture can say the result.
    """
    section = checkpoint.section
    route = plan.route(section.depth)
    if route.is_identity(section.depth):
        raise PlanError(f"'{plan}' leaves the model as it is: there is nothing to write")
    fields = {"model_type": checkpoint.config.get("model_type"), **checkpoint.fields}
    refuse_architecture(fields)
    refuse_route(fields, route)
    config = _edited_config(checkpoint, route, verify=verify)
    if verify:
        _verify(checkpoint, config, route)
    silent = _tensors_to_zero(checkpoint, route)
    layout = plan_output_files(
        checkpoint.tensors,
        checkpoint.block_prefix,
        new_positions(route, section),
        lambda place, rest: rest in silent.get(place, ()),
    )
    return PreparedEdit(checkpoint, plan, route, config, layout, verify)


def _verify(checkpoint: Checkpoint, config: Json, route: Route) -> None:
    from ..models.block_list import find_block_list
    from ..models.reload_check import ReloadCheck
    from .tensor_names import match_names

    splits = map(checkpoint.block_prefix.split, checkpoint.tensors.names())
    in_files = {split[1] for split in splits if split is not None}
    twin = ReloadCheck.build(checkpoint.config, config, checkpoint.section, route, in_files)
    twin.check()
    path = find_block_list(twin.source, checkpoint.depth).path
    match_names(twin.source, path, checkpoint.block_prefix, checkpoint.tensors.names())


def _edited_config(checkpoint: Checkpoint, route: Route, *, verify: bool) -> Json:
    section = checkpoint.section
    config = rewrite(checkpoint.config, section, route)
    uniform = checkpoint.config.get("model_type") in IDENTICAL_LAYER_TYPES and not non_default_fields(
        checkpoint.fields, POSITIONAL_WITH_LIST
    )
    if verify or not uniform:
        from ..models.meta_model import is_known_model_type, write_derived_fields

        if verify or is_known_model_type(checkpoint.config):
            config = write_derived_fields(checkpoint.config, config, section, route)
    left = non_default_fields(checkpoint.fields, POSITIONAL_ONLY)
    if left and not verify and route.blocks != tuple(range(section.depth)):
        raise UnsupportedEditError(
            f"config.json: {', '.join(left)} can make layers differ by position, and without the reload check it cannot be told whether "
            "the result would be right; leave --no-verify out"
        )
    for part in (config, section.of(config)) if section.path else (config,):
        for key in _QUANTIZATION_KEYS & part.keys():
            part[key] = _renamed_layers(part[key], checkpoint, route)
    return config


def _renamed_layers(value: Any, checkpoint: Checkpoint, route: Route) -> Any:
    where = new_positions(route, checkpoint.section)
    return rename_layers(value, lambda block: where.get(block, []), checkpoint.block_prefix.prefix.rpartition(".")[2])


def _tensors_to_zero(checkpoint: Checkpoint, route: Route) -> Mapping[int, frozenset[str]]:
    """Names, within the block, of the tensors to zero at each position where a branch is skipped."""
    if all(visit.whole for visit in route):
        return {}
    quantised = [
        part[key]
        for part in (checkpoint.config, checkpoint.fields)
        for key in _QUANTIZATION_KEYS & part.keys()
        if part[key]
    ]
    method = quantised[0].get("quant_method") if quantised and isinstance(quantised[0], dict) else None
    if quantised and method not in _ZERO_IS_ZERO:
        raise UnsupportedEditError(
            f"the checkpoint is quantised ({method}), and zero bytes are no zero weights in this format, so a branch cannot be "
            "silenced in it; skip on the unquantised checkpoint"
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

    Args:
        model: hub id, local directory, `.gguf` file, or "smollm2-135m".
        plan: the edits, or their text.
        out: the new directory; by default `<name>-<plan>` in the current one.
        revision: branch, tag or commit on the hub.
        overwrite: replace an existing checkpoint at `out`, once the new one is complete.
        link: hard-link files that do not change. They are then the same files as the source's: who edits one edits both.
        verify: run the reload check first. It needs torch and transformers; without it, a swap needs neither.
        blocks: prefix of the decoder blocks' tensors, where it cannot be found.
        progress: called with the number of bytes moved, time after time, from one thread at a time.

    Raises:
        PlanError, SourceError, UnsupportedEditError, OutputError: before a byte is written, or with nothing left behind.

    Example:
        >>> import layersurgery as ls
        >>> ls.edit_checkpoint("smollm2-135m", ls.swap(12), "swapped")  # doctest: +SKIP
    """
    if isinstance(plan, str):
        plan = Plan.parse(plan)
    source = find_source(model, revision=revision)
    target = Path(out) if out is not None else default_output(source, plan)
    check_output(target, source.directory, overwrite=overwrite)
    sketch = prepare_edit(read_checkpoint(source, blocks=blocks), plan, verify=verify)
    return write_edit(sketch, target, overwrite=overwrite, link=link, progress=progress)


def default_output(source: Source, plan: Plan) -> Path:
    """`./<name>-<plan slug>`."""
    return Path(f"{source.name}-{plan.slug}")


def write_edit(
    prepared: PreparedEdit, out: Path, *, overwrite: bool = False, link: bool = False, progress: Progress | None = None
) -> EditResult:
    """Write a draft to `out`, whole or not at all.

    Raises:
        OutputError: the file system's answer; nothing is left behind.
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
        _write_text(directory / "config.json", _text(prepared.config))
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


def _text(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape and UTF-8 cannot hold
        text = json.dumps(value, indent=2)
    return text + "\n"


def _write_text(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _copy_other_files(prepared: PreparedEdit, directory: Path) -> None:
    """Everything else a user of the model needs: tokenizer, templates, generation config, licence, its own code."""
    root = prepared.checkpoint.source.directory
    ours = {path.name for path in directory.iterdir()} | {SINGLE, INDEX, "README.md"}
    for pattern in COPIED_FILES:
        for path in sorted(root.glob(pattern)):
            target = directory / path.relative_to(root)
            if not path.is_file() or target.exists() or target.name in ours or target.name.endswith(".index.json"):
                continue
            target.parent.mkdir(exist_ok=True)
            if path.name in _QUANTIZATION_FILES:
                value = _renamed_layers(read_json(path), prepared.checkpoint, prepared.route)
                _write_text(target, _text(value))
            else:
                shutil.copyfile(path, target)
                with target.open("rb") as copied:
                    os.fsync(copied.fileno())
