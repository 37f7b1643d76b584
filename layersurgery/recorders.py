"""transformers' own recorders of hidden states and attentions, which it puts on a model's modules the first time they are asked for.

It does so once in a model's life. A block that joins or rejoins the model later has none, and would be silently missing from
`output_hidden_states`. So they are taken off whenever the list changes, and transformers puts them on anew when asked again.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_FLAG = "_output_capturing_hooks_installed"
_RECORDER = "output_capturing_hook"


def forget_recorders(model: nn.Module, others: Iterable[nn.Module] = ()) -> None:
    """Take the recorders off a model and off `others`, modules that are about to join it."""
    flagged = [module for module in model.modules() if vars(module).get(_FLAG)]
    if not flagged:
        return
    for module in flagged:
        vars(module).pop(_FLAG)
    for root in (model, *others):
        for module in root.modules():
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if getattr(hook, "__name__", "") == _RECORDER]:
                del hooks[key]
