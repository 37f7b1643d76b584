"""Plan the files of an edited checkpoint before anything is written: their names, headers and byte ranges.

Tensors are renamed in the headers, and their bytes keep their order. So a swap, move or reversal changes only headers.
A drop leaves byte ranges out, a repeat copies them twice, the output projection of a skipped branch becomes a range of
zeros, and that of a scaled branch is computed from the source's bytes. A block of another checkpoint takes the place of
the source's block: its tensors have the same names and shapes, and their bytes are in another file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .safetensors_header import Header, TensorInfo, encode_header
from .tensor_index import BlockPrefix, TensorIndex

_SHARD_NAME = re.compile(r"(.*)-\d{5}-of-\d{5}\.safetensors")


Recode = Callable[[bytearray], bytes]
"""A function that computes the bytes of a tensor from those of the source."""


@dataclass(frozen=True, slots=True)
class OtherFile:
    """Hold a file of another checkpoint, and its identity when its header was read."""

    path: Path
    identity: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TakenTensor:
    """Hold the place of a tensor in a file of another checkpoint: the file, and the first byte."""

    file: OtherFile
    start: int


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Hold a range of output bytes.

    Attributes:
        start: first byte of the range in the source file; None for zeros.
        count: number of bytes.
        recode: computes the bytes from the source's; None to copy them.
        file: another file than the shard's source, from which the bytes are taken; None for the shard's source.
    """

    start: int | None
    count: int
    recode: Recode | None = None
    file: OtherFile | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of the output.

    Attributes:
        name: its file name.
        source: the file from which its bytes are copied.
        header: the bytes before the data.
        ranges: the byte ranges of the data, in order.
        tensors: its tensors by name, in the order of the data.
        unchanged: whether the file equals the source file.
        file_identity: identity of the source file when its header was read.
    """

    name: str
    source: Path
    header: bytes
    ranges: tuple[ByteRange, ...]
    tensors: Mapping[str, TensorInfo]
    unchanged: bool
    file_identity: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the size of the file in bytes."""
        return len(self.header) + sum(byte_range.count for byte_range in self.ranges)


@dataclass(frozen=True, slots=True)
class Layout:
    """All safetensors files of the output, and the text of its index if it has one."""

    shards: tuple[Shard, ...]
    index: str | None

    @property
    def nbytes(self) -> int:
        """Return the size of all safetensors files in bytes."""
        return sum(shard.nbytes for shard in self.shards)


ChangedTensors = Mapping[int, Mapping[str, Recode | None]]
"""The tensors that change, by the block's position in the output and the name within the block; None for zeros."""


TakenTensors = Mapping[int, Mapping[str, TakenTensor]]
"""The tensors of blocks of other checkpoints, by the position in the output and the name within the block."""


def plan_output_files(
    tensors: TensorIndex,
    prefix: BlockPrefix,
    positions: Mapping[int, list[int]],
    changed: ChangedTensors,
    taken: TakenTensors | None = None,
) -> Layout:
    """Plan the output files, one for each source file that keeps at least one tensor.

    Args:
        tensors: the tensors of the source.
        prefix: prefix of the blocks in the tensor names.
        positions: the positions in the output of each block that is kept.
        changed: the tensors whose bytes change.
        taken: the tensors whose bytes are those of other checkpoints; None for none.

    Returns:
        The layout of the output.
    """
    kept = []
    for file, header in tensors.shards.items():
        placed = list(_place_tensors(header, prefix, positions, changed, taken or {}))
        if placed:
            kept.append((file, header, placed))
    names = _file_names([file for file, _, _ in kept], complete=len(kept) == len(tensors.shards))
    shards = tuple(
        _plan_shard(name, tensors.directory / file, header, placed)
        for name, (file, header, placed) in zip(names, kept, strict=True)
    )
    return Layout(shards, None if tensors.index is None else _write_index(tensors.index, shards))


@dataclass(frozen=True, slots=True)
class _PlacedTensor:
    """Hold a tensor of the output: its new name, its info in the source, how its bytes change, and where they are."""

    name: str
    info: TensorInfo
    is_zeroed: bool = False
    recode: Recode | None = None
    taken: TakenTensor | None = None


def _place_tensors(
    header: Header,
    prefix: BlockPrefix,
    positions: Mapping[int, list[int]],
    changed: ChangedTensors,
    taken: TakenTensors,
) -> Iterable[_PlacedTensor]:
    """Iterate over the output tensors in the order of the data."""
    for name, info in header.tensors.items():
        split = prefix.split(name)
        if split is None:
            yield _PlacedTensor(name, info)
            continue
        block, rest = split
        for position in positions.get(block, []):
            changes = changed.get(position, {})
            recode = changes.get(rest)
            other = taken.get(position, {}).get(rest)
            yield _PlacedTensor(prefix.join(position, rest), info, rest in changes and recode is None, recode, other)


def _plan_shard(name: str, source: Path, header: Header, placed: list[_PlacedTensor]) -> Shard:
    tensors: dict[str, TensorInfo] = {}
    ranges: list[ByteRange] = []
    end = 0
    for tensor in placed:
        info = tensor.info
        tensors[tensor.name] = TensorInfo(info.dtype, info.shape, end, end + info.nbytes)
        end += info.nbytes
        if tensor.is_zeroed:
            byte_range = ByteRange(None, info.nbytes)
        elif tensor.taken is not None:
            byte_range = ByteRange(tensor.taken.start, info.nbytes, tensor.recode, tensor.taken.file)
        else:
            byte_range = ByteRange(header.data_offset + info.start, info.nbytes, tensor.recode)
        _append_range(ranges, byte_range)
    # Ranges of zeros are merged, so at most one stands before the first copied range.
    first_copied = next((byte_range.start for byte_range in ranges if byte_range.start is not None), None)
    zeros_before = ranges[0].count if ranges and ranges[0].start is None else 0
    encoded = encode_header(
        tensors, header.metadata, congruent_to=None if first_copied is None else first_copied - zeros_before
    )
    copied = all(each.start is not None and each.recode is None and each.file is None for each in ranges)
    unchanged = tensors == header.tensors and copied
    return Shard(name, source, encoded, tuple(ranges), tensors, unchanged, header.file_identity)


def _append_range(ranges: list[ByteRange], byte_range: ByteRange) -> None:
    """Append a byte range, or extend the last one if the new one continues it."""
    if not byte_range.count:
        return
    if ranges and ranges[-1].recode is None and byte_range.recode is None and ranges[-1].file == byte_range.file:
        last = ranges[-1]
        both_zeros = last.start is None and byte_range.start is None
        continues = last.start is not None and byte_range.start == last.start + last.count
        if both_zeros or continues:
            ranges[-1] = ByteRange(last.start, last.count + byte_range.count, file=last.file)
            return
    ranges.append(byte_range)


def _file_names(files: list[str], *, complete: bool) -> list[str]:
    """Return the file names of the output: those of the source, renumbered if a numbered file has become empty."""
    matches = [_SHARD_NAME.fullmatch(file) for file in files]
    if complete or not all(matches):
        return files
    return [
        f"{match[1]}-{number:05d}-of-{len(files):05d}.safetensors"
        for number, match in enumerate(matches, start=1)
        if match is not None
    ]


def _write_index(index: Mapping[str, object], shards: Iterable[Shard]) -> str:
    old_metadata = index.get("metadata")
    metadata = dict(old_metadata) if isinstance(old_metadata, dict) else {}
    infos = [info for shard in shards for info in shard.tensors.values()]
    metadata["total_size"] = sum(info.nbytes for info in infos)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(info.elements for info in infos)
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    new_index = {**index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(new_index, indent=2, ensure_ascii=False) + "\n"
