"""Clear the state that transformers keeps on a model after a run and that is wrong for another list of blocks.

There are two kinds of such state. transformers installs recorders of hidden states and attentions on the modules
once, when they are first requested. A block that is added later has no recorder, and would be missing from
`output_hidden_states` without an error. Some versions also keep the static cache of the last text, which has one row
for each old block. Both are removed whenever the list of blocks changes; transformers creates them again when it
needs them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_FLAG = "_output_capturing_hooks_installed"
_RECORDER = "output_capturing_hook"
_CACHE = "_cache"


def clear_cached_state(model: nn.Module, others: Iterable[nn.Module] = ()) -> None:
    """Remove recorders and caches from a model, and recorders from `others`, modules that will be added to it."""
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
