"""Load the blocks that edits take from other checkpoints, and read the files of these checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlanError, UnsupportedEditError
from ..plans.block_sources import check_sources, taken_blocks
from ..plans.route import Route
from ..units import format_list
from .checkpoint import Checkpoint, read_checkpoint
from .output_layout import OtherFile, TakenTensor, TakenTensors
from .quantization import QUANTIZATION_KEYS
from .safetensors_header import Header
from .sources import Source, find_source

if TYPE_CHECKING:
    from torch import nn

    from ..models.taken_blocks import TakenBlocks

Sources = Mapping[str, Any]
"""Models, or their names ("MODEL" or "MODEL@REVISION"), by the name that plans give them."""
Status = Callable[[str], AbstractContextManager[Any]]


def find_named(model: Any, *, weights: bool = True, trust_remote_code: bool = False) -> Source:
    """Make the files of a source available on this machine.

    Args:
        model: as for `find_source`; a revision follows after @.
        weights: also download the weights.
        trust_remote_code: run the code that comes with the model.

    Raises:
        PlanError: it is no name of a model.
        SourceError: it is not found.
    """
    if not isinstance(model, str | os.PathLike):
        raise PlanError(f"a source is a transformers model or the name of one, not {type(model).__name__}")
    name, at, revision = os.fspath(model).rpartition("@")
    if not at or Path(os.fspath(model)).expanduser().exists():
        name, revision = os.fspath(model), ""
    found = find_source(name, revision=revision or None, weights=weights)
    return replace(found, trust_remote_code=trust_remote_code)


def take_blocks(
    model: nn.Module,
    routes: Iterable[Route],
    sources: Sources | None,
    *,
    blocks: str | None = None,
    trust_remote_code: bool = False,
    status: Status | None = None,
) -> TakenBlocks | None:
    """Take the blocks that routes name from other models; a model that is given by its name is loaded for it.

    Of a loaded source, only the blocks that are taken stay in memory.

    Args:
        model: the model that is edited.
        routes: the routes of the edited models.
        sources: the other models, or their names.
        blocks: path of the list of blocks, if it cannot be found automatically.
        trust_remote_code: run the code that comes with a source.
        status: shows what is being done while a source is loaded.

    Returns:
        The blocks; None if no route takes one.

    Raises:
        PlanError: a source is not given, or no route takes a block of it.
        SourceError: a source cannot be found or loaded.
    """
    given = check_sources(sources)
    numbers = taken_blocks(routes, given)
    if not numbers:
        return None
    import torch

    from ..models.taken_blocks import TakenBlocks
    from .loading import load_weights

    taken = TakenBlocks(model, blocks=blocks)
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), "auto")
    for name, of_source in numbers.items():
        source = given[name]
        if not isinstance(source, torch.nn.Module):
            found = find_named(source, trust_remote_code=trust_remote_code)
            with nullcontext() if status is None else status(f"Loading {found.label}"):
                source = load_weights(found, dtype=dtype)
        taken.take(name, source, of_source)
    return taken


@dataclass(frozen=True, slots=True)
class OtherCheckpoint:
    """Hold a checkpoint of which an edit takes blocks.

    Attributes:
        name: its name in the plan.
        checkpoint: its files.
        blocks: the numbers of the blocks.
    """

    name: str
    checkpoint: Checkpoint
    blocks: tuple[int, ...]


def read_others(route: Route, sources: Sources | None, *, blocks: str | None = None) -> tuple[OtherCheckpoint, ...]:
    """Find the checkpoints that a route takes blocks of, and read their headers.

    Args:
        route: the route.
        sources: the names of the models, by the name of the source.
        blocks: prefix of the decoder blocks' tensors, if it cannot be found automatically.

    Raises:
        PlanError: a source is not given, or the route takes no block of it.
        SourceError: a source cannot be found or read.
    """
    given = check_sources(sources)
    return tuple(
        OtherCheckpoint(name, read_checkpoint(find_named(given[name]), blocks=blocks), tuple(numbers))
        for name, numbers in taken_blocks([route], given).items()
    )


def taken_tensors(checkpoint: Checkpoint, route: Route, others: Iterable[OtherCheckpoint]) -> TakenTensors:
    """Find the bytes of the blocks that a route takes, in the files of the other checkpoints.

    Args:
        checkpoint: the checkpoint that is edited.
        route: the route.
        others: the other checkpoints.

    Raises:
        UnsupportedEditError: a block has other tensors than the one whose place it takes, another data type, or other
            settings of quantization.
    """
    own = _tensors_of_blocks(checkpoint, None)
    found: dict[tuple[str, int], dict[str, TakenTensor]] = {}
    for other in others:
        name = other.name
        if _quantization(checkpoint) != _quantization(other.checkpoint):
            raise UnsupportedEditError(
                f"blocks cannot be taken from {name}: the settings of quantization in config.json differ from those of "
                "the model; take them from a checkpoint in the same format"
            )
        tensors = _tensors_of_blocks(other.checkpoint, other.blocks)
        for block in other.blocks:
            if block >= other.checkpoint.depth:
                raise UnsupportedEditError(
                    f"block {block} cannot be taken from {name}, which has {other.checkpoint.depth} blocks, 0 to "
                    f"{other.checkpoint.depth - 1}"
                )
            _check_tensors(name, block, own[block], tensors[block])
            found[name, block] = {
                rest: TakenTensor(file, header.data_offset + header.tensors[full].start)
                for rest, (full, file, header) in tensors[block].items()
            }
    return {position: found[visit.source, visit.block] for position, visit in enumerate(route) if visit.source}


_Found = dict[str, tuple[str, OtherFile, Header]]


def _tensors_of_blocks(checkpoint: Checkpoint, blocks: Iterable[int] | None) -> dict[int, _Found]:
    """Return for each block, by the name within the block, a tensor's name, its file and the file's header."""
    tensors = checkpoint.tensors
    found: dict[int, _Found] = {block: {} for block in (range(checkpoint.depth) if blocks is None else blocks)}
    for file, header in tensors.shards.items():
        place = OtherFile(tensors.directory / file, header.file_identity)
        for full in header.tensors:
            split = checkpoint.block_prefix.split(full)
            if split is not None and split[0] in found:
                found[split[0]][split[1]] = full, place, header
    return found


def _check_tensors(name: str, block: int, own: _Found, other: _Found) -> None:
    """Refuse a block whose tensors differ in names, shapes or data types."""
    refusal = f"block {block} cannot be taken from {name}"
    if own.keys() != other.keys():
        only, has = next(
            (sorted(names), has)
            for names, has in ((own.keys() - other.keys(), "the model"), (other.keys() - own.keys(), "the source"))
            if names
        )
        raise UnsupportedEditError(f"{refusal}: only {has} has {format_list(only)}")
    for rest in sorted(own):
        infos = [header.tensors[full] for full, _, header in (own[rest], other[rest])]
        shapes, dtypes = [info.shape for info in infos], [info.dtype for info in infos]
        if shapes[0] != shapes[1]:
            raise UnsupportedEditError(
                f"{refusal}: {rest} is {tuple(shapes[0])} in the model, and {tuple(shapes[1])} in the source"
            )
        if dtypes[0] != dtypes[1]:
            raise UnsupportedEditError(
                f"{refusal}: {rest} is {dtypes[0]} in the model, and {dtypes[1]} in the source; save one of "
                "them in the data type of the other first (load it with dtype=..., then save)"
            )


def _quantization(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings of quantization in config.json, without those that are empty."""
    return {
        key: fields[key]
        for fields in (checkpoint.config, checkpoint.fields)
        for key in QUANTIZATION_KEYS & fields.keys()
        if fields[key]
    }


def check_taken(model: nn.Module, others: Iterable[OtherCheckpoint], path: str) -> None:
    """Refuse blocks of other checkpoints that would compute something else in the model.

    Args:
        model: the model that the edited checkpoint's source is loaded as, without memory for its weights.
        others: the other checkpoints.
        path: path of the list of blocks.

    Raises:
        UnsupportedEditError: says what differs.
    """
    from ..models.block_list import find_decoder_blocks, text_config
    from ..models.meta_model import build_meta_model
    from ..models.taken_blocks import check_block

    own = find_decoder_blocks(model, path).blocks
    for other in others:
        built = build_meta_model(other.checkpoint.config)
        blocks = find_decoder_blocks(built, path).blocks
        for block in other.blocks:
            check_block(other.name, block, own[block], blocks[block], text_config(model), text_config(built))
