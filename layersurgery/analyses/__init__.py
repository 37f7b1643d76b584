"""Questions to a model: each function returns a table, and none draws.

>>> import layersurgery as ls
>>> ls.analyses.lens(model, tokens).plot("relative_depth", "lens_kl_nats")  # doctest: +SKIP
>>> ls.analyses.in_words(ls.analyses.stages(model, tokens))  # doctest: +SKIP
"""

from .joining import Subjoiners, subjoiners
from .probing import Probe, probe
from .pruning import Pruning, prune
from .questions import attention, lens, norms, similarity
from .ranking import rank
from .signals import measure
from .together import in_words, stages
from .vocabulary import neuron_scores, neurons

__all__ = [
    "Probe", "Pruning", "Subjoiners", "attention", "in_words", "lens", "measure", "neuron_scores", "neurons", "norms", "probe", "prune", "rank",
    "similarity", "stages", "subjoiners",
]  # fmt: skip
