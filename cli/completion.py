"""Complete words at the shell's prompt: models at hand, directories of results, families of edits, plans.

Each function takes what was typed and returns the words that begin with it. If no word does, the shell completes
file names. Nothing here imports torch, so that Tab answers at once.
"""

from __future__ import annotations

from pathlib import Path


def models(incomplete: str) -> list[str]:
    """Return the models of packages and of the Hub's cache."""
    from layersurgery.checkpoints.cached_models import cached_models, packaged_models

    return [name for name in (*packaged_models(), *cached_models()) if name.startswith(incomplete)]


def results(incomplete: str) -> list[str]:
    """Return the directories of results, one and two levels deep, under what was typed."""
    typed = Path(incomplete)
    base = typed if incomplete.endswith("/") else typed.parent
    try:
        found = sorted(path.parent for pattern in ("*/run.json", "*/*/run.json") for path in base.glob(pattern))
    except OSError:
        return []
    start = "./" if incomplete.startswith("./") else ""  # a path leaves it out
    return [f"{start}{path}" for path in found if f"{start}{path}".startswith(incomplete)]


def families(incomplete: str) -> list[str]:
    """Return the families of edits, as the next word of a list with commas."""
    from layersurgery.plans.families import FAMILIES

    chosen, comma, last = incomplete.rpartition(",")
    taken = chosen.split(",")
    return [f"{chosen}{comma}{name}" for name in FAMILIES if name.startswith(last) and name not in taken]


def plans(incomplete: str) -> list[str]:
    """Return the words that an edit of a plan can begin with."""
    import layersurgery.plans.plan  # noqa: F401 - defines the edits
    from layersurgery.plans.edits import VERBS

    before, separator, last = incomplete.rpartition("; ")
    return [f"{before}{separator}{word}" for word in VERBS if word.startswith(last)]
