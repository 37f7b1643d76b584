"""Match tensor names in the files with the parameters of the model that loads them.

The two differ where transformers renames, merges or splits tensors on loading. Its own conversion rules are applied
here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..errors import UnsupportedEditError
from ..models.block_list import BlockList
from ..models.meta_model import silence_transformers
from .tensor_index import BlockPrefix

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The tensors of each block, by the parameter that they are loaded into.

    Attributes:
        tensors: block -> name of the parameter in the block's module -> tensor names within the block in the files.
        merged: regular expressions of parameters that share one merged tensor of the files with other parameters.
    """

    tensors: Mapping[int, Mapping[str, tuple[str, ...]]]
    merged: frozenset[str]

    def names(self, block: int, parameter: str) -> tuple[str, ...]:
        """Return the tensors that contain one parameter of a block and nothing else; empty if there are none."""
        if any(re.search(pattern, parameter) for pattern in self.merged):
            return ()
        return self.tensors.get(block, {}).get(parameter, ())


def find_loaded_list(model: nn.Module, prefix: BlockPrefix, names: Iterable[str]) -> BlockList:
    """Find the list of modules of a model that the blocks of the files are loaded into.

    Args:
        model: the model, on any device.
        prefix: prefix of the blocks in the tensor names.
        names: the tensor names of the checkpoint.

    Raises:
        UnsupportedEditError: transformers loads none of the tensors into such a list.
    """
    rename, _ = _read_conversion_rules(model)
    # Names of experts differ only by a number, so looking up one of them is enough.
    of_first = {_NUMBER.sub("N", name): name for name in names if (split := prefix.split(name)) and split[0] == 0}
    loaded = [rename(name) for name in of_first.values()]
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == prefix.depth
    }
    paths = [path for path in lists if any(re.match(rf"{re.escape(path)}\.\d+\.", name) for name in loaded)]
    if not paths:
        raise UnsupportedEditError(
            f"transformers loads {prefix.prefix}.0 into none of the lists of {prefix.depth} modules of "
            f"{type(model).__name__} ({', '.join(lists) or 'it has none'}), so the blocks of a reload would be random. "
            "Rename the tensors in the files, or name the class that loads them in config.json (architectures)"
        )
    path = min(paths, key=len)  # the others are lists within a block
    return BlockList(path, lists[path])


def find_needed(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of the names whose tensors the model loads, and does not tie to others."""
    rename, _ = _read_conversion_rules(model)
    state = model.state_dict().keys() - (getattr(model, "all_tied_weights_keys", None) or {}).keys()
    return [name for name in names if rename(name) in state]


def find_missing(model: nn.Module, block_list: BlockList, tensor_names: TensorNames) -> list[str]:
    """Return the parameters of the blocks that no tensor is loaded into, so that a reload would leave them random."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = []
    for block, module in enumerate(block_list.blocks):
        for name, _ in module.named_parameters():
            path = f"{block_list.path}.{block}.{name}"
            loaded = name in tensor_names.tensors[block] or any(re.search(part, name) for part in tensor_names.merged)
            if not (loaded or path in tied or any(re.search(pattern, path) for pattern in ignored)):
                missing.append(path)
    return missing


def match_names(model: nn.Module, path: str, prefix: BlockPrefix, names: Iterable[str]) -> TensorNames:
    """Match the tensor names of a checkpoint with the parameters of the blocks of the model that loads it.

    Args:
        model: the model, on any device.
        path: path of its list of blocks.
        prefix: prefix of the blocks in the tensor names.
        names: the tensor names of the checkpoint.

    Raises:
        UnsupportedEditError: the files and the model number the blocks differently, or no tensor is loaded into a
            block.
    """
    rename, merged = _read_conversion_rules(model)
    similar: dict[tuple[int, str], list[str]] = defaultdict(list)
    for name in names:
        split = prefix.split(name)
        if split is not None and split[0] < prefix.depth:
            # Names of experts differ only by a number, so looking up one of them is enough.
            similar[split[0], _NUMBER.sub("N", split[1])].append(split[1])
    tensors: dict[int, dict[str, tuple[str, ...]]] = defaultdict(dict)
    in_block = re.compile(rf"{re.escape(path)}\.(\d+)\.(.+)$")

    def find_parameter(block: int, rest: str) -> str:
        match = in_block.match(rename(prefix.join(block, rest)))
        if match is not None and int(match[1]) != block:
            raise UnsupportedEditError(
                f"{prefix.join(block, rest)} is loaded into block {match[1]}: the files of {type(model).__name__} "
                "number the blocks differently from the model, so their tensors cannot be renamed"
            )
        return rest if match is None else match[2]

    for (block, _), rests in similar.items():
        first = find_parameter(block, rests[0])
        # Whether the model has a parameter for each expert, as the files do.
        separate = _NUMBER.search(f".{first}.") is not None
        for rest in rests:
            parameter = find_parameter(block, rest) if separate else first
            tensors[block][parameter] = (*tensors[block].get(parameter, ()), rest)
    for block in range(prefix.depth):
        if not any(in_block.match(rename(prefix.join(block, rest))) for rest in _one_of_each(similar, block)):
            raise UnsupportedEditError(
                f"no tensor at {prefix.prefix}.{block} is loaded into {path}.{block} of {type(model).__name__}: these "
                "are not the tensors of its decoder blocks, or the model renames them in an unsupported way"
            )
    return TensorNames(tensors, merged)


def _one_of_each(similar: Mapping[tuple[int, str], list[str]], block: int) -> Iterable[str]:
    """Iterate over one name of each group of similar names of a block."""
    return (rests[0] for (number, _), rests in similar.items() if number == block)


def _read_conversion_rules(model: nn.Module) -> tuple[Callable[[str], str], frozenset[str]]:
    """Return the renaming function of loading, and the patterns of parameters that share a merged tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    with silence_transformers():
        rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = dict.fromkeys(model.state_dict(), True)
    prefix = getattr(model, "base_model_prefix", "")
    merged = frozenset(
        re.escape(pattern).replace(r"\*", ".*")
        for rule in converters
        if len(rule.target_patterns) > 1
        for pattern in rule.target_patterns
    )
    return lambda name: rename_source_key(name, renamings, converters, prefix, state)[0], merged
