"""Name the checkpoints that blocks are taken from: `base=MODEL[@revision]`, and which of them some routes use."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import PlanError
from .edits import nearest_word
from .route import Route
from .visit import source_name

_GIVE = "--source {0}=MODEL on the command line, sources={{'{0}': model}} in Python"


def read_sources(words: Iterable[str]) -> dict[str, str]:
    """Read sources as the command line gives them.

    Args:
        words: each a name, = and a model, such as "base=org/model@main".

    Raises:
        PlanError: a word is not such a text, or gives a name twice.

    Example:
        >>> from layersurgery.plans.block_sources import read_sources
        >>> read_sources(["base=org/model@main"])
        {'base': 'org/model@main'}
    """
    sources: dict[str, str] = {}
    for word in words:
        name, equals, model = word.partition("=")
        if not equals or not model:
            raise PlanError(f"a source is given as NAME=MODEL or NAME=MODEL@REVISION, not as {word!r}")
        if source_name(name) in sources:
            raise PlanError(f"the source {name} is given twice; give each another name")
        sources[name] = model
    return sources


def taken_blocks(routes: Iterable[Route], sources: Collection[str]) -> dict[str, list[int]]:
    """Return the blocks that routes take from each source, in order.

    Args:
        routes: the routes.
        sources: the names of the sources that are given.

    Raises:
        PlanError: a route names a source that is not given, or none takes a block of a given one.
    """
    taken: dict[str, set[int]] = {}
    for route in routes:
        for visit in route:
            if visit.source:
                taken.setdefault(visit.source, set()).add(visit.block)
    for name in taken:
        check_name(name, sources)
    if unused := [name for name in sources if source_name(name) not in taken]:
        raise PlanError(
            f"no edit takes a block of the source {unused[0]}; leave it out, or take one: 'take 12 from {unused[0]}'"
        )
    return {name: sorted(blocks) for name, blocks in taken.items()}


def check_name(name: str, sources: Collection[str]) -> None:
    """Check that a source is given.

    Raises:
        PlanError: it is not; says which are, and how to give one.
    """
    if name not in sources:
        near = nearest_word(name, sources)
        given = f"given are {', '.join(sources)}" if sources else "none is given"
        raise PlanError(
            f"a block is taken from {name}, and no source has this name; "
            f"{f'did you mean {near}?' if near else f'{given}.'} Give it with {_GIVE.format(name)}"
        )


def check_sources(sources: Any) -> dict[str, Any]:
    """Return sources by name; an empty dictionary for none.

    Args:
        sources: models by name, or texts as `read_sources` reads them.

    Raises:
        PlanError: it is not a mapping, or a name is none.
    """
    if sources is None:
        return {}
    if isinstance(sources, list | tuple):
        return dict(read_sources(map(str, sources)))
    if not isinstance(sources, Mapping):
        raise PlanError(f"sources is a dictionary of models by name, such as {{'base': model}}, not {sources!r}")
    return {source_name(name): model for name, model in sources.items()}
