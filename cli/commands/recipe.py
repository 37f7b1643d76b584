"""Read recipes: YAML files that name several outputs and their plans.

model: EleutherAI/pythia-6.9b-deduped
outputs:
  swapped: swap 12 13
  shallow: drop 20:24
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from layersurgery.errors import PlanError
from layersurgery.plans.plan import Plan


class _Loader(yaml.SafeLoader):
    """Refuse a second entry of the same name; YAML's own loader keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise PlanError(f"two entries are named {repeated!r}; give each its own name")
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> tuple[str | None, dict[str | None, Plan]]:
    """Read a recipe.

    Returns:
        The model that the recipe names, or None; and its plans, by the names of their outputs.

    Raises:
        PlanError: the file cannot be read or is not a recipe; the message says where.
    """
    try:
        recipe = yaml.load(path.read_text("utf-8"), _Loader)
    except OSError as error:
        raise PlanError(f"cannot read the recipe {path}: {error.strerror}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"the recipe {path} is not YAML: {error}") from error
    expected = "it needs 'outputs:', a mapping from names to plans, and may have 'model:'"
    if not isinstance(recipe, dict) or not isinstance(recipe.get("outputs"), dict) or not recipe["outputs"]:
        raise PlanError(f"{path} is not a recipe: {expected}")
    unknown = set(recipe) - {"model", "outputs"}
    if unknown:
        raise PlanError(f"{path}: unknown entry {sorted(map(str, unknown))[0]!r}; {expected}")
    model = recipe.get("model")
    if model is not None and not isinstance(model, str):
        raise PlanError(f"{path}: 'model' must be a string, not {model!r}")
    plans: dict[str | None, Plan] = {}
    for name, text in recipe["outputs"].items():
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise PlanError(f"{path}: the output {name!r} is not a plain directory name")
        if not isinstance(text, str):
            raise PlanError(f"{path}: the plan of {name!r} must be a string such as 'swap 12 13', not {text!r}")
        try:
            plans[name] = Plan.parse(text)
        except PlanError as error:
            raise PlanError(f"{path}, output {name!r}: {error}") from error
    return model, plans
