"""Headers of safetensors files: read without trust, write with the data where it was.

A safetensors file is an 8-byte little-endian length N, N bytes of JSON that give each tensor's dtype, shape and byte range,
and the data. The format allows no holes, no overlaps and no trailing bytes; spaces behind the JSON are allowed, and they
are what lets a new header keep the data's offset modulo the file system's block.
Source: the format's description in the safetensors repository's README.
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

# Bits an element takes, by the format's dtype name.
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_LENGTH_BYTES = 8
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors library itself
_SIZE_LIMIT = 1 << 63
BLOCK = 4096


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: dtype name, shape, and byte range [start, stop) within the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.stop - self.start

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    Attributes:
        tensors: in the order of the data.
        metadata: the file's own `__metadata__`.
        data_offset: where the data begins in the file.
        data_bytes: how long it is.
        stamp: what tells this state of the file from a later one.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] | None
    data_offset: int
    data_bytes: int
    file_identity: tuple[int, ...] = ()


def file_identity(descriptor: int) -> tuple[int, ...]:
    """Which file this is, how long, and when it was last written."""
    state = os.fstat(descriptor)
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def read_header(path: Path) -> Header:
    """Read and check the header of one file; the data is not touched.

    Raises:
        SourceError: the file cannot be read, is cut short, or its header contradicts itself.
    """
    try:
        with path.open("rb") as file:
            seen = file_identity(file.fileno())
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(_LENGTH_BYTES)
            if len(prefix) < _LENGTH_BYTES:
                raise _bad(path, f"it is {size} bytes long, too short for a safetensors file")
            length = int.from_bytes(prefix, "little")
            if length > _HEADER_LIMIT:
                raise _bad(path, f"it announces a header of {length:,} bytes, over the format's {_HEADER_LIMIT:,}")
            if length > size - _LENGTH_BYTES:
                raise _bad(
                    path, f"it announces a header of {length:,} bytes and is {size:,} bytes long: a truncated download?"
                )
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error
    available = size - _LENGTH_BYTES - length
    fields = _decode(path, raw)
    metadata = fields.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise _bad(path, "its __metadata__ is not a table of texts")
    entries = {name: _entry(path, name, field) for name, field in fields.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for name, entry in ordered.items():
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise _bad(path, f"tensor {name!r} begins at byte {entry.start:,} where {end:,} is due: it {what}")
        end = entry.stop
    if end > available:
        raise _bad(
            path,
            f"its tensors need {end:,} bytes of data and it holds {available:,}: a truncated download? Fetch it again",
        )
    if end < available:
        raise _bad(path, f"{available - end:,} bytes of data belong to no tensor")
    return Header(ordered, metadata, _LENGTH_BYTES + length, end, seen)


def encode_header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None, congruent_to: int | None = None
) -> bytes:
    """The bytes in front of the data, length included.

    Args:
        tensors: in the order of the data.
        metadata: the file's `__metadata__`, kept as it was.
        congruent_to: pad with spaces until the data begins at this offset modulo the block of 4096 bytes, so that a file
            system that can share extents does.
    """
    fields: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for name, entry in tensors.items():
        fields[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.stop]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    padding = -len(text) % _LENGTH_BYTES if congruent_to is None else (congruent_to - _LENGTH_BYTES - len(text)) % BLOCK
    text += b" " * padding
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _bad(path: Path, why: str) -> SourceError:
    return SourceError(f"{path} is not a sound safetensors file: {why}")


def _decode(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            raise _bad(path, f"its header names {next(n for n in names if names.count(n) > 1)!r} twice")
        return fields

    if not raw.startswith(b"{"):
        raise _bad(path, "its header is not a JSON object")
    try:
        fields = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header is not JSON ({error})") from error
    assert isinstance(fields, dict)
    try:
        "".join(fields).encode()
    except UnicodeEncodeError as error:
        raise _bad(path, f"its header holds a name that is not text ({error})") from error
    return fields


def _entry(path: Path, name: str, field: Any) -> TensorInfo:
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"tensor {name!r} lacks dtype, shape and data_offsets, or has more than these")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _bad(path, f"tensor {name!r} has the dtype {dtype!r}; known are {', '.join(DTYPE_BITS)}")
    if not _sizes(shape):
        raise _bad(path, f"tensor {name!r} has the shape {shape!r}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"tensor {name!r} has the byte range {offsets!r}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        needs = f"needs {-(-bits // 8):,} bytes" if bits < _SIZE_LIMIT else "would not fit any disk"
        raise _bad(path, f"tensor {name!r}, {dtype} of shape {shape}, {needs} and has {offsets[1] - offsets[0]:,}")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _SIZE_LIMIT for item in value)
