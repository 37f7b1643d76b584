"""Tensor names in files, matched with the parameters of the model that loads them.

The two differ where transformers renames, merges or splits tensors on loading; its own conversion rules say how.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..errors import UnsupportedEditError
from ..models.meta_model import silence_transformers
from .tensor_index import BlockPrefix

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The tensors of each block, by the parameter they become.

    Attributes:
        tensors: block -> parameter within the block's module -> names within the block in the files.
        cut: patterns of parameters that are cut out of a larger tensor of the files, and share it with others.
    """

    tensors: Mapping[int, Mapping[str, tuple[str, ...]]]
    merged: frozenset[str]

    def names(self, block: int, parameter: str) -> tuple[str, ...]:
        """The tensors that hold one parameter of a block, and nothing else; none if there are no such tensors."""
        if any(re.search(pattern, parameter) for pattern in self.merged):
            return ()
        return self.tensors.get(block, {}).get(parameter, ())


def match_names(model: nn.Module, path: str, prefix: BlockPrefix, names: Iterable[str]) -> TensorNames:
    """Match the names of a checkpoint's tensors with the blocks at `path` of the model that loads it.

    Raises:
        UnsupportedEditError: the files number the blocks otherwise than the model does.
    """
    rename, cut = _conversion(model)
    alike: dict[tuple[int, str], list[str]] = defaultdict(list)
    for name in names:
        split = prefix.split(name)
        if split is not None and split[0] < prefix.depth:
            # Experts differ by a number only; one of them tells for all.
            alike[split[0], _NUMBER.sub("N", split[1])].append(split[1])
    tensors: dict[int, dict[str, tuple[str, ...]]] = defaultdict(dict)
    inside = re.compile(rf"(?:^|\.){re.escape(path)}\.(\d+)\.(.+)$")

    def loaded_as(block: int, rest: str) -> str:
        match = inside.search(rename(prefix.join(block, rest)))
        if match is not None and int(match[1]) != block:
            raise UnsupportedEditError(
                f"{prefix.join(block, rest)} is loaded as a part of block {match[1]}: the files of {type(model).__name__} number their "
                "blocks otherwise than the model does, so they cannot be renamed"
            )
        return rest if match is None else match[2]

    for (block, _), rests in alike.items():
        first = loaded_as(block, rests[0])
        apart = _NUMBER.search(f".{first}.") is not None  # the model, too, has a parameter for each expert
        for rest in rests:
            parameter = loaded_as(block, rest) if apart else first
            tensors[block][parameter] = (*tensors[block].get(parameter, ()), rest)
    for block in range(prefix.depth):
        if not any(inside.search(rename(prefix.join(block, rest))) for rest in _some(alike, block)):
            raise UnsupportedEditError(
                f"no tensor at {prefix.prefix}.{block} is loaded into {path}.{block} of {type(model).__name__}: the files hold another "
                "stack there, or the model renames it in a way that is not followed"
            )
    return TensorNames(tensors, cut)


def _some(alike: Mapping[tuple[int, str], list[str]], block: int) -> Iterable[str]:
    return (rests[0] for (number, _), rests in alike.items() if number == block)


def _conversion(model: nn.Module) -> tuple[Callable[[str], str], frozenset[str]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    with silence_transformers():
        rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = dict.fromkeys(model.state_dict(), True)
    prefix = getattr(model, "base_model_prefix", "")
    cut = frozenset(
        re.escape(pattern).replace(r"\*", ".*")
        for rule in converters
        if len(rule.target_patterns) > 1
        for pattern in rule.target_patterns
    )
    return lambda name: rename_source_key(name, renamings, converters, prefix, state)[0], cut
