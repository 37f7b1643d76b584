"""What an edited checkpoint will hold, byte range by byte range, before anything is written.

Tensors are renamed in headers; their bytes stay in the order they have. A swap, move or reversal therefore changes headers
only; a drop leaves ranges out, a repeat copies them twice, and a skipped branch is a range of zeros.
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


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A run of bytes of the output: from byte `start` of the source file, or zeros where `start` is None."""

    start: int | None
    count: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of the output.

    Attributes:
        name: its file name.
        source: the file its bytes come from.
        header: the bytes in front of the data.
        pieces: the data, in order.
        tensors: its tensors.
        unchanged: whether the whole file equals the source's.
        stamp: the state in which the source's header was read.
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
        """Size of the file."""
        return len(self.header) + sum(piece.count for piece in self.ranges)


@dataclass(frozen=True, slots=True)
class Layout:
    """All files of weights of the output, and its index if it has one."""

    shards: tuple[Shard, ...]
    index: str | None

    @property
    def nbytes(self) -> int:
        """Size of all files of weights."""
        return sum(shard.nbytes for shard in self.shards)


ZeroedTensors = Callable[[int, str], bool]
"""Whether the tensor `rest` is to be zeroed where its block stands at a position of the output."""


def plan_output_files(
    tensors: TensorIndex, prefix: BlockPrefix, new_positions: Mapping[int, list[int]], zeroed: ZeroedTensors
) -> Layout:
    """Lay the output's files out along the source's.

    Args:
        weights: the source's headers.
        prefix: where the blocks are among the names.
        places: the new positions of every block that is kept.
        silenced: which tensors become zeros, by position and name within the block.
    """
    drafts = []
    for file, header in tensors.shards.items():
        moved = list(_moved(header, prefix, new_positions, zeroed))
        if moved:
            drafts.append((file, header, moved))
    names = _file_names([file for file, _, _ in drafts], complete=len(drafts) == len(tensors.shards))
    shards = tuple(
        _shard(name, tensors.directory / file, header, moved)
        for name, (file, header, moved) in zip(names, drafts, strict=True)
    )
    return Layout(shards, None if tensors.index is None else _index(tensors.index, shards))


_Moved = tuple[str, TensorInfo, bool]


def _moved(
    header: Header, prefix: BlockPrefix, new_positions: Mapping[int, list[int]], zeroed: ZeroedTensors
) -> Iterable[_Moved]:
    """Name in the output, entry in the source, and whether it becomes zeros, in the order of the data."""
    for name, entry in header.tensors.items():
        split = prefix.split(name)
        if split is None:
            yield name, entry, False
            continue
        block, rest = split
        for place in new_positions.get(block, []):
            yield prefix.join(place, rest), entry, zeroed(place, rest)


def _shard(name: str, source: Path, header: Header, moved: list[_Moved]) -> Shard:
    tensors: dict[str, TensorInfo] = {}
    pieces: list[ByteRange] = []
    end = 0
    for target, entry, zero in moved:
        tensors[target] = TensorInfo(entry.dtype, entry.shape, end, end + entry.nbytes)
        end += entry.nbytes
        _append(pieces, ByteRange(None if zero else header.data_offset + entry.start, entry.nbytes))
    first = next((piece.start for piece in pieces if piece.start is not None), None)
    before = sum(piece.count for piece in pieces[: 1 if pieces and pieces[0].start is None else 0])
    encoded = encode_header(tensors, header.metadata, congruent_to=None if first is None else first - before)
    unchanged = tensors == header.tensors and all(piece.start is not None for piece in pieces)
    return Shard(name, source, encoded, tuple(pieces), tensors, unchanged, header.file_identity)


def _append(pieces: list[ByteRange], piece: ByteRange) -> None:
    """Add a piece, joined with the one before where they adjoin."""
    if not piece.count:
        return
    if pieces:
        last = pieces[-1]
        both_zero = last.start is None and piece.start is None
        adjoining = last.start is not None and piece.start == last.start + last.count
        if both_zero or adjoining:
            pieces[-1] = ByteRange(last.start, last.count + piece.count)
            return
    pieces.append(piece)


def _file_names(files: list[str], *, complete: bool) -> list[str]:
    """The source's file names; numbered ones are counted anew where a file has become empty."""
    matches = [_SHARD_NAME.fullmatch(file) for file in files]
    if complete or not all(matches):
        return files
    return [
        f"{match[1]}-{number:05d}-of-{len(files):05d}.safetensors"
        for number, match in enumerate(matches, start=1)
        if match is not None
    ]


def _index(index: Mapping[str, object], shards: Iterable[Shard]) -> str:
    old = index.get("metadata")
    metadata = dict(old) if isinstance(old, dict) else {}
    entries = [entry for shard in shards for entry in shard.tensors.values()]
    metadata["total_size"] = sum(entry.nbytes for entry in entries)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(entry.elements for entry in entries)
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    new = {**index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(new, indent=2, ensure_ascii=False) + "\n"
