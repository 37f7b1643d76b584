"""The weights of a checkpoint directory as names and byte ranges, and where the decoder blocks are among them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SourceError, UnsupportedEditError
from .safetensors_header import Header, TensorInfo, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NUMBERED = re.compile(r"(?<!^)\.(0|[1-9][0-9]*)(?=\.)")
# Parts of names that say a stack of layers is not the text decoder's.
_NOT_TEXT = re.compile(r"vision|visual|audio|image|video|speech|encoder|mtp|qformer|resampler|draft", re.IGNORECASE)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")


@dataclass(frozen=True, slots=True)
class TensorIndex:
    """All safetensors files of one checkpoint.

    Attributes:
        directory: where they are.
        shards: header of each file, by file name, in the order of the names.
        index: the parsed `model.safetensors.index.json`, or None for a single file.
    """

    directory: Path
    shards: Mapping[str, Header]
    index: Mapping[str, Any] | None

    def names(self) -> Iterable[str]:
        """Every tensor's name, file by file, in the order of the data."""
        for header in self.shards.values():
            yield from header.tensors

    def tensors(self) -> Iterable[tuple[str, TensorInfo]]:
        """Every tensor's name and entry."""
        for header in self.shards.values():
            yield from header.tensors.items()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.data_bytes for header in self.shards.values())


def read_tensor_index(directory: Path) -> TensorIndex:
    """Read the headers of a directory's safetensors files, and its index where it has one.

    Like transformers, `model.safetensors` goes before an index.

    Raises:
        SourceError: no safetensors, pickles only, a damaged file, or an index that does not fit the files.
    """
    if (directory / SINGLE).exists():
        return TensorIndex(directory, {SINGLE: read_header(directory / SINGLE)}, None)
    if not (directory / INDEX).exists():
        raise _nothing_to_read(directory)
    index = read_json(directory / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{directory / INDEX} has no weight_map that names the tensors' files")
    for name, file in weight_map.items():
        # A name is a plain file in this directory, so that nothing outside it is read.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise SourceError(
                f"{directory / INDEX} places {name!r} in {file!r}, which is no file name of this directory"
            )
        if not (directory / file).is_file():
            raise SourceError(f"{directory / INDEX} names {file}, which is missing; fetch the checkpoint again")
    shards = {file: read_header(directory / file) for file in sorted(set(weight_map.values()))}
    holders: dict[str, str] = {}
    for file, header in shards.items():
        for name in header.tensors:
            if name in holders:
                raise SourceError(f"tensor {name!r} is in both {holders[name]} and {file} of {directory}")
            holders[name] = file
    for name, file in weight_map.items():
        if holders.get(name) != file:
            found = f"it is in {holders[name]}" if name in holders else "no file has it"
            raise SourceError(f"{directory / INDEX} places {name!r} in {file}, but {found}; fetch the checkpoint again")
    return TensorIndex(directory, shards, index)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SourceError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds {type(value).__name__} where a JSON object is due")
    return value


def _nothing_to_read(directory: Path) -> SourceError:
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    if (directory / "adapter_config.json").exists():
        return SourceError(
            f"{directory} is a PEFT adapter without a model of its own; merge it first with "
            "peft's merge_and_unload() and save_pretrained()"
        )
    if others:
        return SourceError(
            f"{directory} has {', '.join(others[:3])} and neither {SINGLE} nor {INDEX}; rename or index the files"
        )
    if pickles:
        return SourceError(
            f"{directory} has its weights as {pickles[0]}, a pickle, which can run code when opened and is not read. Convert it "
            "where you trust it: AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET) writes safetensors"
        )
    return SourceError(f"{directory} has no safetensors weights ({SINGLE} or {INDEX})")


@dataclass(frozen=True, slots=True)
class BlockPrefix:
    """Where the decoder blocks are in tensor names: `prefix.N.rest`.

    Attributes:
        prefix: what stands before the block number, such as "model.layers" or "transformer.h".
        depth: how many decoder blocks there are.
        extra: blocks behind them that the decoder does not run (prediction heads of several tokens).
    """

    prefix: str
    depth: int
    extra: int = 0

    def split(self, name: str) -> tuple[int, str] | None:
        """Block number and the rest of a tensor's name, or None for a tensor that belongs to no block."""
        match = self._pattern.match(name)
        return None if match is None else (int(match[1]), match[2])

    def join(self, block: int, rest: str) -> str:
        """The name of a tensor of a block."""
        return f"{self.prefix}.{block}.{rest}"

    @property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(self.prefix)}\.(0|[1-9][0-9]*)\.(.+)", re.DOTALL)


def find_block_prefix(names: Iterable[str], depth: int, extra: int = 0, prefix: str | None = None) -> BlockPrefix:
    """Find the decoder blocks among tensor names: the one prefix that is followed by every number below the depth.

    Args:
        names: all tensor names.
        depth: blocks that the config announces.
        extra: blocks behind those that the config announces for other uses.
        prefix: take this prefix and look no further.

    Raises:
        SourceError: another count of blocks than the config's, or none.
        UnsupportedEditError: several stacks that could be meant.
    """
    found: dict[str, set[int]] = defaultdict(set)
    for name in names:
        for match in _NUMBERED.finditer(name):
            found[name[: match.start()]].add(int(match[1]))
    if prefix is not None:
        found = {prefix: found.get(prefix, set())}
    # A list inside a block, such as the experts, has a number in its own prefix.
    outer = {p: numbers for p, numbers in found.items() if not _NUMBERED.search(p + ".") or p == prefix}
    fitting = [p for p, numbers in outer.items() if numbers in (set(range(depth)), set(range(depth + extra)))]
    text = [p for p, numbers in outer.items() if len(numbers) > 1 and not _NOT_TEXT.search(p)]
    if text and prefix is None:  # a tower for other input is the decoder only where there is nothing else
        fitting = [p for p in fitting if p in text or depth == 1]
    if len(fitting) > 1:
        raise UnsupportedEditError(
            f"several stacks of {depth} layers could be the decoder: {', '.join(sorted(fitting))}; name one with blocks="
        )
    if not fitting:
        have = (
            ", ".join(f"{p}.0 to {p}.{max(n)} ({len(n)})" for p, n in outer.items() if len(n) > 1)
            or "no numbered layers"
        )
        raise SourceError(
            f"the config announces {depth} layers and the tensors do not match: found {have}. The checkpoint is incomplete or "
            "its config is another model's"
        )
    return BlockPrefix(fitting[0], depth, len(found[fitting[0]]) - depth)


def fingerprint(directory: Path) -> str:
    """A short name for the weights and config in a directory, from every byte of them."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        target = path.resolve()
        if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
            content = target.name  # the hub's cache calls a file by its SHA-256
        else:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()[:16]
