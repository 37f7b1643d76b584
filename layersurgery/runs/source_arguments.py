"""Say which other checkpoints the edits of a run take blocks of, by what a resumed run recognizes them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..checkpoints.block_sources import find_named
from ..checkpoints.tensor_index import fingerprint
from ..plans.block_sources import check_sources
from .model_fingerprint import model_fingerprint
from .options import RunOptions


def source_arguments(options: RunOptions) -> dict[str, Any]:
    """Return the name, the revision and the fingerprint of the weights of each source, by its name in plans.

    Raises:
        PlanError: the sources are no models by name.
        SourceError: a source cannot be found.
    """
    return {name: _describe(source) for name, source in check_sources(options.sources).items()}


def _describe(source: Any) -> dict[str, Any]:
    if isinstance(source, nn.Module):
        label = str(getattr(getattr(source, "config", None), "name_or_path", "") or type(source).__name__)
        return {"name": label, "revision": None, "weights": model_fingerprint(source)}
    found = find_named(source)
    return {"name": found.label, "revision": found.revision, "weights": fingerprint(found.directory)}
