"""The twin check: would a reload of the edited checkpoint be the model that was meant?

The model that transformers would build from the edited config is built without memory for its weights and compared, block by
block, with the one it builds from the source's config. A block that would come back as another class, with other tensors or
with another constant (a scale that depends on the layer's place, say) is found here, before a byte is written. Nothing that
the file names tell can do that: such a checkpoint has no missing and no unexpected keys.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import InexpressibleError, SourceError
from ..plans.route import Route
from .block_list import find_blocks
from .config_fields import DEPTH_FIELDS, LISTS, Json, Section, find_section, is_layerwise, rewrite_fields
from .skipped_branch import Silent

_INDEX_NAME = re.compile(r"idx|index|layer|block|_id$|^id$|number|depth", re.IGNORECASE)
# Values that a constructor works out in floating point may differ in the last digits.
_TOLERANCE = 1e-9
# What a model in use is set to, and not what it is.
_MODES = frozenset(("training", "gradient_checkpointing", "layers_are_rescaled"))
_UNVERIFIED = "With --no-verify (verify=False) the checkpoint is written without this check, at your own risk."
Modules = Mapping[str, nn.Module]


def class_config(config: Json) -> Any:
    """The transformers config object for a config.json; its own code (`auto_map`) is never run.

    Raises:
        InexpressibleError: transformers does not know the model type, or does not accept the config.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {
        key: value
        for key, value in copy.deepcopy(config).items()
        if key not in ("quantization_config", "compression_config", "auto_map")
    }
    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        remote = " (it brings its own code, which is not run here)" if "auto_map" in config else ""
        raise InexpressibleError(
            f"transformers {transformers.__version__} does not know the model type {model_type!r}{remote}, so whether the edited "
            f"checkpoint would load cannot be told. {_UNVERIFIED}"
        )
    try:
        # By way of a file: reading one undoes what JSON cannot say, such as infinite numbers.
        with quiet(), TemporaryDirectory() as directory:
            path = Path(directory) / "config.json"
            path.write_text(json.dumps(fields), "utf-8")
            return CONFIG_MAPPING[model_type].from_json_file(path)
    except Exception as error:  # whatever a config class raises on values it does not accept
        raise InexpressibleError(f"{model_type}'s config class does not accept the config: {error}") from error


def section_of(config: Json) -> Section:
    """The decoder's section, also of a config that leaves the depth to its class, or names it as only the class knows.

    The depth is then written into `config`.

    Raises:
        SourceError: transformers does not know the model type, or the class gives no depth.
    """
    with suppress(SourceError):
        return find_section(config)
    try:
        text = class_config(config).get_text_config(decoder=True)
    except InexpressibleError as error:
        raise SourceError(f"config.json has no number of layers, and {error}") from error
    name = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    config[name] = int(getattr(text, "num_hidden_layers", 0) or 0)
    return find_section(config, name)


def knows(config: Json) -> bool:
    """Whether transformers itself has the config's model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def settle(config: Json, edited: Json, section: Section, route: Route) -> Json:
    """Write out, in the edited config, what its class would work out wrongly from the position of a layer.

    A class that derives one value per layer from a number (`sliding_window_pattern`, `max_window_layers`) derives it from
    positions, so after an edit it is given as the list itself.

    Raises:
        InexpressibleError: a per-layer value that the class does not take from the config.
    """
    fields = _fields(class_config(config))
    layerwise = [key for key, value in fields.items() if is_layerwise(key, value, section.depth)]
    rewritten = rewrite_fields(fields, section.depth, route)
    wanted = {key: rewritten[key] for key in layerwise}
    differing = _differing(wanted, edited)
    if not differing:
        return edited
    edited = copy.deepcopy(edited)
    for key in differing:
        section.of(edited)[key] = wanted[key]
    try:
        taken = not _differing(wanted, edited)
    except InexpressibleError:  # a property without a setter
        taken = False
    if not taken:
        raise InexpressibleError(
            f"the config class of {config.get('model_type')!r} works out {', '.join(differing)} from the positions of layers and "
            f"takes no list instead, so {route} cannot be said in its config"
        )
    return edited


def _differing(wanted: Json, edited: Json) -> list[str]:
    have = _fields(class_config(edited))
    return [key for key, value in wanted.items() if have.get(key) != value]


def _fields(config: Any) -> Json:
    """The fields of the text config, lists that a class derives included."""
    text = config.get_text_config(decoder=True)
    fields = text.to_dict()
    for name in [*fields, *LISTS]:
        try:
            fields[name] = getattr(text, name)
        except Exception:  # a field of other models, or one that differs by layer and refuses to be read as one
            continue
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(fields.items())}


class _EmptyOnMeta(TorchFunctionMode):
    """Makes what constructors fill later on the meta device, and computes the rest.

    `torch.device("meta")` would take the buffers' values away as well, and accelerate's `init_empty_weights` first asks for
    each parameter's memory, which one layer's stacked experts can exceed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.rand, torch.randn):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_empty(config: Json) -> nn.Module:
    """The model a reload would build, its parameters without memory; buffers are real, for their values are compared.

    Raises:
        InexpressibleError: transformers cannot build it.
    """
    import transformers

    class_of = class_config(config)
    name = next(iter(config.get("architectures") or []), "")
    architecture = getattr(transformers, name, None)
    try:
        with quiet(), _EmptyOnMeta():
            if isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel):
                model: nn.Module = architecture(class_of)
            else:
                model = transformers.AutoModelForCausalLM.from_config(class_of)
    except Exception as error:  # a model's constructor may raise anything
        raise InexpressibleError(
            f"transformers cannot build {name or class_of.model_type} from the config: {error}. {_UNVERIFIED}"
        ) from error
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Building a throw-away model warns of things that are no concern of the user's, and draws no random numbers of theirs."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(0)
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, slots=True)
class Twin:
    """Both empty models of an edit: what the source's config builds, and what the edited config builds."""

    source: nn.Module
    edited: nn.Module
    section: Section
    route: Route
    in_files: frozenset[str]  # names, within a block, of the tensors that the files bring
    live: bool = False  # whether `source` is a model in use, which keeps things of its own and whose buffers have its dtype

    @classmethod
    def build(cls, config: Json, edited: Json, section: Section, route: Route, in_files: Iterable[str]) -> Twin:
        """Build both."""
        return cls(build_empty(config), build_empty(edited), section, route, frozenset(in_files))

    def check(self) -> None:
        """Compare them.

        Raises:
            InexpressibleError: the first things that would come back otherwise, by name.
        """
        before = find_blocks(self.source, self.section.depth)
        after = find_blocks(self.edited, len(self.route))
        wrong = [
            f"{after.path}.{place} (block {block}): {difference}"
            for place, block in enumerate(self.route.blocks)
            for difference in self._compare(_modules(before.blocks[block]), _modules(after.blocks[place]), block, place)
        ]
        outside = _without(self.source, before.blocks), _without(self.edited, after.blocks)
        wrong += [f"outside the blocks: {found}" for found in self._compare(*outside, self.section.depth, len(self.route))]
        if wrong:
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            found = "; ".join(wrong[:3]) + more
            if self.live:
                raise InexpressibleError(
                    f"reloaded, this model would be another: {found}. Its config does not say so; undo that, or keep the model in memory "
                    "only (operate_ with verify=False)"
                )
            raise InexpressibleError(
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
            mine, yours = _facts(ours), _facts(theirs)
            for name in sorted(yours.keys() - _MODES if self.live else mine.keys() | yours.keys()):
                if name not in mine or name not in yours:
                    yield f"{label}.{name} exists only {'after the reload' if name in yours else 'in the source'}"
                elif isinstance(mine[name], torch.Tensor) and f"{path}.{name}".lstrip(".") in self.in_files:
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
            return theirs is None or (ours.shape == theirs.shape and bool(torch.equal(ours.cpu(), theirs.to(ours.dtype))))
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
    return module.stands_for if isinstance(module, Silent) else type(module)


def _modules(block: nn.Module) -> Modules:
    return dict(block.named_modules())


def _without(model: nn.Module, blocks: nn.ModuleList) -> Modules:
    inside = {id(module) for module in blocks.modules()}
    return {name: module for name, module in model.named_modules() if id(module) not in inside}


def _facts(module: nn.Module) -> dict[str, Any]:
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
    text = f"a tensor of shape {tuple(value.shape)} with other values" if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
