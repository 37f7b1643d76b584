"""Analyses of a model. Each function returns a table and draws nothing.

>>> import layersurgery as ls
>>> model, tokenizer = ls.load("smollm2-135m")
>>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
>>> ls.analyses.lens(model, tokens)[["layer", "lens_kl_nats", "lens_entropy_bits"]].shape
(30, 3)
"""

from ..sweeps.neuron_scores import neuron_scores
from . import inference_stages, layer_signals, prediction_neurons, stream_signals
from .analyze import on_any_text
from .inference_stages import describe_stages
from .layer_pruning import Pruning
from .layer_ranking import spans
from .layer_signals import measure
from .neuron_probes import Probe, probe
from .prune_run import prune
from .rank_run import rank
from .search_run import Search, search
from .subjoiner_heads import Subjoiners, subjoiners
from .word_senses import wic

attention = on_any_text("attention", layer_signals.attention, measure)
cka = on_any_text("cka", stream_signals.cka, measure)
cosine = on_any_text("cosine", stream_signals.cosine, measure)
lens = on_any_text("lens", layer_signals.lens, measure)
neurons = on_any_text("neurons", prediction_neurons.neurons)
norms = on_any_text("norms", layer_signals.norms, measure)
similarity = on_any_text("similarity", layer_signals.similarity, measure)
stages = on_any_text("stages", inference_stages.stages)
stream = on_any_text("stream", stream_signals.stream, measure)

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
