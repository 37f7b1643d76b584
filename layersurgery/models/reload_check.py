"""The twin check: would a reload of the edited checkpoint be the model that was meant?

The model that transformers would build from the edited config is built without memory for its weights and compared, block by
block, with the one it builds from the source's config. A block that would come back as another class, with other tensors or
with another constant (a scale that depends on the layer's place, say) is found here, before a byte is written. Nothing that
the file names tell can do that: such a checkpoint has no missing and no unexpected keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..plans.route import Route
from .block_list import find_block_list
from .config_fields import DEPTH_FIELDS, DecoderSection, Json
from .meta_model import build_meta_model
from .skipped_branch import SkippedBranch

_INDEX_NAME = re.compile(r"idx|index|layer|block|_id$|^id$|number|depth", re.IGNORECASE)
# Values that a constructor works out in floating point may differ in the last digits.
_TOLERANCE = 1e-9
# What a model in use is set to, and not what it is.
_MODES = frozenset(("training", "gradient_checkpointing", "layers_are_rescaled"))
Modules = Mapping[str, nn.Module]


@dataclass(frozen=True, slots=True)
class ReloadCheck:
    """Both empty models of an edit: what the source's config builds, and what the edited config builds."""

    source: nn.Module
    edited: nn.Module
    section: DecoderSection
    route: Route
    file_tensors: frozenset[str]  # names, within a block, of the tensors that the files bring
    live: bool = (
        False  # whether `source` is a model in use, which keeps things of its own and whose buffers have its dtype
    )

    @classmethod
    def build(
        cls, config: Json, edited: Json, section: DecoderSection, route: Route, file_tensors: Iterable[str]
    ) -> ReloadCheck:
        """Build both."""
        return cls(build_meta_model(config), build_meta_model(edited), section, route, frozenset(file_tensors))

    def check(self) -> None:
        """Compare them.

        Raises:
            UnsupportedEditError: the first things that would come back otherwise, by name.
        """
        before = find_block_list(self.source, self.section.depth)
        after = find_block_list(self.edited, len(self.route))
        wrong = [
            f"{after.path}.{place} (block {block}): {difference}"
            for place, block in enumerate(self.route.blocks)
            for difference in self._compare(_modules(before.blocks[block]), _modules(after.blocks[place]), block, place)
        ]
        outside = _without(self.source, before.blocks), _without(self.edited, after.blocks)
        wrong += [
            f"outside the blocks: {found}" for found in self._compare(*outside, self.section.depth, len(self.route))
        ]
        if wrong:
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            found = "; ".join(wrong[:3]) + more
            if self.live:
                raise UnsupportedEditError(
                    f"reloaded, this model would be another: {found}. Its config does not say so; undo that, or keep the model in memory "
                    "only (operate_ with verify=False)"
                )
            raise UnsupportedEditError(
                f"reloaded, {self.route} would not be the model meant: {found}. The architecture ties this to a layer's position and its "
                "config cannot say otherwise"
            )

    def _compare(self, source: Modules, twin: Modules, was: int, now: int) -> Iterator[str]:
        """Differences of two module trees. Whole numbers that are `was` here and `now` there are meant to differ, and so are
        lists with a value per layer."""
        for path in sorted(source.keys() | twin.keys()):
            label = path or "the block"
            if path not in source or path not in twin:
                yield f"{label} exists only {'after the reload' if path in twin else 'in the source'}"
                continue
            ours, theirs = source[path], twin[path]
            if (kind := _class(ours)) is not type(theirs):
                yield f"{label} is a {kind.__name__} in the source and would be a {type(theirs).__name__}"
                continue
            mine, yours = _own_values(ours), _own_values(theirs)
            for name in sorted(yours.keys() - _MODES if self.live else mine.keys() | yours.keys()):
                if name not in mine or name not in yours:
                    yield f"{label}.{name} exists only {'after the reload' if name in yours else 'in the source'}"
                elif isinstance(mine[name], torch.Tensor) and f"{path}.{name}".lstrip(".") in self.file_tensors:
                    if mine[name].shape != yours[name].shape:
                        yield f"{label}.{name} has another shape after the reload"
                elif not (
                    _same(mine[name], yours[name])
                    or self._used(mine[name], yours[name])
                    or self._moved(name, mine[name], yours[name], was, now)
                ):
                    yield f"{label}.{name} is {_short(mine[name])} in the source and would be {_short(yours[name])}"

    def _used(self, ours: Any, theirs: Any) -> bool:
        """Whether two values differ only because one of the models has been cast, run, or edited since it was built."""
        if not self.live:
            return False
        if isinstance(ours, torch.Tensor):
            return theirs is None or (
                ours.shape == theirs.shape and bool(torch.equal(ours.cpu(), theirs.to(ours.dtype)))
            )
        return isinstance(theirs, list) and len(theirs) == self.section.depth

    def _moved(self, name: str, ours: Any, theirs: Any, was: int, now: int) -> bool:
        if name in DEPTH_FIELDS:
            return bool(ours == self.section.depth and theirs == len(self.route))
        if type(ours) is int and type(theirs) is int:
            return bool(_INDEX_NAME.search(name)) and ours - was == theirs - now
        if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == self.section.depth:
            return list(theirs) == [ours[block] for block in self.route.blocks]
        return False


def _class(module: nn.Module) -> type[nn.Module]:
    return module.stands_for if isinstance(module, SkippedBranch) else type(module)


def _modules(block: nn.Module) -> Modules:
    return dict(block.named_modules())


def _without(model: nn.Module, blocks: nn.ModuleList) -> Modules:
    inside = {id(module) for module in blocks.modules()}
    return {name: module for name, module in model.named_modules() if id(module) not in inside}


def _own_values(module: nn.Module) -> dict[str, Any]:
    """What a module holds itself: shapes of parameters, buffers and plain attributes."""
    facts: dict[str, Any] = {}
    for name, parameter in module._parameters.items():
        facts[name] = None if parameter is None else tuple(parameter.shape)
    for name, buffer in module._buffers.items():
        facts[name] = buffer
    for name, value in vars(module).items():
        if not name.startswith("_") and _plain(value):
            facts[name] = value
    return facts


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.Tensor)


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if ours.is_meta or theirs.is_meta:
            return ours.shape == theirs.shape
        return ours.shape == theirs.shape and bool(torch.equal(ours, theirs))
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=_TOLERANCE) or (math.isnan(ours) and math.isnan(theirs))
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return type(ours) is type(theirs) and bool(ours == theirs)


def _short(value: Any) -> str:
    text = (
        f"a tensor of shape {tuple(value.shape)} with other values" if isinstance(value, torch.Tensor) else repr(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."
