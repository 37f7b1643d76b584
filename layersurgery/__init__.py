"""Hook-free surgery on the layers of Hugging Face causal language models.

>>> import layersurgery as ls
>>> plan = ls.swap(12) + ls.drop(20)
>>> str(plan.route(32))
'0:12 13 12 14:20 21:32'
"""

from .checkpoint import Edited, edit_checkpoint
from .errors import InexpressibleError, LayerSurgeryError, OutputError, PlanError, SourceError
from .plan import Plan, drop, move, reorder, repeat, reverse, skip_attention, skip_mlp, swap
from .route import Route, Visit
from .version import __version__

__all__ = [
    "Edited",
    "InexpressibleError",
    "LayerSurgeryError",
    "OutputError",
    "Plan",
    "PlanError",
    "Route",
    "SourceError",
    "Visit",
    "__version__",
    "drop",
    "edit_checkpoint",
    "move",
    "reorder",
    "repeat",
    "reverse",
    "skip_attention",
    "skip_mlp",
    "swap",
]
