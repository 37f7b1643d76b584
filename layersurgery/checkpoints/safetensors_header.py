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

# Bits per element, by the dtype name that the format uses.
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_SIZE = 1 << 63
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


def read_header(path: Path) -> Header:
    """Read and check the header of one file without reading its data.

    Raises:
        SourceError: the file cannot be read, is truncated, or its header contradicts itself.
    """
    try:
        with path.open("rb") as file:
            identity = file_identity(file.fileno())
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(_LENGTH_BYTES)
            if len(prefix) < _LENGTH_BYTES:
                raise _invalid_file(path, f"it is {size} bytes long, which is too short for a safetensors file")
            length = int.from_bytes(prefix, "little")
            if length > _MAX_HEADER_BYTES:
                raise _invalid_file(
                    path,
                    f"it declares a header of {length:,} bytes, more than the {_MAX_HEADER_BYTES:,} that the format "
                    "allows",
                )
            if length > size - _LENGTH_BYTES:
                raise _invalid_file(
                    path,
                    f"it declares a header of {length:,} bytes, but the file has {size:,} bytes; it may be a truncated "
                    "download, so fetch it again",
                )
            encoded = file.read(length)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error
    available = size - _LENGTH_BYTES - length
    fields = _decode(path, encoded)
    metadata = fields.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise _invalid_file(path, "its __metadata__ is not an object with text values")
    unordered = {name: _read_tensor_info(path, name, field) for name, field in fields.items()}
    tensors = dict(sorted(unordered.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for name, info in tensors.items():
        if info.start != end:
            problem = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            raise _invalid_file(
                path, f"tensor {name!r} begins at byte {info.start:,} instead of {end:,}, so it {problem}"
            )
        end = info.stop
    if end > available:
        raise _invalid_file(
            path,
            f"its tensors need {end:,} bytes of data, but it has {available:,}; it may be a truncated download, so "
            "fetch it again",
        )
    if end < available:
        raise _invalid_file(path, f"{available - end:,} bytes of data belong to no tensor")
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


def _decode(path: Path, encoded: bytes) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            duplicate = next(name for name in names if names.count(name) > 1)
            raise _invalid_file(path, f"its header contains the name {duplicate!r} twice")
        return fields

    if not encoded.startswith(b"{"):
        raise _invalid_file(path, "its header is not a JSON object")
    try:
        fields = json.loads(encoded.decode(), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise _invalid_file(path, f"its header is not JSON ({error})") from error
    assert isinstance(fields, dict)
    try:
        "".join(fields).encode()
    except UnicodeEncodeError as error:
        raise _invalid_file(path, f"its header contains a name that is not valid text ({error})") from error
    return fields


def _read_tensor_info(path: Path, name: str, field: Any) -> TensorInfo:
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise _invalid_file(path, f"tensor {name!r} must have exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _invalid_file(
            path, f"tensor {name!r} has the unknown dtype {dtype!r}; known dtypes are {', '.join(DTYPE_BITS)}"
        )
    if not _are_sizes(shape):
        raise _invalid_file(path, f"tensor {name!r} has the invalid shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid_file(path, f"tensor {name!r} has the invalid byte range {offsets!r}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        needs = f"needs {-(-bits // 8):,} bytes" if bits < _MAX_SIZE else "would not fit on any disk"
        raise _invalid_file(
            path,
            f"tensor {name!r} ({dtype} of shape {shape}) {needs}, but its byte range has {offsets[1] - offsets[0]:,} "
            "bytes",
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _MAX_SIZE for item in value)
