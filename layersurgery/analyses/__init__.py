"""Questions to a model: each function returns a table, and none draws.

>>> import layersurgery as ls
>>> ls.analyses.lens(model, tokens).plot("relative_depth", "lens_kl_nats")  # doctest: +SKIP
>>> ls.analyses.in_words(ls.analyses.stages(model, tokens))  # doctest: +SKIP
"""

from .inference_stages import describe_stages, stages
from .layer_pruning import Pruning, prune
from .layer_ranking import rank
from .layer_signals import attention, lens, measure, norms, similarity
from .neuron_probes import Probe, probe
from .prediction_neurons import neuron_scores, neurons
from .subjoiner_heads import Subjoiners, subjoiners

__all__ = [
    "Probe", "Pruning", "Subjoiners", "attention", "describe_stages", "lens", "measure", "neuron_scores", "neurons", "norms", "probe", "prune", "rank",
    "similarity", "stages", "subjoiners",
]  # fmt: skip
