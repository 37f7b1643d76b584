"""The model card of an edited checkpoint: what it is made from, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..plans.plan import Plan
from ..plans.route import Route
from ..version import __version__
from .sources import Source

# Facts about the source that stay true of the edited model.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def model_card(source: Source, plan: Plan, route: Route, depth: int, *, verified: bool) -> str:
    """README.md of the output, with the metadata block that the hub reads."""
    inherited = _front_matter(source.directory / "README.md")
    base = source.label if source.on_hub else inherited.get("base_model")
    metadata: dict[str, Any] = {"base_model": base} if base else {}
    metadata |= {key: inherited[key] for key in _INHERITED if key in inherited}
    metadata |= {"library_name": "transformers", "tags": ["layersurgery", "model surgery"]}
    at = f" at revision `{source.revision}`" if source.revision else ""
    check = "passed" if verified else "not run"
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}
---

# {source.name}, edited

Made from {_code(source.label)}{at} by layersurgery {__version__}. No weight was
trained; layers were rearranged as follows.

| | |
|---|---|
| plan | {_code(str(plan))} |
| route | {_code(str(route))} |
| blocks | {len(route)}, from {depth} |
| reload check | {check} |

The route lists the source's blocks in the order in which this model runs them; ranges are half-open, and `-attn` or `-mlp` marks a
branch whose output projection is zero.
"""


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`".replace("|", "\\|").replace("\n", " ")


def _front_matter(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    parts = text.split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        metadata = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}
