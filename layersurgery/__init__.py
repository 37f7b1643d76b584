"""Hook-free surgery on the layers of Hugging Face causal language models.

>>> import layersurgery as ls
>>> plan = ls.swap(12) + ls.drop(20)
>>> str(plan.route(32))
'0:12 13 12 14:20 21:32'
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import (
    LayerSurgeryError,
    MeasurementError,
    OutputError,
    PlanError,
    SourceError,
    UndoError,
    UnsupportedEditError,
)
from .plans.plan import (
    Plan,
    average,
    drop,
    heads_off,
    insert_copy,
    move,
    neurons_off,
    parallel,
    reorder,
    repeat,
    replace,
    reverse,
    scale,
    skip_attention,
    skip_mlp,
    swap,
    take,
)
from .plans.route import Route
from .plans.visit import Visit
from .version import __version__

if TYPE_CHECKING:
    from . import analyses, tasks
    from .analyses import rank
    from .analyses.analyze import analyze
    from .analyses.heal_linear import heal_linear
    from .analyses.heal_run import TrainedHealing, heal
    from .analyses.layer_pruning import Pruning
    from .analyses.linear_healing import LinearHealing
    from .analyses.prune_run import prune
    from .analyses.search_run import Search, search
    from .checkpoints.edit_checkpoint import EditResult, edit_checkpoint
    from .checkpoints.inspection import inspect
    from .checkpoints.loading import load
    from .models.anatomy import Anatomy, anatomy
    from .models.means import Means
    from .reports.report import Report, report
    from .reports.reproduce import reproduce
    from .repositories.fetch_results import fetch_results
    from .repositories.push import Pushed, push
    from .runs.compare import compare
    from .runs.doctor import doctor
    from .runs.drawing import plot
    from .runs.estimate import estimate
    from .runs.means import measure_means
    from .runs.sweep import sweep
    from .runs.tables import read_results
    from .surgery.fold_norms import FoldResult, fold
    from .surgery.operate import operate, operate_
    from .surgery.save import save
    from .sweeps.compare import Comparison
    from .sweeps.neuron_scores import resolve_neurons
    from .sweeps.results import summary_sentence

__all__ = [
    "Anatomy",
    "Comparison",
    "EditResult",
    "FoldResult",
    "LayerSurgeryError",
    "LinearHealing",
    "Means",
    "MeasurementError",
    "OutputError",
    "Plan",
    "PlanError",
    "Pruning",
    "Pushed",
    "Report",
    "Route",
    "Search",
    "SourceError",
    "TrainedHealing",
    "UndoError",
    "UnsupportedEditError",
    "Visit",
    "__version__",
    "analyses",
    "analyze",
    "anatomy",
    "average",
    "compare",
    "doctor",
    "drop",
    "edit_checkpoint",
    "estimate",
    "fetch_results",
    "fold",
    "heads_off",
    "heal",
    "heal_linear",
    "insert_copy",
    "inspect",
    "load",
    "measure_means",
    "move",
    "neurons_off",
    "operate",
    "operate_",
    "parallel",
    "plot",
    "prune",
    "push",
    "rank",
    "read_results",
    "reorder",
    "repeat",
    "replace",
    "report",
    "reproduce",
    "resolve_neurons",
    "reverse",
    "save",
    "scale",
    "search",
    "skip_attention",
    "skip_mlp",
    "summary_sentence",
    "swap",
    "sweep",
    "take",
    "tasks",
]

# Imported when first asked for, so that plans and `--help` wait for nothing.
_LAZY = {
    "Anatomy": "models.anatomy",
    "Comparison": "sweeps.compare",
    "EditResult": "checkpoints.edit_checkpoint",
    "FoldResult": "surgery.fold_norms",
    "LinearHealing": "analyses.linear_healing",
    "Means": "models.means",
    "Pruning": "analyses.layer_pruning",
    "Pushed": "repositories.push",
    "Report": "reports.report",
    "Search": "analyses.search_run",
    "TrainedHealing": "analyses.heal_run",
    "analyze": "analyses.analyze",
    "anatomy": "models.anatomy",
    "compare": "runs.compare",
    "doctor": "runs.doctor",
    "edit_checkpoint": "checkpoints.edit_checkpoint",
    "estimate": "runs.estimate",
    "fetch_results": "repositories.fetch_results",
    "fold": "surgery.fold_norms",
    "resolve_neurons": "sweeps.neuron_scores",
    "heal": "analyses.heal_run",
    "heal_linear": "analyses.heal_linear",
    "inspect": "checkpoints.inspection",
    "load": "checkpoints.loading",
    "measure_means": "runs.means",
    "operate": "surgery.operate",
    "operate_": "surgery.operate",
    "plot": "runs.drawing",
    "prune": "analyses.prune_run",
    "push": "repositories.push",
    "rank": "analyses",
    "read_results": "runs.tables",
    "report": "reports.report",
    "reproduce": "reports.reproduce",
    "save": "surgery.save",
    "search": "analyses.search_run",
    "summary_sentence": "sweeps.results",
    "sweep": "runs.sweep",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in ("analyses", "tasks"):
        return import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Find names before attributes: nnsight gives every object a `save`, which would hide one not yet imported."""

    @property
    def save(self) -> Any:
        """Return the function."""
        return __getattr__("save")


sys.modules[__name__].__class__ = _Package
