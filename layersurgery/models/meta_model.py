"""The model that transformers would build from a config, without memory for its weights."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import SourceError, UnsupportedEditError
from ..plans.route import Route
from .config_fields import LISTS, DecoderSection, Json, find_section, is_layerwise, rewrite_fields

_UNVERIFIED = "With --no-verify (verify=False) the checkpoint is written without this check, at your own risk."


def load_hf_config(config: Json) -> Any:
    """The transformers config object for a config.json; its own code (`auto_map`) is never run.

    Raises:
        UnsupportedEditError: transformers does not know the model type, or does not accept the config.
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
        raise UnsupportedEditError(
            f"transformers {transformers.__version__} does not know the model type {model_type!r}{remote}, so whether the edited "
            f"checkpoint would load cannot be told. {_UNVERIFIED}"
        )
    try:
        # By way of a file: reading one undoes what JSON cannot say, such as infinite numbers.
        with silence_transformers(), TemporaryDirectory() as directory:
            path = Path(directory) / "config.json"
            path.write_text(json.dumps(fields), "utf-8")
            return CONFIG_MAPPING[model_type].from_json_file(path)
    except Exception as error:  # whatever a config class raises on values it does not accept
        raise UnsupportedEditError(f"{model_type}'s config class does not accept the config: {error}") from error


def resolve_section(config: Json) -> DecoderSection:
    """The decoder's section, also of a config that leaves the depth to its class, or names it as only the class knows.

    The depth is then written into `config`.

    Raises:
        SourceError: transformers does not know the model type, or the class gives no depth.
    """
    with suppress(SourceError):
        return find_section(config)
    try:
        text = load_hf_config(config).get_text_config(decoder=True)
    except UnsupportedEditError as error:
        raise SourceError(f"config.json has no number of layers, and {error}") from error
    name = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    config[name] = int(getattr(text, "num_hidden_layers", 0) or 0)
    return find_section(config, name)


def is_known_model_type(config: Json) -> bool:
    """Whether transformers itself has the config's model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def write_derived_fields(config: Json, edited: Json, section: DecoderSection, route: Route) -> Json:
    """Write out, in the edited config, what its class would work out wrongly from the position of a layer.

    A class that derives one value per layer from a number (`sliding_window_pattern`, `max_window_layers`) derives it from
    positions, so after an edit it is given as the list itself.

    Raises:
        UnsupportedEditError: a per-layer value that the class does not take from the config.
    """
    fields = _fields(load_hf_config(config))
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
    except UnsupportedEditError:  # a property without a setter
        taken = False
    if not taken:
        raise UnsupportedEditError(
            f"the config class of {config.get('model_type')!r} works out {', '.join(differing)} from the positions of layers and "
            f"takes no list instead, so {route} cannot be said in its config"
        )
    return edited


def _differing(wanted: Json, edited: Json) -> list[str]:
    have = _fields(load_hf_config(edited))
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


def build_meta_model(config: Json) -> nn.Module:
    """The model a reload would build, its parameters without memory; buffers are real, for their values are compared.

    Raises:
        UnsupportedEditError: transformers cannot build it.
    """
    import transformers

    class_of = load_hf_config(config)
    name = next(iter(config.get("architectures") or []), "")
    architecture = getattr(transformers, name, None)
    try:
        with silence_transformers(), _EmptyOnMeta():
            if isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel):
                model: nn.Module = architecture(class_of)
            else:
                model = transformers.AutoModelForCausalLM.from_config(class_of)
    except Exception as error:  # a model's constructor may raise anything
        raise UnsupportedEditError(
            f"transformers cannot build {name or class_of.model_type} from the config: {error}. {_UNVERIFIED}"
        ) from error
    return model


@contextmanager
def silence_transformers() -> Iterator[None]:
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
