"""Write the model card of an edited checkpoint: its source model and its edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plans.plan import Plan
from ..plans.route import Route
from ..version import __version__
from .sources import Source

# Metadata of the source that also holds for the edited model.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def model_card(
    source: Source,
    plan: Plan,
    route: Route,
    depth: int,
    *,
    verified: bool,
    healed: Sequence[int] = (),
    notes: Sequence[str] = (),
    sources: Mapping[str, Source] | None = None,
) -> str:
    """Return the text of the output's README.md, with the metadata block that the Hub reads."""
    from huggingface_hub import ModelCardData

    inherited = _read_metadata(source.directory / "README.md")
    base = source.label if source.on_hub else inherited.get("base_model")
    others = [each.label for each in (sources or {}).values() if each.on_hub]
    if base and others:
        base = list(dict.fromkeys([*([base] if isinstance(base, str) else base), *others]))
    # Of the Hub's four relations, the one of models that are put together from layers of others without training.
    metadata: dict[str, Any] = {"base_model": base, "base_model_relation": "merge"} if base else {}
    metadata |= {key: inherited[key] for key in _INHERITED if key in inherited}
    metadata |= {"library_name": "transformers", "tags": ["layersurgery", "model surgery"]}
    check = "passed" if verified else "not run"
    maps = (
        f"{chr(10)}A linear map, fitted by least squares and without training, is folded into the output projection of "
        f"the MLP{chr(10)}of the source's block{'s'[: len(healed) != 1]} {', '.join(map(str, healed))}.{chr(10)}"
        if healed
        else ""
    )
    taken = "".join(
        f"{chr(10)}Blocks marked `@{name}` are those of {_origin(each)}.{chr(10)}"
        for name, each in (sources or {}).items()
    )
    return f"""---
{ModelCardData(**metadata).to_yaml(original_order=list(metadata))}
---

# {source.name}, edited

Made from {_origin(source)} by layersurgery {__version__}. No weight was
trained; the layers were rearranged as follows.

| | |
|---|---|
| plan | {_inline_code(str(plan))} |
| route | {_inline_code(str(route))} |
| blocks | {len(route)}, from {depth} |
| reload check | {check} |

The route lists the blocks of the source model in the order in which this model runs them. Ranges exclude their end.
`-attn` or `-mlp` marks a block whose attention or MLP output projection is set to zero.

{_how_to_undo(route, depth, healed, _name_of(source))}
{taken}{maps}{"".join(f"{chr(10)}{note}{chr(10)}" for note in notes)}"""


def _name_of(source: Source) -> str:
    """Return a checkpoint's name without its path, which is of no use to others and may say who made the model."""
    return source.label if source.on_hub else Path(source.label).expanduser().resolve().name


def _origin(source: Source) -> str:
    """Return a checkpoint's name, and its revision if it has one."""
    return _inline_code(_name_of(source)) + (f" at revision `{source.revision}`" if source.revision else "")


def _how_to_undo(route: Route, depth: int, healed: Sequence[int], origin: str) -> str:
    """Say how to get the source back from the edited checkpoint, or that it cannot be had from it."""
    unchanged = {visit.block: position for position, visit in reversed(list(enumerate(route))) if visit.whole}
    missing = [block for block in range(depth) if block not in unchanged or block in healed]
    if missing:
        return (
            f"To undo it, use {_inline_code(origin)}: this checkpoint does not have the weights of its "
            f"block{'s'[: len(missing) != 1]} {Route(missing)} unchanged."
        )
    order = Route(unchanged[block] for block in range(depth))
    return f"To undo it: `layersurgery reorder DIRECTORY --order '{order}'`"


def _inline_code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`".replace("|", "\\|").replace("\n", " ")


def _read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a model card; return an empty one if the card is missing or cannot be read."""
    if not path.is_file():  # the import below is slow
        return {}
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):
        return {}
