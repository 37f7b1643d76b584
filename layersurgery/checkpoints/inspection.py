"""A checkpoint's anatomy from its config and headers alone: what `inspect` and `plan` show."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import SourceError
from ..models.config_fields import is_layerwise, new_positions
from ..plans.route import Route, Span
from .edit_checkpoint import Checkpoint, read_checkpoint
from .output_layout import plan_output_files
from .safetensors_header import TensorInfo
from .sources import find_source, remote_headers
from .tensor_index import TensorIndex, read_tensor_index

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors of one name, dtype and shape: one, or one for each expert (`count` of them, N in the name)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int


@dataclass(frozen=True, slots=True)
class BlockGroup:
    """Neighbouring blocks that are alike.

    Attributes:
        blocks: the range of blocks.
        traits: what the config says of each of them, such as its layer type.
        parameters: of one block.
        nbytes: of one block.
        tensors: of one block.
    """

    blocks: Span
    traits: dict[str, Any]
    parameters: int
    nbytes: int
    tensors: tuple[TensorGroup, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint's anatomy.

    Attributes:
        name: what the model is called.
        architecture: the class that loads it.
        model_type: its type in transformers.
        prefix: what stands before the block number in tensor names.
        depth: number of blocks.
        width: width of the residual stream, if the config names it.
        vocabulary: number of tokens, if the config names it.
        parameters: in all.
        nbytes: in all.
        dtypes: parameters by dtype.
        files: of weights.
        groups: the blocks.
        outside: tensors that belong to no block.
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


def read_for_inspection(model: str, *, revision: str | None = None, blocks: str | None = None) -> Checkpoint:
    """Read a checkpoint's config and headers; for a hub model whose weights are not here, the headers alone are fetched.

    Raises:
        SourceError: not found, not reachable, or damaged.
    """
    source = find_source(model, revision=revision, weights=False)
    try:
        weights = read_tensor_index(source.directory)
    except SourceError:
        if source.revision is None:
            raise
        weights = TensorIndex(source.directory, remote_headers(source), None)
    return read_checkpoint(source, blocks=blocks, weights=weights)


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Describe a checkpoint."""
    inside: dict[int, list[tuple[str, TensorInfo]]] = {}
    outside: list[tuple[str, TensorInfo]] = []
    dtypes: Counter[str] = Counter()
    for name, entry in checkpoint.tensors.tensors():
        dtypes[entry.dtype] += entry.elements
        split = checkpoint.block_prefix.split(name)
        if split is not None and split[0] < checkpoint.depth:
            inside.setdefault(split[0], []).append((split[1], entry))
        else:
            outside.append((name, entry))
    config, fields = checkpoint.config, checkpoint.fields
    return Inspection(
        name=checkpoint.source.label,
        architecture=next(iter(config.get("architectures") or []), "unknown"),
        model_type=str(config.get("model_type", "unknown")),
        prefix=checkpoint.block_prefix.prefix,
        depth=checkpoint.depth,
        width=_first(fields, "hidden_size", "n_embd", "d_model"),
        vocabulary=_first(fields, "vocab_size"),
        parameters=sum(dtypes.values()),
        nbytes=checkpoint.tensors.nbytes,
        dtypes=dict(dtypes),
        files=len(checkpoint.tensors.shards),
        groups=tuple(_groups(checkpoint, inside)),
        outside=_tensor_groups(outside),
    )


def _first(fields: dict[str, Any], *names: str) -> int | None:
    return next((fields[name] for name in names if isinstance(fields.get(name), int)), None)


def _groups(checkpoint: Checkpoint, inside: dict[int, list[tuple[str, TensorInfo]]]) -> Iterable[BlockGroup]:
    fields, depth = checkpoint.fields, checkpoint.depth
    lists = {key: value for key, value in fields.items() if is_layerwise(key, value, depth) and len(value) == depth}
    start = 0
    described = [
        ({key: value[block] for key, value in lists.items()}, _tensor_groups(inside.get(block, [])))
        for block in range(depth)
    ]
    for block in range(1, depth + 1):
        if block < depth and described[block] == described[start]:
            continue
        traits, tensors = described[start]
        entries = [entry for _, entry in inside.get(start, [])]
        yield BlockGroup(
            Span(start, block), traits, sum(e.elements for e in entries), sum(e.nbytes for e in entries), tensors
        )
        start = block


def _tensor_groups(tensors: Iterable[tuple[str, TensorInfo]]) -> tuple[TensorGroup, ...]:
    counted = Counter((_NUMBER.sub("N", name), entry.dtype, entry.shape) for name, entry in tensors)
    return tuple(TensorGroup(*key, count) for key, count in sorted(counted.items()))


@dataclass(frozen=True, slots=True)
class SizeChange:
    """Parameters and bytes of a checkpoint before and after a plan."""

    parameters: int
    nbytes: int
    parameters_after: int
    nbytes_after: int


def size_after(checkpoint: Checkpoint, route: Route) -> SizeChange:
    """What a route makes of a checkpoint's size; a silenced branch keeps its (zero) weights in the file."""
    layout = plan_output_files(
        checkpoint.tensors,
        checkpoint.block_prefix,
        new_positions(route, checkpoint.section),
        lambda place, rest: False,  # noqa: ARG005
    )
    before = [entry for _, entry in checkpoint.tensors.tensors()]
    after = [entry for shard in layout.shards for entry in shard.tensors.values()]
    return SizeChange(
        sum(entry.elements for entry in before),
        sum(entry.nbytes for entry in before),
        sum(entry.elements for entry in after),
        sum(entry.nbytes for entry in after),
    )
