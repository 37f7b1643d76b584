"""Describe a checkpoint's blocks, tensors and size from its config and its headers alone, for `inspect` and `plan`."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import SourceError
from ..models.config_fields import is_layerwise, new_positions
from ..plans.route import Route, Span
from .checkpoint import Checkpoint, read_checkpoint
from .output_layout import plan_output_files
from .safetensors_header import TensorInfo
from .sources import find_source, remote_headers
from .tensor_index import TensorIndex, read_tensor_index

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors that share name, dtype and shape: one, or `count` of them (one per expert), with N in the name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int


@dataclass(frozen=True, slots=True)
class BlockGroup:
    """Consecutive blocks that have the same config values and tensor shapes.

    Attributes:
        blocks: the range of blocks.
        traits: the per-layer values of the config, such as the layer type.
        parameters: number of parameters of one block.
        nbytes: size of one block in bytes.
        tensors: the tensors of one block.
    """

    blocks: Span
    traits: dict[str, Any]
    parameters: int
    nbytes: int
    tensors: tuple[TensorGroup, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """The structure and the size of a checkpoint.

    Attributes:
        name: Hub ID or path of the model.
        architecture: name of the class that loads it.
        model_type: its model type in transformers.
        prefix: the name before the block number in tensor names.
        depth: number of blocks.
        width: width of the residual stream; None if the config does not contain it.
        vocabulary: number of tokens of the vocabulary; None if the config does not contain it.
        parameters: number of parameters of the whole checkpoint.
        nbytes: size of all tensors in bytes.
        dtypes: number of parameters by dtype.
        files: number of safetensors files.
        groups: the blocks, in groups of equal blocks.
        outside: tensors that are not in a block.
    """

    name: str
    architecture: str
    model_type: str
    prefix: str
    depth: int
    width: int | None
    vocabulary: int | None
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    files: int
    groups: tuple[BlockGroup, ...]
    outside: tuple[TensorGroup, ...]


def read_for_inspection(
    model: str | os.PathLike[str], *, revision: str | None = None, blocks: str | None = None
) -> Checkpoint:
    """Read a checkpoint's config and headers; if the weights are only on the Hub, fetch their headers alone.

    The arguments and errors are those of `inspect`.
    """
    source = find_source(model, revision=revision, weights=False)
    try:
        tensors = read_tensor_index(source.directory)
    except SourceError:
        if source.revision is None:
            raise
        tensors = TensorIndex(source.directory, remote_headers(source), None)
    return read_checkpoint(source, blocks=blocks, tensors=tensors)


def inspect(model: str | os.PathLike[str], *, revision: str | None = None, blocks: str | None = None) -> Inspection:
    """Describe a model's blocks and tensors, read from its config and file headers alone.

    Args:
        model: Hub ID, local directory, `.gguf` file, or "smollm2-135m".
        revision: branch, tag or commit on the Hub.
        blocks: prefix of the decoder blocks' tensors, if it cannot be found automatically ("model.layers").

    Raises:
        SourceError: the model is not found, the Hub cannot be reached, or a file is damaged.
        UnsupportedEditError: several lists of layers could be the decoder.

    Example:
        >>> import layersurgery as ls
        >>> ls.inspect("smollm2-135m").depth
        30
    """
    return inspect_checkpoint(read_for_inspection(model, revision=revision, blocks=blocks))


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Describe the structure and the size of a checkpoint."""
    by_block: dict[int, list[tuple[str, TensorInfo]]] = {}
    outside: list[tuple[str, TensorInfo]] = []
    dtypes: Counter[str] = Counter()
    for name, info in checkpoint.tensors.tensors():
        dtypes[info.dtype] += info.elements
        split = checkpoint.block_prefix.split(name)
        if split is not None and split[0] < checkpoint.depth:
            by_block.setdefault(split[0], []).append((split[1], info))
        else:
            outside.append((name, info))
    config, fields = checkpoint.config, checkpoint.fields
    return Inspection(
        name=checkpoint.source.label,
        architecture=next(iter(config.get("architectures") or []), "unknown"),
        model_type=str(config.get("model_type", "unknown")),
        prefix=checkpoint.block_prefix.prefix,
        depth=checkpoint.depth,
        width=_first_integer(fields, "hidden_size", "n_embd", "d_model"),
        vocabulary=_first_integer(fields, "vocab_size"),
        parameters=sum(dtypes.values()),
        nbytes=checkpoint.tensors.nbytes,
        dtypes=dict(dtypes),
        files=len(checkpoint.tensors.shards),
        groups=tuple(_group_blocks(checkpoint, by_block)),
        outside=_group_tensors(outside),
    )


def _first_integer(fields: dict[str, Any], *names: str) -> int | None:
    return next((fields[name] for name in names if isinstance(fields.get(name), int)), None)


def _group_blocks(checkpoint: Checkpoint, by_block: dict[int, list[tuple[str, TensorInfo]]]) -> Iterable[BlockGroup]:
    fields, depth = checkpoint.fields, checkpoint.depth
    lists = {key: value for key, value in fields.items() if is_layerwise(key, value, depth) and len(value) == depth}
    start = 0
    descriptions = [
        ({key: value[block] for key, value in lists.items()}, _group_tensors(by_block.get(block, [])))
        for block in range(depth)
    ]
    for block in range(1, depth + 1):
        if block < depth and descriptions[block] == descriptions[start]:
            continue
        traits, tensors = descriptions[start]
        infos = [info for _, info in by_block.get(start, [])]
        yield BlockGroup(
            Span(start, block),
            traits,
            sum(info.elements for info in infos),
            sum(info.nbytes for info in infos),
            tensors,
        )
        start = block


def _group_tensors(tensors: Iterable[tuple[str, TensorInfo]]) -> tuple[TensorGroup, ...]:
    counts = Counter((_NUMBER.sub("N", name), info.dtype, info.shape) for name, info in tensors)
    return tuple(TensorGroup(*key, count) for key, count in sorted(counts.items()))


@dataclass(frozen=True, slots=True)
class SizeChange:
    """Number of parameters and bytes of a checkpoint before and after an edit."""

    parameters: int
    nbytes: int
    parameters_after: int
    nbytes_after: int


def size_after(checkpoint: Checkpoint, route: Route) -> SizeChange:
    """Compute the size of a checkpoint after an edit.

    A zeroed branch still counts, because its zeros stay in the file.
    """
    layout = plan_output_files(
        checkpoint.tensors,
        checkpoint.block_prefix,
        new_positions(route, checkpoint.section),
        changed={},
    )
    before = [info for _, info in checkpoint.tensors.tensors()]
    after = [info for shard in layout.shards for info in shard.tensors.values()]
    return SizeChange(
        sum(info.elements for info in before),
        sum(info.nbytes for info in before),
        sum(info.elements for info in after),
        sum(info.nbytes for info in after),
    )
