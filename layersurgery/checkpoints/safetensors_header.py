"""Read, check and write the headers of safetensors files.

A safetensors file is an 8-byte little-endian length N, then N bytes of JSON with the dtype, shape and byte range of
each tensor, then the data. The format allows no holes, no overlaps and no trailing bytes. It allows spaces after the
JSON, so a new header can keep the data's offset modulo the block size of the file system.
Source: the description of the format in the README of the safetensors repository.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SourceError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LENGTH_BYTES = 8
DISK_BLOCK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: its dtype name, its shape, and its byte range [start, stop) within the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Return the size of the data in bytes."""
        return self.stop - self.start

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """The checked header of one file.

    Attributes:
        tensors: the tensors by name, in the order of the data.
        metadata: the `__metadata__` of the file; None if it has none.
        data_offset: byte of the file at which the data begins.
        data_bytes: size of the data in bytes.
        file_identity: result of `file_identity` when the header was read; it shows whether the file was changed later.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] | None
    data_offset: int
    data_bytes: int
    file_identity: tuple[int, ...] = ()


def file_identity(descriptor: int) -> tuple[int, ...]:
    """Return the device, inode, size in bytes and modification time in nanoseconds of an open file."""
    state = os.fstat(descriptor)
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def refuse_pointer(path: Path) -> None:
    """Refuse a file of a git clone that holds only the address of its content.

    Raises:
        SourceError: it is a pointer of git-lfs; says how to fetch the content.
    """
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise SourceError(
                f"{path} is a git-lfs pointer and not the file itself; fetch the files with: git lfs install && git "
                f"lfs pull (in {path.parent})"
            )


def read_header(path: Path) -> Header:
    """Read and check the header of one file without reading its data.

    Raises:
        SourceError: the file cannot be read, is truncated, or its header contradicts itself.
    """
    from safetensors import SafetensorError, safe_open

    try:
        refuse_pointer(path)
        with path.open("rb") as file:
            identity = file_identity(file.fileno())
            # The library checks types and sizes, and that the data has no holes, overlaps or trailing bytes.
            with safe_open(path, "np"):
                pass
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            fields = json.loads(file.read(length), object_pairs_hook=lambda pairs: _to_dict(path, pairs))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise _invalid_file(
            path, f"{reason}. It is damaged, perhaps a truncated download; fetch it or save it again"
        ) from error
    metadata = fields.pop("__metadata__", None)
    tensors = {name: _read_tensor_info(path, name, field) for name, field in fields.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = max((info.stop for info in tensors.values()), default=0)
    return Header(tensors, metadata, _LENGTH_BYTES + length, end, identity)


def encode_header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None, congruent_to: int | None = None
) -> bytes:
    """Return the bytes before the data: the length and the JSON header.

    Args:
        tensors: the tensors by name, in the order of the data.
        metadata: the `__metadata__` of the file, written unchanged; None to write none.
        congruent_to: pad with spaces until the offset of the data equals this offset modulo the disk block of 4096
            bytes. A file system that can share extents between files then shares them.
    """
    fields: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for name, info in tensors.items():
        fields[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.stop]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    if congruent_to is None:
        padding = -len(text) % _LENGTH_BYTES
    else:
        padding = (congruent_to - _LENGTH_BYTES - len(text)) % DISK_BLOCK_BYTES
    text += b" " * padding
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _invalid_file(path: Path, reason: str) -> SourceError:
    return SourceError(f"{path} is not a valid safetensors file: {reason}")


def _to_dict(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs; a name that is there twice is refused, since the library uses one of them."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise _invalid_file(path, f"its header contains the name {duplicate!r} twice. Save it again")
    return fields


def _read_tensor_info(path: Path, name: str, field: Any) -> TensorInfo:
    # The library ignores other fields, and they would be lost in the output.
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise _invalid_file(
            path, f"tensor {name!r} must have exactly the fields dtype, shape and data_offsets. Save it again"
        )
    return TensorInfo(field["dtype"], tuple(field["shape"]), *field["data_offsets"])
