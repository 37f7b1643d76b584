"""Analyses of a model. Each function returns a table and draws nothing.

>>> import layersurgery as ls
>>> model, tokenizer = ls.load("smollm2-135m")
>>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
>>> ls.analyses.lens(model, tokens)[["layer", "lens_kl_nats", "lens_entropy_bits"]].shape
(30, 3)
"""

from .inference_stages import describe_stages, stages
from .layer_pruning import Pruning, prune
from .layer_ranking import rank
from .layer_signals import attention, lens, measure, norms, similarity
from .neuron_probes import Probe, probe
from .prediction_neurons import neuron_scores, neurons
from .subjoiner_heads import Subjoiners, subjoiners

__all__ = [
    "Probe",
    "Pruning",
    "Subjoiners",
    "attention",
    "describe_stages",
    "lens",
    "measure",
    "neuron_scores",
    "neurons",
    "norms",
    "probe",
    "prune",
    "rank",
    "similarity",
    "stages",
    "subjoiners",
]
