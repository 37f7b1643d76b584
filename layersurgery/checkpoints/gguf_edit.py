"""Edit a GGUF file to a GGUF file: rename its tensors and rewrite its metadata, without decoding the weights.

>>> import layersurgery as ls
>>> result = ls.edit_checkpoint("smollm2-135m", ls.swap(12), "swapped.gguf")
>>> ls.load("swapped.gguf").model.config.num_hidden_layers
30
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..atomic_io import atomic_large_file, check_room
from ..errors import OutputError, PlanError, SourceError, UnsupportedEditError
from ..models.unsupported import refuse_route
from ..plans.plan import Plan
from ..plans.route import Route
from ..plans.visit import BRANCHES, Branch, Visit
from ..version import __version__
from .edit_checkpoint import EditResult
from .gguf_metadata import (
    POST_NORMED,
    BlockCounts,
    check_architecture,
    count_blocks,
    layer_period,
    rewrite_metadata,
    split_block,
)
from .safetensors_header import refuse_pointer
from .shard_writer import Progress
from .sources import GgufSource

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
# The tensors whose outputs a branch adds to the stream, by the beginning of their names in a block.
_OUTPUTS: Mapping[Branch, tuple[str, ...]] = {
    "attention": ("attn_output.",),
    "mlp": ("ffn_down.", "ffn_down_exps.", "ffn_down_shexp."),
}
_POST_NORMS: Mapping[Branch, str] = {"attention": "post_attention_norm.", "mlp": "post_ffw_norm."}
_PLAIN_TYPES = ("F32", "F16", "BF16")

Change = Callable[[Any], Any]
"""Return the new bytes of a tensor of the reader."""


@dataclass(frozen=True, slots=True)
class Planned:
    """Hold everything that is written, before anything is.

    Attributes:
        source: the file.
        plan: the edits.
        route: the source's blocks in their new order.
        counts: numbers of blocks of the source.
        fields: the metadata: key, value, type, and type of the values of an array.
        tensors: new name, tensor of the reader, and how its bytes change; None if they do not.
        alignment: number of bytes to whose multiples the file aligns its tensors.
        header: size of the source's header and metadata in bytes, and about that of the output's.
        notes: what users should know.
    """

    source: GgufSource
    plan: Plan
    route: Route
    counts: BlockCounts
    fields: list[tuple[str, Any, Any, Any]]
    tensors: list[tuple[str, Any, Change | None]]
    alignment: int
    header: int
    notes: tuple[str, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(int(tensor.n_bytes) for _, tensor, _ in self.tensors)


def check_gguf_output(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output that must not be written, before any work.

    Raises:
        OutputError: its name does not end in .gguf, it is the source, or it exists and may not be replaced.
    """
    if out.suffix.lower() != SUFFIX:
        raise OutputError(f"the output {out} of a GGUF edit is a file; give a name that ends in {SUFFIX}")
    if not os.path.lexists(out):
        return
    if out.exists() and out.samefile(source):
        raise OutputError(f"the output {out} is the source itself; choose another output")
    if not overwrite:
        raise OutputError(f"{out} exists already; choose another output, or replace it (`overwrite`)")
    if not out.is_file() or out.open("rb").read(4) != _MAGIC:
        raise OutputError(f"{out} is not replaced: it is not a GGUF file; remove it yourself or choose another output")


def plan_gguf_edit(source: GgufSource, plan: Plan) -> Planned:
    """Compute the edited file's metadata and tensors, and refuse what a GGUF file cannot say. Nothing is written.

    Raises:
        PlanError: the plan does not fit the model, or changes nothing.
        SourceError: the file is damaged or cannot be read, or gguf is not installed.
        UnsupportedEditError: no GGUF file can represent the edited model.
    """
    reader, metadata, arch = _read(source)
    counts = count_blocks(metadata, arch)
    route = plan.route(counts.depth)
    if route.is_identity(counts.depth):
        raise PlanError(f"'{plan}' leaves the model unchanged, so there is nothing to write")
    refuse_route({"model_type": arch}, route)
    for visit in route:  # what checkpoints may express and this file does not build
        if visit.source or visit.mean or visit.start or visit.parallel or visit.divisor != 1:
            raise UnsupportedEditError(
                f"{visit}: a GGUF file cannot be edited like this; write a safetensors checkpoint"
            )
    changed = rewrite_metadata(metadata, arch, route)
    tensors = list(_place_tensors(reader.tensors, arch, metadata, counts, route))
    fields, notes = _new_fields(reader, source, plan, route, metadata, changed)
    header = source.path.stat().st_size - sum(int(tensor.n_bytes) for tensor in reader.tensors)
    return Planned(source, plan, route, counts, fields, tensors, int(reader.alignment), header, notes)


def check_gguf_source(source: GgufSource) -> str:
    """Refuse a file of which no edit can be written, before a plan is chosen.

    Returns:
        What no plan may do, in words; empty if the file forbids none.

    Raises:
        SourceError: the file is damaged or cannot be read, or gguf is not installed.
        UnsupportedEditError: files of this architecture are not edited, or it is one of several parts.
    """
    _, metadata, arch = _read(source)
    check_architecture(arch)
    count_blocks(metadata, arch)
    period = layer_period(metadata, arch)
    if period is None:
        return ""
    return (
        f"llama.cpp takes every {period}th layer of {arch} for one of another kind, so only edits that keep this order "
        "can be written as GGUF. If another one is chosen, nothing is written, and the measurements are kept"
    )


def _read(source: GgufSource) -> tuple[Any, dict[str, Any], str]:
    """Return the reader of a whole model's file, its metadata and its architecture."""
    reader = _open(source.path)
    metadata = {key: value for key, value, _, _ in _fields(reader, decode=True)}
    if int(metadata.get("split.count", 0)) > 1:
        raise UnsupportedEditError(
            f"{source.label} is one of {metadata['split.count']} parts of a model; merge them first (llama-gguf-split "
            "--merge), and edit the whole file"
        )
    return reader, metadata, str(metadata.get("general.architecture"))


def write_gguf_edit(
    planned: Planned, out: Path, *, overwrite: bool, progress: Progress | None = None, dry_run: bool = False
) -> EditResult:
    """Write an edited GGUF file to `out`, completely or not at all; with `dry_run`, write nothing.

    Raises:
        OutputError: `out` cannot be written; no partial output remains.
    """
    import gguf

    started = time.perf_counter()

    def result(size: int) -> EditResult:
        return EditResult(
            path=out,
            plan=planned.plan,
            route=planned.route,
            depth=planned.counts.depth,
            bytes_written=size,
            bytes_linked=0,
            seconds=time.perf_counter() - started,
            verified=False,
            notes=planned.notes,
            dry_run=dry_run,
        )

    if dry_run:
        check_room(out, planned.nbytes)
        return result(planned.nbytes + planned.header)
    with atomic_large_file(out, bytes_needed=planned.nbytes, overwrite=overwrite) as partial:
        writer = gguf.GGUFWriter(partial, "")
        writer.kv_data[0].clear()  # the architecture comes with the other fields, in their order
        writer.data_alignment = planned.alignment
        for key, value, kind, item in planned.fields:
            writer.add_key_value(key, value, kind, item)
        for name, tensor, _ in planned.tensors:
            data = tensor.data
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, tensor, change in planned.tensors:
                writer.write_tensor_data(tensor.data if change is None else change(tensor))
                if progress is not None:
                    progress(int(tensor.n_bytes))
        finally:
            writer.close()
        size = partial.stat().st_size
    return result(size)


def _open(path: Path) -> Any:
    refuse_pointer(path)
    try:
        import gguf
    except ImportError as error:
        raise SourceError(f"editing {path.name} needs the package gguf ({error}); run: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the reader raises any exception for a damaged file
        raise SourceError(f"gguf cannot read {path}: {type(error).__name__}: {error}") from error
    if reader.byte_order != "I":
        raise SourceError(f"{path} has the other byte order than this machine; convert it with gguf-convert-endian")
    return reader


def _fields(reader: Any, *, decode: bool = False) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield key, value, type, and type of the values of an array. Text is bytes, unless it is decoded."""
    from gguf import GGUFValueType

    for key, entry in reader.fields.items():
        if key.startswith("GGUF."):  # of the file's header
            continue
        kind, *items = entry.types
        if len(items) > 1:
            raise UnsupportedEditError(f"{key} is an array of arrays, which the package gguf cannot write")
        text = GGUFValueType.STRING in (kind, *items)
        value: Any
        if kind == GGUFValueType.ARRAY and text:  # the tokens, which nothing here reads
            value = [bytes(entry.parts[index]) for index in entry.data]
        elif text:
            value = bytes(entry.parts[-1]).decode(errors="replace") if decode else bytes(entry.parts[-1])
        else:
            value = entry.contents()
        yield key, value, kind, items[0] if items else None


def _new_fields(
    reader: Any,
    source: GgufSource,
    plan: Plan,
    route: Route,
    metadata: Mapping[str, Any],
    changed: Mapping[str, Any],
) -> tuple[list[tuple[str, Any, Any, Any]], tuple[str, ...]]:
    """Return the edited file's metadata, and notes on what was left out."""
    from gguf import GGUFValueType

    # These describe the unedited model.
    stale = {"general.parameter_count", "general.size_label", "general.uuid"}
    own: dict[str, str] = {
        "general.name": f"{metadata.get('general.name') or source.name} ({plan})",
        "layersurgery.source": str(metadata.get("layersurgery.source") or source.label),
        "layersurgery.plan": "; then ".join(filter(None, (str(metadata.get("layersurgery.plan") or ""), str(plan)))),
        "layersurgery.route": str(route),
        "layersurgery.version": __version__,
    }
    if source.license and not metadata.get("general.license"):
        own["general.license"] = source.license
    if source.notice:
        own["layersurgery.notice"] = source.notice
    fields, empty = [], []
    for key, value, kind, item in _fields(reader):
        if key in own or key in stale:
            continue
        if kind == GGUFValueType.ARRAY and not value:
            empty.append(key)
            continue
        fields.append((key, changed.get(key, value), kind, item))
    fields += [(key, text, GGUFValueType.STRING, None) for key, text in own.items()]
    note = f"left out, because the package gguf cannot write empty arrays: {', '.join(empty)}"
    return fields, (note,) if empty else ()


def _place_tensors(
    tensors: list[Any], arch: str, metadata: Mapping[str, Any], counts: BlockCounts, route: Route
) -> Iterator[tuple[str, Any, Change | None]]:
    """Yield each tensor's new name, the tensor, and how its bytes change: those outside, then the blocks in order."""
    blocks: dict[int, dict[str, Any]] = {}
    for tensor in tensors:
        split = split_block(tensor.name)
        if split is None:
            yield tensor.name, tensor, None
        elif split[0] >= counts.depth + counts.extra:
            raise SourceError(f"the file has {tensor.name}, and only {counts.depth + counts.extra} blocks")
        else:
            blocks.setdefault(split[0], {})[split[1]] = tensor
    extra = [Visit(counts.depth + number) for number in range(counts.extra)]
    for position, visit in enumerate((*route, *extra)):
        block = blocks.get(visit.block)
        if block is None:
            raise SourceError(f"the file states {counts.depth} blocks, and has no tensor of block {visit.block}")
        changes = _changes(visit, block, arch, metadata)
        for rest, tensor in block.items():
            yield f"blk.{position}.{rest}", tensor, changes.get(rest)


def _changes(visit: Visit, block: Mapping[str, Any], arch: str, metadata: Mapping[str, Any]) -> dict[str, Change]:
    """Return how the bytes of a block's tensors change for a visit, by the name in the block.

    Raises:
        UnsupportedEditError: the block has no such tensors, or their type cannot hold the new values.
    """
    changes: dict[str, Change] = {}
    for branch in BRANCHES:
        factor, units = visit.factor(branch), visit.units_off(branch)
        if factor is True and not units:
            continue
        names = [name for name in block if name.startswith(_OUTPUTS[branch])]
        if not any(name.endswith(".weight") for name in names):
            raise UnsupportedEditError(
                f"{visit}: block {visit.block} has no tensor {_OUTPUTS[branch][0]}weight, so it is not known what its "
                f"{branch} adds to the stream"
            )
        if not factor:
            for name in names:
                _check_zero(visit, name, block[name])
                changes[name] = _zeros
            continue
        if units:
            name = f"{_OUTPUTS[branch][0]}weight"
            columns = _unit_columns(visit, branch, block.get(name), metadata, arch)
            _check_plain(visit, name, block[name])
            changes[name] = _chain(changes.get(name), _without_columns(columns))
        if factor is not True:
            norms = [name for name in block if name.startswith(_POST_NORMS[branch])] if arch in POST_NORMED else []
            for name in norms or names:
                _check_plain(visit, name, block[name])
                changes[name] = _chain(changes.get(name), _scaled(float(factor)))
    return changes


@cache
def _zero_is_zero(kind: Any) -> bool:
    """Return whether a tensor of this type whose bytes are all zero is zero."""
    import gguf
    import numpy as np

    if kind.name in _PLAIN_TYPES:
        return True
    try:
        values = gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return not values.any()


def _check_zero(visit: Visit, name: str, tensor: Any) -> None:
    if not _zero_is_zero(tensor.tensor_type):
        raise UnsupportedEditError(
            f"{visit}: {tensor.name} is of the type {tensor.tensor_type.name}, in which zero bytes are not known to be "
            f"zero weights, so {name} cannot be zeroed"
        )


def _check_plain(visit: Visit, name: str, tensor: Any) -> None:
    if tensor.tensor_type.name not in _PLAIN_TYPES:
        raise UnsupportedEditError(
            f"{visit}: {tensor.name} is of the quantised type {tensor.tensor_type.name}, so {name} can be zeroed as a "
            "whole but not scaled or zeroed in part; edit the safetensors checkpoint, and convert and quantise that"
        )


def _unit_columns(visit: Visit, branch: Branch, tensor: Any, metadata: Mapping[str, Any], arch: str) -> list[int]:
    """Return the columns of an output projection that read the heads, or the neurons, that are off."""
    unit = "head" if branch == "attention" else "neuron"
    if tensor is None:
        raise UnsupportedEditError(f"{visit}: block {visit.block} has experts, whose neurons cannot be turned off")
    columns = int(tensor.shape[0])
    count = columns
    if branch == "attention":
        heads = metadata.get(f"{arch}.attention.head_count")
        own = heads[visit.block] if isinstance(heads, list) else heads
        if type(own) is not int or own < 1 or columns % own:
            raise UnsupportedEditError(
                f"{visit}: {tensor.name} reads {columns} numbers, which are not those of {own} heads"
            )
        count = own
    units = visit.units_off(branch)
    if units[-1] >= count:
        raise PlanError(f"{visit}: block {visit.block} has {count} {unit}s, 0 to {count - 1}")
    width = columns // count
    return [number * width + column for number in units for column in range(width)]


def _zeros(tensor: Any) -> Any:
    import numpy as np

    return np.zeros_like(tensor.data)


def _scaled(factor: float) -> Callable[[Any], Any]:
    return lambda values: values * values.dtype.type(factor)


def _without_columns(columns: list[int]) -> Callable[[Any], Any]:
    def zero(values: Any) -> Any:
        values[..., columns] = 0
        return values

    return zero


def _chain(before: Change | None, change: Callable[[Any], Any]) -> Change:
    """Return a change of a tensor's float32 values as a change of its bytes, after another one."""

    def changed(tensor: Any) -> Any:
        import gguf
        import numpy as np

        kind = tensor.tensor_type
        data = tensor.data if before is None else before(tensor)
        values = np.array(gguf.dequantize(np.ascontiguousarray(data), kind), np.float32)
        return gguf.quantize(change(values), kind)

    return changed
