"""Find what a block reads of an earlier block, and refuse a route on which it would read that of another.

Two things are read: the tokens that an indexer selected (`indexer_types`), and keys and values (`kv_source_layers`,
`num_kv_shared_layers`). A model does not hand them on by the number of a block: a block gets what was written last
before it, of its kind. A checkpoint of the edited model does the same. So an edit is right if the last writer before
each reader is the block that it reads in the original model. Plain dictionaries; no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UnsupportedEditError
from ..plans.route import Route
from ..plans.visit import Visit

# Their blocks can be without an indexer, and the config class derives which ones. The names include those of the
# classes around the text model, since a config need not repeat the type in its text section.
_INDEXED = frozenset(
    [
        "glm5_next",
        "glm5_next_text",
        "glm_moe_dsa",
        "hy_v4",
        "hy_v4_vl",
        "hy_v4_vl_text",
        "mistral_large4",
        "mistral_large4_text",
    ]
)
# In these, a block with an indexer hands its selection to the next block only, and no other block hands one on.
_NEXT_ONLY = frozenset(("glm5_next", "glm5_next_text"))

DEPENDENCY_FIELDS = (
    "indexer_types",
    "kv_source_layers",
    "layer_types",
    "no_rope_layers",
    "num_hidden_layers",
    "num_kv_shared_layers",
)


@dataclass(frozen=True, slots=True)
class Dependency:
    """Describe one kind of value that blocks read of earlier blocks.

    Attributes:
        reads: what a block does with the values of another, with a place for its number.
        field: the field of the config that says so.
        sources: for each block, the block whose values it reads: its own number if it writes them, None if it neither
            reads nor writes any.
        kinds: for each block, the kind of its values; a block reads those of its kind.
        reach: the blocks that can read the values: those after the writer up to the next one ("all"), only as long as
            every attention between them runs ("passed"), or only the one directly after it ("next").
    """

    reads: str
    field: str
    sources: tuple[int | None, ...]
    kinds: tuple[object, ...]
    reach: Literal["all", "passed", "next"] = "all"


def find_dependencies(fields: dict[str, Any]) -> Iterator[Dependency]:
    """Find what the blocks of a model read of each other.

    Args:
        fields: the text decoder's section of the config, with the model type.

    Raises:
        UnsupportedEditError: the config does not contain the list that says it.
    """
    model_type, types = fields.get("model_type"), fields.get("layer_types")
    indexers, keys = fields.get("indexer_types"), fields.get("kv_source_layers")
    if indexers is None and model_type in _INDEXED:
        raise UnsupportedEditError(
            f"{model_type}: add indexer_types to config.json, one for each layer, so that the edit can follow it"
        )
    if indexers and "shared" in indexers:
        reach: Literal["passed", "next"] = "next" if model_type in _NEXT_ONLY else "passed"
        sources: list[int | None] = []
        for block, indexer in enumerate(indexers):
            has_none = types and types[block : block + 1] == ["linear_attention"]
            sources.append((sources[-1] if sources else None) if indexer == "shared" else None if has_none else block)
        reads = "attends to the tokens that block {} selects"
        yield Dependency(reads, "indexer_types", tuple(sources), (None,) * len(sources), reach)
    if keys and any(source != block for block, source in enumerate(keys)):
        read = {source for block, source in enumerate(keys) if source != block}
        owners = tuple(source if source != block or block in read else None for block, source in enumerate(keys))
        interval = fields.get("no_rope_layer_interval") or 4  # as the config class derives the list
        kinds = tuple(fields.get("no_rope_layers") or [int((block + 1) % interval != 0) for block in range(len(keys))])
        yield Dependency("uses the keys of block {}", "kv_source_layers", owners, kinds)
    count, depth = fields.get("num_kv_shared_layers"), fields.get("num_hidden_layers")
    if count and depth and types and len(types) >= depth:
        yield Dependency(
            "uses the keys of block {}",
            "num_kv_shared_layers",
            _last_of_types(types[:depth], depth - count),
            tuple(types),
        )


def _last_of_types(types: Sequence[object], first_reader: int) -> tuple[int | None, ...]:
    """Return the sources of blocks that all read, from a number on, the last block of their type before it."""
    writers = {kind: block for block, kind in enumerate(types[:first_reader])}
    return tuple(
        writers.get(kind) if block >= first_reader or writers[kind] == block else None
        for block, kind in enumerate(types)
    )


def blocks_read_by(block: int, fields: dict[str, Any]) -> list[int]:
    """Return the earlier blocks whose values a block reads, in order."""
    sources = {dependency.sources[block] for dependency in find_dependencies(fields)}
    return sorted(source for source in sources if source not in (None, block))


def refuse_other_sources(fields: dict[str, Any], route: Route, *, live: bool = False) -> None:
    """Refuse a route on which a block would read the values of another block than in the original model.

    Args:
        fields: the text decoder's section of the config, with the model type.
        route: the new order.
        live: whether the edit changes a model in memory, where a skipped attention hands nothing on. In files, its
            output is zero, but it selects tokens and has keys as before.

    Raises:
        UnsupportedEditError: names both blocks.
    """
    for dependency in find_dependencies(fields):
        last: dict[object, int | None] = {}
        for visit in route:
            if visit.block >= len(dependency.sources):
                continue
            attends = visit.attention or visit.start
            source, kind = dependency.sources[visit.block], dependency.kinds[visit.block]
            runs = attends or not live
            if attends and source not in (None, visit.block, last.get(kind)):
                found = "none" if last.get(kind) is None else f"those of block {last[kind]}"
                skipped = live and any(not visit.attention and not visit.start for visit in route)
                raise UnsupportedEditError(
                    f"{fields.get('model_type')}: block {visit.block} {dependency.reads.format(source)} "
                    f"({dependency.field}), and on {route} it would get {found}; keep these blocks "
                    f"{'next to each other' if dependency.reach == 'next' else 'together'}"
                    + (", or skip the attention in the checkpoint (edit_checkpoint)" if skipped else "")
                )
            if source == visit.block:
                last[kind] = visit.block if runs else None
            elif dependency.reach == "next" or (dependency.reach == "passed" and not runs):
                last[kind] = None


def refuse_block_by_block(fields: dict[str, Any], route: Route) -> None:
    """Refuse a route that would read keys of another run, if its blocks are called one by one after the unedited model.

    Blocks store their keys in one place for all routes. They stay those of the unedited model if every block that
    stores some comes before the edit.

    Args:
        fields: the text decoder's section of the config, with the model type.
        route: the new order.

    Raises:
        UnsupportedEditError: names the last block that stores keys.
    """
    same = next((position for position, visit in enumerate(route) if visit != Visit(position)), len(route))
    for dependency in find_dependencies(fields):
        writers = [block for block, source in enumerate(dependency.sources) if source == block]
        if dependency.reach == "all" and writers and same <= writers[-1]:
            raise UnsupportedEditError(
                f"{fields.get('model_type')}: blocks use the keys of block {writers[-1]} ({dependency.field}), so a "
                f"sweep, which calls blocks one by one, can measure only edits of the blocks after it; measure {route} "
                "with compare"
            )


def rewrite_sources(sources: Sequence[int], order: Sequence[int]) -> list[int]:
    """Return a list of the layers whose values each layer reads, for a new order of blocks."""
    last: dict[int, int] = {}
    rewritten = []
    for position, block in enumerate(order):
        if sources[block] == block:
            last[block] = position
        rewritten.append(last.get(sources[block], position))
    return rewritten
