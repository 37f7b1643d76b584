"""Load the blocks that edits take from other checkpoints, and read the files of these checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..plans.block_sources import check_sources, taken_blocks
from ..plans.route import Route
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
