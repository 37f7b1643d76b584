"""Write the model card of an edited checkpoint: its source model and its edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plans.plan import Plan
from ..plans.route import Route
from ..version import __version__
from .model_packages import PACKAGED
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
    measured: Mapping[str, str] | None = None,
) -> str:
    """Return the text of the output's README.md, with the metadata block that the Hub reads.

    Args:
        source: the model that was edited.
        plan: the edits.
        route: the source's blocks in their new order.
        depth: number of blocks of the source.
        verified: whether the reload check was run.
        healed: the source's blocks into which a linear map was folded.
        notes: what users of the result should know.
        sources: the other checkpoints that blocks are taken from.
        measured: what the measurement that chose the edits says of the result, in rows of a table.
    """
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

{_measured(measured or {})}{_how_to_undo(route, depth, healed, _name_of(source))}
{taken}{maps}{"".join(f"{chr(10)}{note}{chr(10)}" for note in notes)}"""


def _measured(rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    return (
        f"## What was measured\n\n| | |\n|---|---|\n{table}\n\nThe edits were chosen by this measurement, so on other "
        "text they cost somewhat more. Errors are standard errors over sequences.\n\n"
    )


def _name_of(source: Source) -> str:
    """Return a checkpoint's name without its path, which is of no use to others and may say who made the model."""
    return _own_name(source, source.label)


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


def healed_card(source: Source | None, name: str, label: str, base: str | None, rows: Mapping[str, str]) -> str:
    """Return the text of the README.md of a checkpoint that was trained after an edit.

    Args:
        source: the edited checkpoint; None for a loaded model.
        name: name of the output.
        label: name of the edited model.
        base: Hub ID of the teacher; None if it has none.
        rows: what is said of the training.
    """
    from huggingface_hub import ModelCardData

    inherited = {} if source is None else _read_metadata(source.directory / "README.md")
    base = source.label if source is not None and source.on_hub else inherited.get("base_model") or base
    metadata: dict[str, Any] = {"base_model": base, "base_model_relation": "finetune"} if base else {}
    metadata |= {key: inherited[key] for key in _INHERITED if key in inherited}
    metadata |= {"library_name": "transformers", "tags": ["layersurgery", "model surgery"]}
    table = "\n".join(f"| {key} | {_inline_code(value)} |" for key, value in rows.items())
    return f"""---
{ModelCardData(**metadata).to_yaml(original_order=list(metadata))}
---

# {name}, healed by training

Trained by layersurgery {__version__} from {_inline_code(_own_name(source, label))} to predict like its teacher.

| | |
|---|---|
{table}
{"" if source is None else _earlier_card(source, inherited)}"""


def _own_name(source: Source | None, label: str) -> str:
    """Return a name without the whole path, which is of no use to others and may say who made the model."""
    return label if source is None or source.on_hub else Path(label).expanduser().resolve().name


def _earlier_card(source: Source, metadata: dict[str, Any]) -> str:
    """Return what the edited checkpoint's card says of the edit, under a heading; empty if it says nothing of one."""
    if "layersurgery" not in (metadata.get("tags") or ()):
        return ""
    text = (source.directory / "README.md").read_text("utf-8").split("---", 2)[-1].strip()
    return f"\n## Before the training\n\n{text.replace('# ', '### ', 1)}\n"


def _inline_code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`".replace("|", "\\|").replace("\n", " ")


def is_of_package(model: str) -> bool:
    """Return whether a model is one that Python packages contain, or by its card an edited copy of one on this disk."""
    if model in PACKAGED:
        return True
    card = Path(model).expanduser() / "README.md"
    metadata = _read_metadata(card)
    base = metadata.get("base_model")
    return "layersurgery" in (metadata.get("tags") or ()) and base in [each.origin for each in PACKAGED.values()]


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
