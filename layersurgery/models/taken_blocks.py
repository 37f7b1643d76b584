"""Run the weights of other checkpoints in a model's blocks, where both compute the same with the same weights.

A taken block is a view of the model's own block with the same number, with the parameters and the stored buffers of the
other model's block. So its position, its config object and its hooks are those of the model, and the other model is not
changed. Everything else that a block's output depends on must be equal, and is compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import LayerSurgeryError, PlanError, UnsupportedEditError
from ..plans.block_sources import check_name
from ..plans.visit import Visit
from ..units import format_list
from .block_list import find_decoder_blocks, text_config
from .block_view import POSITION_NAME, share_parameters
from .config_fields import (
    CYCLES,
    DEPTH_FIELDS,
    EXTRA_FIELDS,
    INDEX_LISTS,
    ONE_BASED_LISTS,
    POSITIONAL_ONLY,
    POSITIONAL_WITH_LIST,
    PREFIX_COUNTS,
    SOURCE_LISTS,
    SUFFIX_COUNTS,
    depth_field,
    is_layerwise,
)
from .quantized import is_quantized
from .reload_check import MODES, describe, is_equal, original_class, own_values
from .skipped_branch import SkippedBranch

# Fields of a config that no block reads, or that only say which position has which kind of block: the blocks' classes
# and settings are compared one by one.
_NOT_OF_BLOCKS = frozenset(
    (
        *DEPTH_FIELDS, *EXTRA_FIELDS, *CYCLES, *ONE_BASED_LISTS, *SOURCE_LISTS, *PREFIX_COUNTS, *SUFFIX_COUNTS,
        *POSITIONAL_WITH_LIST, *POSITIONAL_ONLY, "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward",
        "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "id2label", "initializer_range",
        "is_decoder", "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
        "problem_type", "pruned_heads", "quantization_config", "return_dict", "sep_token_id",
        "task_specific_params", "tie_word_embeddings", "tokenizer_class", "torch_dtype",
        "transformers_version", "use_cache", "vocab_size",
    )
)  # fmt: skip
Tensors = Mapping[tuple[str, str], torch.Tensor]
"""Tensors of a block, by the path of their module and their name in it."""


class TakenBlocks:
    """Hold the weights of blocks that are taken from other models, and put them into views of a model's own blocks.

    Args:
        model: the model whose blocks are replaced.
        blocks: path of its list of blocks, if it cannot be found automatically.
    """

    def __init__(self, model: nn.Module, *, blocks: str | None = None) -> None:
        self._config, self._path = text_config(model), blocks
        self._own = tuple(find_decoder_blocks(model, blocks).blocks)
        self._tensors: dict[tuple[str, int], Tensors] = {}
        self._refusals: dict[tuple[str, int], LayerSurgeryError] = {}
        self._names: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Return the size of the taken weights in bytes, also of those that another model shares."""
        return sum(tensor.nbytes for tensors in self._tensors.values() for tensor in tensors.values())

    def take(self, name: str, source: nn.Module, blocks: Iterable[int]) -> None:
        """Take the weights of blocks of a source; `view` raises the reason for each block that does not fit.

        Args:
            name: the name of the source.
            source: the other model; it is not changed.
            blocks: numbers of the blocks.
        """
        self._names.add(name)
        config, others = text_config(source), tuple(find_decoder_blocks(source, self._path).blocks)
        for block in blocks:
            try:
                check_depth(name, len(others), block)
                check_block(name, block, self._own[block], others[block], self._config, config)
                self._tensors[name, block] = _moved(name, block, self._own[block], others[block])
            except (PlanError, UnsupportedEditError) as error:
                self._refusals[name, block] = error

    def check(self, visit: Visit) -> None:
        """Check that the block of a visit was taken.

        Raises:
            PlanError: its source is not given.
            UnsupportedEditError: the source's block is another block than the model's, or the source has none of this
                number; says what differs.
        """
        check_name(visit.source, self._names)
        if (visit.source, visit.block) in self._refusals:
            raise self._refusals[visit.source, visit.block]

    def view(self, visit: Visit) -> nn.Module:
        """Return a view of the model's own block that has the weights of the visit's source; raises as `check` does."""
        self.check(visit)
        view = share_parameters(self._own[visit.block])
        for (path, name), tensor in self._tensors[visit.source, visit.block].items():
            module = view.get_submodule(path)
            if isinstance(tensor, nn.Parameter):
                module._parameters[name] = tensor
            else:
                module._buffers[name] = tensor
        return view


def check_depth(name: str, depth: int, block: int) -> None:
    """Refuse a block that a source does not have.

    Raises:
        UnsupportedEditError: the source has fewer blocks.
    """
    if block >= depth:
        raise UnsupportedEditError(
            f"block {block} cannot be taken from {name}, which has {depth} blocks, 0 to {depth - 1}"
        )


def check_block(name: str, block: int, own: nn.Module, other: nn.Module, config: Any, other_config: Any) -> None:
    """Refuse a block of another model that computes something else with the same weights.

    Args:
        name: the name of the source.
        block: the number of the block.
        own: the model's block.
        other: the source's block.
        config: the config object of the model's text decoder.
        other_config: that of the source.

    Raises:
        UnsupportedEditError: says what differs.
    """
    for where, edited in (("the model", own), (name, other)):
        if any(isinstance(module, SkippedBranch) for module in edited.modules()):
            raise UnsupportedEditError(
                f"block {block} cannot be taken from {name}: a branch of the block of {where} is skipped by an edit in "
                "memory, which its weights do not say; save the edited model, and take the block from there"
            )
    differences = list(_structural_differences(own, other)) or [
        *_config_differences(block, config, other_config),
        *_setting_differences(own, other),
    ]
    if differences:
        raise UnsupportedEditError(
            f"block {block} cannot be taken from {name}, since it is another block than that of the model: "
            f"{format_list(differences, 3, '; ')}"
        )


def _structural_differences(own: nn.Module, other: nn.Module) -> Iterator[str]:
    """Describe the modules and the shapes of weights in which two blocks differ."""
    modules, others = dict(own.named_modules()), dict(other.named_modules())
    for path in [*modules, *(path for path in others if path not in modules)]:
        label = path or "the block"
        if path not in modules or path not in others:
            yield f"only {'the source' if path in others else 'the model'} has {label}"
            continue
        kind, other_kind = original_class(modules[path]), original_class(others[path])
        if kind is not other_kind:
            yield f"{label} is a {kind.__name__}, and in the source a {other_kind.__name__}"
            continue
        tensors, other_tensors = (
            {
                name: value
                for name, value in (*module._parameters.items(), *module._buffers.items())
                if value is not None
            }
            for module in (modules[path], others[path])
        )
        for name in sorted(tensors.keys() | other_tensors.keys()):
            full = f"{path}.{name}".lstrip(".")
            if name not in tensors or name not in other_tensors:
                yield f"only {'the source' if name in other_tensors else 'the model'} has {full}"
            elif tensors[name].shape != other_tensors[name].shape:
                yield f"{full} is {tuple(tensors[name].shape)}, and in the source {tuple(other_tensors[name].shape)}"


def _config_differences(block: int, config: Any, other_config: Any) -> Iterator[str]:
    """Describe the fields of two configs in which a block of one number differs."""
    fields, others = _fields_of(block, config), _fields_of(block, other_config)
    for name in sorted(fields.keys() | others.keys()):
        value, other = fields.get(name), others.get(name)
        if not is_equal(value, other):
            yield f"{name} is {describe(value)}, and in the source {describe(other)}"


def _fields_of(block: int, config: Any) -> dict[str, Any]:
    """Return the fields of a config that may change what one block computes, with its own value of per-layer lists."""
    fields: dict[str, Any] = config.to_dict()
    depth = getattr(config, depth_field(config))
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _NOT_OF_BLOCKS or name.startswith("_") or "drop" in name or value == {}:
            continue
        if name in INDEX_LISTS and isinstance(value, list):
            found[name] = block in value
        elif name == "max_position_embeddings" and not _reads_length(fields):
            continue  # a limit that no block reads; what rotary embeddings of other kinds read of it is in their fields
        else:
            found[name] = value[block] if is_layerwise(name, value, depth) else value
    return found


def _reads_length(fields: dict[str, Any]) -> bool:
    """Return whether rotary embeddings depend on the largest number of positions."""
    text = json.dumps(fields, default=str)
    return "dynamic" in text or "longrope" in text


def _setting_differences(own: nn.Module, other: nn.Module) -> Iterator[str]:
    """Describe the settings of modules, and the buffers that are not stored, in which two blocks differ.

    Not compared are rates of dropout, which count in training only, and tensors that are neither parameters nor
    buffers: the state of the last run.
    """
    for (path, module), other_module in zip(own.named_modules(), other.modules(), strict=True):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            continue
        stored = {*module._parameters, *_stored_buffers(module)}
        values, others = own_values(module), own_values(other_module)
        for name in sorted((values.keys() | others.keys()) - MODES - stored):
            value, other_value = (_on_cpu(each.get(name)) for each in (values, others))
            is_state = name not in module._buffers and isinstance(
                value if value is not None else other_value, torch.Tensor
            )
            if is_state or "drop" in name or POSITION_NAME.match(name):
                continue
            if name in values and name in others and is_equal(value, other_value):
                continue
            full = f"{path}.{name}".lstrip(".")
            yield f"{full} is {describe(value)}, and in the source {describe(other_value)}"


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) and not value.is_meta else value


def _stored_buffers(module: nn.Module) -> Iterator[str]:
    return (name for name in module._buffers if name not in module._non_persistent_buffers_set)


def _moved(name: str, block: int, own: nn.Module, other: nn.Module) -> Tensors:
    """Return the parameters and stored buffers of a source's block, on the devices of the model's block.

    Raises:
        UnsupportedEditError: weights are quantized, offloaded, or of another data type.
    """
    found: dict[tuple[str, str], torch.Tensor] = {}
    for (path, module), other_module in zip(own.named_modules(), other.modules(), strict=True):
        names = [*module._parameters, *_stored_buffers(module)]
        for key in names:
            tensor, taken = (
                each._parameters.get(key) if key in each._parameters else each._buffers.get(key)
                for each in (module, other_module)
            )
            if tensor is None or taken is None:
                continue
            label = f"block {block} cannot be taken from {name}: {f'{path}.{key}'.lstrip('.')}"
            if is_quantized(module) or is_quantized(other_module):
                raise UnsupportedEditError(f"{label} is quantized; load both models without quantization")
            if tensor.is_meta or taken.is_meta:
                where = "the model" if tensor.is_meta else "the source"
                raise UnsupportedEditError(
                    f"{label} of {where} is offloaded; load it without offloading, or edit the checkpoint on disk"
                )
            if tensor.dtype != taken.dtype:
                raise UnsupportedEditError(
                    f"{label} is {taken.dtype}, and {tensor.dtype} in the model; load both in one data type (`dtype`)"
                )
            if taken.device != tensor.device:
                moved = taken.detach().to(tensor.device)
                is_parameter = isinstance(taken, nn.Parameter)
                taken = nn.Parameter(moved, requires_grad=taken.requires_grad) if is_parameter else moved
            found[path, key] = taken
    return found
