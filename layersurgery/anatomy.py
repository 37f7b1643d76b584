"""What a loaded (or meta-device) transformers model is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from .errors import InexpressibleError

_NOT_TEXT = re.compile(r"vision|visual|audio|image|video|speech|encoder|mtp|qformer|resampler", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class BlockList:
    """The decoder blocks of a model: their dotted path and the `nn.ModuleList` itself."""

    path: str
    blocks: nn.ModuleList


def find_blocks(model: nn.Module, depth: int, kind: type[nn.Module] = nn.Module) -> BlockList:
    """Find the list of decoder blocks: the outermost `nn.ModuleList` that is as long as the config says the model is deep.

    Args:
        model: a transformers model.
        depth: how many blocks it has.
        kind: a class that one of the blocks must have, where it is known.

    Raises:
        InexpressibleError: none or several, with what was found.
    """
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    fitting = [
        path for path, module in lists.items() if len(module) == depth and any(isinstance(block, kind) for block in module)
    ]
    outer = [path for path in fitting if not any(path.startswith(f"{other}.") for other in fitting)]
    if len(outer) > 1:
        outer = [path for path in outer if not _NOT_TEXT.search(path)] or outer
    if len(outer) != 1:
        found = ", ".join(f"{path} ({len(module)})" for path, module in lists.items()) or "none"
        what = f"{len(outer)} lists of {depth} modules" if outer else f"no list of {depth} modules"
        raise InexpressibleError(
            f"{type(model).__name__} has {what} where its decoder blocks are due (module lists: {found}); it cannot be operated on"
        )
    path = outer[0]
    return BlockList(path, lists[path])
