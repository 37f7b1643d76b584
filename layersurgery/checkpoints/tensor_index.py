"""List the tensors of a checkpoint directory, and find the name prefix of its decoder blocks."""

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
from ..models.config_fields import text_paths
from .safetensors_header import Header, TensorInfo, read_header, refuse_pointer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
MERGE_ADAPTER = "Merge it into its base model first with merge_and_unload() of peft, then save_pretrained()"
_NUMBERED = re.compile(r"(?<!^)\.(0|[1-9][0-9]*)(?=\.)")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")


@dataclass(frozen=True, slots=True)
class TensorIndex:
    """The tensors of all safetensors files of one checkpoint.

    Attributes:
        directory: the directory of the files.
        shards: the header of each file by file name, sorted by name.
        index: the parsed `model.safetensors.index.json`, or None for a single file.
        absent: tensors that the index names and no file has.
    """

    directory: Path
    shards: Mapping[str, Header]
    index: Mapping[str, Any] | None
    absent: tuple[str, ...] = ()

    def names(self) -> Iterable[str]:
        """Iterate over the names of all tensors, file by file, in the order of the data."""
        for header in self.shards.values():
            yield from header.tensors

    def tensors(self) -> Iterable[tuple[str, TensorInfo]]:
        """Iterate over the names and infos of all tensors, in the same order as `names`."""
        for header in self.shards.values():
            yield from header.tensors.items()

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(header.data_bytes for header in self.shards.values())


def read_tensor_index(directory: Path) -> TensorIndex:
    """Read the headers of a directory's safetensors files, and its index if it has one.

    As in transformers, `model.safetensors` takes precedence over an index.

    Raises:
        SourceError: there are no safetensors files, only pickles; a file is damaged; or the index does not match the
            files.
    """
    if (directory / SINGLE).exists():
        return TensorIndex(directory, {SINGLE: read_header(directory / SINGLE)}, None)
    if not (directory / INDEX).exists():
        raise _no_weights_error(directory)
    index = read_json(directory / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{directory / INDEX} has no weight_map that gives the file of each tensor")
    for name, file in weight_map.items():
        # Accept only plain names of files in this directory, so that no file outside it is read.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise SourceError(
                f"{directory / INDEX} places {name!r} in {file!r}, which is not a file name in this directory"
            )
        if not (directory / file).is_file():
            raise SourceError(
                f"{directory / INDEX} names the file {file}, which is missing; fetch the checkpoint again"
            )
    shards = {file: read_header(directory / file) for file in sorted(set(weight_map.values()))}
    file_of: dict[str, str] = {}
    for file, header in shards.items():
        for name in header.tensors:
            if name in file_of:
                raise SourceError(f"tensor {name!r} is in both {file_of[name]} and {file} of {directory}")
            file_of[name] = file
    for name, file in weight_map.items():
        if file_of.get(name, file) != file:
            raise SourceError(
                f"{directory / INDEX} places {name!r} in {file}, but it is in {file_of[name]}; fetch the checkpoint "
                "again"
            )
    absent = tuple(name for name in weight_map if name not in file_of)
    return TensorIndex(directory, shards, index, absent)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        SourceError: the file cannot be read, is not JSON, or does not contain an object.
    """
    try:
        refuse_pointer(path)
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} must contain a JSON object, not {type(value).__name__}")
    return value


def _no_weights_error(directory: Path) -> SourceError:
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    other_files = sorted(file.name for file in directory.glob("*.safetensors"))
    if (directory / ADAPTER_CONFIG).exists():
        return SourceError(f"{directory} is a PEFT adapter without its base model. {MERGE_ADAPTER}")
    if other_files:
        return SourceError(
            f"{directory} has {', '.join(other_files[:3])} but neither {SINGLE} nor {INDEX}; rename the file, or write "
            "an index"
        )
    if pickles:
        return SourceError(
            f"{directory} has its weights in {pickles[0]}, a pickle, which can run code when opened and is therefore "
            "not read. Where you trust it, convert it to safetensors: "
            "AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET)"
        )
    return SourceError(f"{directory} has no safetensors weights ({SINGLE} or {INDEX})")


@dataclass(frozen=True, slots=True)
class BlockPrefix:
    """The prefix of the decoder blocks in tensor names of the form `prefix.N.rest`.

    Attributes:
        prefix: the name before the block number, such as "model.layers" or "transformer.h".
        depth: number of decoder blocks.
        extra: number of further blocks after them that the decoder does not run (multi-token prediction heads).
    """

    prefix: str
    depth: int
    extra: int = 0

    def split(self, name: str) -> tuple[int, str] | None:
        """Split a tensor's name into its block number and the rest; return None if the tensor is not in a block."""
        match = self._pattern.match(name)
        return None if match is None else (int(match[1]), match[2])

    def join(self, block: int, rest: str) -> str:
        """Return the full name of a tensor of a block."""
        return f"{self.prefix}.{block}.{rest}"

    @property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(self.prefix)}\.(0|[1-9][0-9]*)\.(.+)", re.DOTALL)


def find_block_prefix(names: Iterable[str], depth: int, extra: int = 0, prefix: str | None = None) -> BlockPrefix:
    """Find the prefix of the decoder blocks: the one that is followed by every number below the depth.

    Args:
        names: all tensor names.
        depth: number of decoder blocks in the config.
        extra: number of blocks after them that the config declares for other uses.
        prefix: use this prefix instead of searching for one.

    Raises:
        SourceError: there are no blocks, or not as many as the config declares.
        UnsupportedEditError: several prefixes could be the decoder's.
    """
    numbers_by_prefix: dict[str, set[int]] = defaultdict(set)
    for name in names:
        for match in _NUMBERED.finditer(name):
            numbers_by_prefix[name[: match.start()]].add(int(match[1]))
    if prefix is not None:
        numbers_by_prefix = {prefix: numbers_by_prefix.get(prefix, set())}
    # The prefix of a list inside a block, such as a list of experts, contains a number itself.
    outer = {
        candidate: numbers
        for candidate, numbers in numbers_by_prefix.items()
        if not _NUMBERED.search(candidate + ".") or candidate == prefix
    }
    accepted = (set(range(depth)), set(range(depth + extra)))
    matching = [candidate for candidate, numbers in outer.items() if numbers in accepted]
    text = text_paths(candidate for candidate, numbers in outer.items() if len(numbers) > 1)
    if text and prefix is None:  # an encoder of images or sound can be the decoder only if there is no other list
        matching = [candidate for candidate in matching if candidate in text or depth == 1]
    if len(matching) > 1:
        raise UnsupportedEditError(
            f"several lists of {depth} layers could be the decoder: {', '.join(sorted(matching))}; choose one (blocks)"
        )
    if not matching:
        lists = ", ".join(
            f"{candidate}.0 to {candidate}.{max(numbers)} ({len(numbers)})"
            for candidate, numbers in outer.items()
            if len(numbers) > 1
        )
        raise SourceError(
            f"the config declares {depth} layers, but the tensors do not match: found {lists or 'no numbered layers'}. "
            "The checkpoint is incomplete, or its config belongs to another model"
        )
    return BlockPrefix(matching[0], depth, len(numbers_by_prefix[matching[0]]) - depth)


def fingerprint(directory: Path) -> str:
    """Return 16 hexadecimal digits that identify all bytes of the weights and the config in a directory."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        target = path.resolve()
        if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
            content = target.name  # in the Hub cache, the name of such a file is its SHA-256
        else:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()[:16]
