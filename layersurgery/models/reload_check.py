"""Check that the edited checkpoint would reload as the intended model.

The model that transformers would build from the edited config is built without memory for its weights. It is compared,
block by block, with the model built from the source's config. The check finds a block that would be built as another
class, with other tensors or with another constant (for example, a scale that depends on the layer's position), before
any byte is written. File names cannot reveal this: such a checkpoint has no missing and no unexpected keys.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import UnsupportedEditError, warn
from ..plans.route import Route
from ..units import format_list
from .block_list import find_block_list
from .block_probe import probe_forward
from .block_view import POSITION_NAME
from .call_tracing import eval_no_grad
from .config_fields import DEPTH_FIELDS, INDEX_LISTS, DecoderSection, Json
from .config_periods import PERIODS
from .meta_model import build_meta_model
from .quantized import CPU_PACKING, is_quantized
from .skipped_branch import SkippedBranch

# A seed that is the position draws another random pattern in training (BigBird), and none otherwise.
_INDEX_NAME = re.compile(r"idx|index|layer|block|_id$|^id$|^seed$|number|depth", re.IGNORECASE)
# Values that a constructor computes in floating point may differ in the last digits.
_TOLERANCE = 1e-9
# Settings of a model in use, which are not part of its structure.
MODES = frozenset(("training", "gradient_checkpointing", "layers_are_rescaled", "name_or_path", CPU_PACKING))
# Attributes with which a block stores what other blocks read, and the attribute of the blocks that read it. Where no
# block does, they change no output (Gemma 4).
_STORED_FOR = {"store_full_length_kv": "is_kv_shared_layer"}
# Attributes with which a block writes what another reads. A block may write what no block of the edited model reads:
# no route is accepted on which a block would read it (`block_dependencies`).
_WRITES = frozenset(("store_full_length_kv", "next_skip_topk"))
_MISSING = object()
Modules = Mapping[str, nn.Module]


@dataclass(frozen=True, slots=True)
class ReloadCheck:
    """The two meta models of an edit, built from the source's config and from the edited config.

    Attributes:
        source: the model from the source's config, or the model in use.
        edited: the model from the edited config.
        section: the decoder's section of the source's config.
        route: the edit's route.
        file_tensors: names, relative to a block, of the tensors that the files hold.
        live: whether `source` is a model in use, which has extra attributes and whose buffers have its own dtype.
        blocks: path of the list of blocks, if it is known.
        transient: attributes of `source` that are not compared, since a forward sets them, by module and name.
    """

    source: nn.Module
    edited: nn.Module
    section: DecoderSection
    route: Route
    file_tensors: frozenset[str]
    live: bool = False
    blocks: str | None = None
    transient: frozenset[tuple[nn.Module, str]] = frozenset()

    @classmethod
    def build(
        cls, config: Json, edited: Json, section: DecoderSection, route: Route, file_tensors: Iterable[str]
    ) -> ReloadCheck:
        """Build both models."""
        return cls(build_meta_model(config), build_meta_model(edited), section, route, frozenset(file_tensors))

    def check(self) -> None:
        """Compare both models.

        Warns about positions that a model in use keeps for another place of the block: a reload sets them right.

        Raises:
            UnsupportedEditError: the reloaded model would differ; lists the first differences.
        """
        before = find_block_list(self.source, self.section.depth, path=self.blocks)
        after = find_block_list(self.edited, len(self.route), path=self.blocks)
        differences = [
            f"{after.path}.{position} (block {block}): {difference}"
            for position, block in enumerate(self.route.blocks)
            for difference in self._compare(
                _modules_by_path(before.blocks[block]), _modules_by_path(after.blocks[position]), block, position
            )
        ]
        outside = _modules_outside(self.source, before.blocks), _modules_outside(self.edited, after.blocks)
        differences += [
            f"outside the blocks: {difference}"
            for difference in self._compare(*outside, self.section.depth, len(self.route))
        ]
        if differences:
            summary = format_list(differences, 3, "; ")
            if self.live:
                raise UnsupportedEditError(
                    f"this model would reload as another model: {summary}. Its config does not describe this; undo "
                    "that change, or keep the model in memory only (operate_ with verify=False)"
                )
            raise UnsupportedEditError(
                f"{self.route} would not reload as the intended model: {summary}. The architecture derives this from a "
                "layer's position, and its config cannot change that"
            )
        if self.live and (stale := list(_stale_positions(before.blocks, after.blocks))):
            warn(
                f"{format_list(stale)} differ from the positions of the blocks, so generation with a cache is wrong in "
                "memory; a reload sets them right"
            )

    def _compare(self, source: Modules, edited: Modules, old: int, new: int) -> Iterator[str]:
        """Describe the differences of two module trees.

        Whole numbers that are `old` in the source and `new` in the edited model are expected to differ, and so are
        lists with one value for each layer.
        """
        for path in sorted(source.keys() | edited.keys()):
            label = path or "the block"
            if path not in source or path not in edited:
                yield f"{label} exists only {'after the reload' if path in edited else 'in the source'}"
                continue
            source_module, edited_module = source[path], edited[path]
            kind, edited_kind = original_class(source_module), original_class(edited_module)
            if kind is not edited_kind:
                yield f"{label} is a {kind.__name__} in the source and would be a {edited_kind.__name__}"
                continue
            source_values, edited_values = own_values(source_module), own_values(edited_module)
            _forget_kinds(source_values, edited_values)
            for name in sorted(
                edited_values.keys() - MODES if self.live else source_values.keys() | edited_values.keys()
            ):
                if self.live and edited_values.get(name, _MISSING) is None and name in vars(source_module):
                    continue  # loading the weights, or a run, sets it
                if name not in source_values or name not in edited_values:
                    yield (
                        f"{label}.{name} exists only {'after the reload' if name in edited_values else 'in the source'}"
                    )
                elif (
                    isinstance(source_values[name], torch.Tensor) and f"{path}.{name}".lstrip(".") in self.file_tensors
                ):
                    if source_values[name].shape != edited_values[name].shape:
                        yield f"{label}.{name} has another shape after the reload"
                elif not (
                    (source_module, name) in self.transient
                    # The shape of packed numbers; the layer's numbers of inputs and outputs are compared.
                    or (self.live and name == "weight" and is_quantized(source_module))
                    or self._is_unread(name)
                    or (name in _WRITES and source_values[name] is True and edited_values[name] is False)
                    # resize_token_embeddings leaves this copy; the rows of the embedding itself are compared.
                    or (self.live and name == "vocab_size")
                    or is_equal(source_values[name], edited_values[name])
                    or self._changed_in_use(source_values[name], edited_values[name])
                    or (self.live and _is_position(name, edited_values[name], new))
                    or self._follows_route(name, source_values[name], edited_values[name], old, new)
                ):
                    yield (
                        f"{label}.{name} is {describe(source_values[name])} in the source and would be "
                        f"{describe(edited_values[name])}"
                    )

    def _changed_in_use(self, source: Any, edited: Any) -> bool:
        """Check whether two values differ only because a model was cast, run, or edited after it was built."""
        if not self.live:
            return False
        if isinstance(source, torch.Tensor):
            return edited is None or (
                isinstance(edited, torch.Tensor)
                and source.shape == edited.shape
                and bool(torch.equal(source.cpu(), edited.to(source.dtype)))
            )
        return isinstance(edited, list) and len(edited) == self.section.depth

    def _is_unread(self, name: str) -> bool:
        """Check whether an attribute stores what no block of either model reads."""
        reader = _STORED_FOR.get(name)
        modules = (module for model in (self.source, self.edited) for module in model.modules())
        return reader is not None and not any(getattr(module, reader, False) for module in modules)

    def _follows_route(self, name: str, source: Any, edited: Any, old: int, new: int) -> bool:
        """Check whether two values differ exactly as the route's depth, positions or order require."""
        if name in DEPTH_FIELDS:
            return bool(source == self.section.depth and edited == len(self.route))
        if name in PERIODS:  # EXAONE's attention keeps a copy, but acts on the list
            return True
        if type(source) is int and type(edited) is int:
            return bool(_INDEX_NAME.search(name)) and source - old == edited - new
        if name in INDEX_LISTS and isinstance(source, list | tuple) and isinstance(edited, list | tuple):
            return list(edited) == [position for position, block in enumerate(self.route.blocks) if block in source]
        if isinstance(source, list | tuple) and isinstance(edited, list | tuple) and len(source) == self.section.depth:
            return list(edited) == [source[block] for block in self.route.blocks]
        return False


def _is_position(name: str, value: Any, position: int) -> bool:
    """Check whether an attribute of a block holds its position, which only tells it the row of the cache."""
    return type(value) is int and POSITION_NAME.match(name) is not None and value - position in (0, 1)


def _stale_positions(blocks: nn.ModuleList, reloaded: nn.ModuleList) -> Iterator[str]:
    """Describe the attributes of a model in use that hold another position than after a reload."""
    for position, (block, new) in enumerate(zip(blocks, reloaded, strict=True)):
        modules = _modules_by_path(block)
        for path, module in new.named_modules():
            for name, value in vars(module).items():
                if _is_position(name, value, position) and (old := vars(modules[path]).get(name, value)) != value:
                    yield f"{path}.{name} = {old} of block {position}".lstrip(".")


def changed_by_forward(model: nn.Module) -> frozenset[tuple[nn.Module, str]]:
    """Return the attributes that a forward on a few tokens changes, by module and name.

    Some rotary embeddings keep the frequencies for the length of the last text; other modules count their calls.

    Raises:
        UnsupportedEditError: the model cannot be run.
    """
    before = [(module, copy.deepcopy(own_values(module))) for module in model.modules()]
    with eval_no_grad(model):
        probe_forward(model)
    return frozenset(
        (module, name)
        for module, values in before
        for name, value in own_values(module).items()
        if name not in values or not is_equal(values[name], value)
    )


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, before a skipped branch replaced it or torch made it a class of its own.

    torch makes a new class for each module of which a parametrization computes a weight (weight norm).
    """
    if isinstance(module, SkippedBranch):
        return module.original_class
    return type(module).__mro__[1] if is_parametrized(module) else type(module)


def _modules_by_path(block: nn.Module) -> Modules:
    """Return the modules of a block by their path."""
    return dict(block.named_modules())


def _modules_outside(model: nn.Module, blocks: nn.ModuleList) -> Modules:
    """Return the modules of a model that are not in its blocks, by their path."""
    inside = {id(module) for module in blocks.modules()}
    return {name: module for name, module in model.named_modules() if id(module) not in inside}


def own_values(module: nn.Module) -> dict[str, Any]:
    """Return a module's own values: shapes of parameters, buffers and plain attributes."""
    values: dict[str, Any] = {}
    for name, parameter in module._parameters.items():
        values[name] = None if parameter is None else tuple(parameter.shape)
    for name, buffer in module._buffers.items():
        values[name] = buffer
    for name, value in vars(module).items():
        if not name.startswith("_") and _is_plain(value):
            values[name] = value
    return values


def _is_plain(value: Any) -> bool:
    """Check whether a value is a number, text, dtype or tensor, or a container of these."""
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.Tensor)


def _forget_kinds(source: dict[str, Any], edited: dict[str, Any]) -> None:
    """Remove, from the values of a module, what it keeps for kinds of layers of which the edited model has none.

    A rotary embedding has a list of the kinds, `layer_types`, and for each kind its frequencies.
    """
    before, after = source.get("layer_types"), edited.get("layer_types")
    if not (isinstance(before, list) and isinstance(after, list) and all(isinstance(kind, str) for kind in before)):
        return
    gone = [kind for kind in before if kind not in after]
    if gone and sorted(set(before)) == before and after == [kind for kind in before if kind not in gone]:
        for name in [name for name in source if name == "layer_types" or name.startswith(tuple(gone))]:
            source.pop(name)
            edited.pop(name, None)


def is_equal(source: Any, edited: Any) -> bool:
    """Check whether two values are equal, up to rounding of floats."""
    if isinstance(source, torch.Tensor) and isinstance(edited, torch.Tensor):
        if source.is_meta or edited.is_meta:
            return source.shape == edited.shape
        return source.shape == edited.shape and bool(torch.equal(source, edited))
    if isinstance(source, float) and isinstance(edited, float):
        return math.isclose(source, edited, rel_tol=_TOLERANCE) or (math.isnan(source) and math.isnan(edited))
    if isinstance(source, list | tuple) and isinstance(edited, list | tuple):
        return len(source) == len(edited) and all(map(is_equal, source, edited))
    return type(source) is type(edited) and bool(source == edited)


def describe(value: Any) -> str:
    """Describe a value in at most 60 characters."""
    text = (
        f"a tensor of shape {tuple(value.shape)} with other values" if isinstance(value, torch.Tensor) else repr(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."
