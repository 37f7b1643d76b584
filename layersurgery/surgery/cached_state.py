"""What transformers leaves on a model when it has run, and what would be wrong once the list of blocks is another.

Recorders of hidden states and attentions: transformers puts them on the modules the first time they are asked for, once in a
model's life. A block that joins or rejoins the model later has none, and would be silently missing from
`output_hidden_states`. And the static cache of the last text, which some versions use again, with a row for each old block. Both
are taken off whenever the list changes; transformers makes them anew when it needs them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_FLAG = "_output_capturing_hooks_installed"
_RECORDER = "output_capturing_hook"
_CACHE = "_cache"


def clear_cached_state(model: nn.Module, others: Iterable[nn.Module] = ()) -> None:
    """Take recorders and caches off a model, and recorders off `others`, modules that are about to join it."""
    flagged = []
    for module in model.modules():
        attributes = vars(module)
        if hasattr(attributes.get(_CACHE), "get_seq_length"):
            del attributes[_CACHE]
        if attributes.pop(_FLAG, False):
            flagged.append(module)
    for root in (model, *others) if flagged else ():
        for module in root.modules():
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if getattr(hook, "__name__", "") == _RECORDER]:
                del hooks[key]
