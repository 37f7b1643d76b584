"""Valid headers are read as the safetensors library reads them; invalid headers are refused with a SourceError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from layersurgery.checkpoints.safetensors_header import DISK_BLOCK_BYTES, encode_header, read_header
from layersurgery.errors import SourceError

_TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.arange(4, dtype=torch.int64), "empty": torch.zeros(0, 5)}


def written(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(start: int, stop: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(_TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"format": "pt"}
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == set(header.tensors)
        for name, info in header.tensors.items():
            tensor_slice = file.get_slice(name)
            assert (tensor_slice.get_dtype(), tensor_slice.get_shape()) == (info.dtype, list(info.shape))
    raw = (tmp_path / "a.safetensors").read_bytes()
    for name, info in header.tensors.items():
        start, stop = header.data_offset + info.start, header.data_offset + info.stop
        assert raw[start:stop] == _TENSORS[name].numpy().tobytes()


@pytest.mark.parametrize("offset", [0, 8, 1234, 4095])
def test_writes_what_the_library_reads_with_the_data_where_it_was(tmp_path: Path, offset: int) -> None:
    save_file(_TENSORS, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()[header.data_offset :]
    front = encode_header(header.tensors, {"format": "pt"}, congruent_to=offset)
    assert len(front) % DISK_BLOCK_BYTES == offset
    (tmp_path / "b.safetensors").write_bytes(front + data)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), value) for name, value in _TENSORS.items())
    assert read_header(tmp_path / "b.safetensors").tensors == header.tensors


_TWICE = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
_NESTED = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}}"

# What the library finds is reported in its words, the rest in ours.
_INVALID: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty file": (lambda p: written(p, b"", length=0), "EOF while parsing"),
    "seven bytes": (lambda p: [p.write_bytes(b"1234567"), p][-1], "header too small"),
    "terabytes": (lambda p: written(p, b"{}", length=2**42), "header too large"),
    "longer than the file": (lambda p: written(p, b"{}", length=99), "invalid header length"),
    "not json": (lambda p: written(p, b"{nonsense}"), "invalid JSON"),
    "not an object": (lambda p: written(p, b"[1]"), "invalid JSON"),
    "not utf-8": (lambda p: written(p, b'{"\xff":1}'), "invalid UTF-8"),
    "lone surrogate": (lambda p: written(p, b'{"\\ud800":{}}'), "invalid JSON"),
    "deep": (lambda p: written(p, b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "recursion limit"),
    "deep in another field": (lambda p: written(p, _NESTED, b"x"), "recursion"),
    "digits": (
        lambda p: written(p, b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}'),
        "number out of range",
    ),
    "twice": (lambda p: written(p, _TWICE, b"x"), "contains the name 'a' twice"),
    "dtype": (lambda p: written(p, {"a": tensor(0, 1, "F12")}, b"x"), "unknown variant `F12`, expected one of"),
    "no dtype": (lambda p: written(p, {"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x"), "missing field `dtype`"),
    "another field": (
        lambda p: written(p, {"a": {**tensor(0, 1), "scale": 2}}, b"x"),
        "'a' must have exactly the fields dtype, shape and data_offsets",
    ),
    "negative": (lambda p: written(p, {"a": tensor(0, 1, shape=[-1])}, b"x"), "integer `-1`"),
    "true": (lambda p: written(p, {"a": tensor(0, 1, shape=[True])}, b"x"), "boolean `true`"),
    "huge": (lambda p: written(p, {"a": tensor(0, 1, shape=[2**62] * 400)}, b"x"), "overflow"),
    "backwards": (lambda p: written(p, {"a": tensor(1, 0, shape=[0])}, b"x"), "invalid offset for tensor `a`"),
    "three ends": (lambda p: written(p, {"a": {**tensor(0, 1), "data_offsets": [0, 1, 2]}}, b"x"), "invalid length 3"),
    "wrong size": (lambda p: written(p, {"a": tensor(0, 3, "F16", [2])}, b"xyz"), "invalid shape, data type"),
    "overlap": (lambda p: written(p, {"a": tensor(0, 2), "b": tensor(1, 3)}, b"xyz"), "invalid offset for tensor `b`"),
    "hole": (lambda p: written(p, {"a": tensor(0, 1), "b": tensor(2, 3)}, b"xyz"), "invalid offset for tensor `b`"),
    "beyond": (lambda p: written(p, {"a": tensor(0, 9)}, b"xyz"), "not fully covered.*truncated download"),
    "trailing": (lambda p: written(p, {"a": tensor(0, 1)}, b"xyz"), "not fully covered"),
    "metadata": (lambda p: written(p, {"__metadata__": {"a": 1}}), "expected a string"),
    "missing": (lambda p: p, "cannot read"),
}


@pytest.mark.parametrize("name", _INVALID)
def test_an_invalid_header_is_refused(tmp_path: Path, name: str) -> None:
    make, message = _INVALID[name]
    path = make(tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=message) as caught:
        read_header(path)
    assert "x.safetensors" in str(caught.value)
    assert name == "missing" or "again" in str(caught.value)


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "dtype", "shape"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner)
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    header=st.binary(max_size=60) | st.dictionaries(st.text(max_size=3), _json, max_size=3), data=st.binary(max_size=9)
)
def test_arbitrary_bytes_do_not_crash_it(tmp_path: Path, header: Any, data: bytes) -> None:
    path = written(tmp_path / "fuzz.safetensors", header, data)
    try:
        header_read = read_header(path)
    except SourceError:
        return
    assert sum(info.nbytes for info in header_read.tensors.values()) == header_read.data_bytes == len(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(index=st.integers(0, 250), byte=st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_harmless(tmp_path: Path, index: int, byte: int) -> None:
    path = tmp_path / "flip.safetensors"
    save_file(_TENSORS, path)
    raw = bytearray(path.read_bytes())
    raw[index % len(raw)] = byte
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except SourceError:
        return
    assert header.data_offset + header.data_bytes == len(raw)
