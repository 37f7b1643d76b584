"""Analyses of a model. Each function returns a table and draws nothing.

>>> import layersurgery as ls
>>> model, tokenizer = ls.load("smollm2-135m")
>>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
>>> ls.analyses.lens(model, tokens)[["layer", "lens_kl_nats", "lens_entropy_bits"]].shape
(30, 3)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..sweeps.neuron_scores import neuron_scores
    from .inference_stages import describe_stages
    from .layer_pruning import Pruning
    from .layer_ranking import spans
    from .layer_signals import measure
    from .neuron_probes import Probe, probe
    from .prune_run import prune
    from .rank_run import rank
    from .search_run import Search, search
    from .signals import attention, cka, cosine, lens, neurons, norms, similarity, stages, stream
    from .subjoiner_heads import Subjoiners, subjoiners
    from .word_senses import wic

__all__ = [
    "Probe",
    "Pruning",
    "Search",
    "Subjoiners",
    "attention",
    "cka",
    "cosine",
    "describe_stages",
    "lens",
    "measure",
    "neuron_scores",
    "neurons",
    "norms",
    "probe",
    "prune",
    "rank",
    "search",
    "similarity",
    "spans",
    "stages",
    "stream",
    "subjoiners",
    "wic",
]

# Imported when first asked for: a command's options are checked by modules here that need no torch.
_LAZY = {
    "Probe": ".neuron_probes",
    "Pruning": ".layer_pruning",
    "Search": ".search_run",
    "Subjoiners": ".subjoiner_heads",
    "describe_stages": ".inference_stages",
    "measure": ".layer_signals",
    "neuron_scores": "..sweeps.neuron_scores",
    "probe": ".neuron_probes",
    "prune": ".prune_run",
    "rank": ".rank_run",
    "search": ".search_run",
    "spans": ".layer_ranking",
    "subjoiners": ".subjoiner_heads",
    "wic": ".word_senses",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY.get(name, ".signals"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
