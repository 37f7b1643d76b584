"""Build the model that transformers would build from a config, without allocating its weights."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import SourceError, UnsupportedEditError
from ..library_logs import quiet_libraries
from ..plans.route import Route
from ..quick_imports import quick_imports
from .config_fields import LISTS, PREFIX_LIST, DecoderSection, Json, depth_field, find_section, is_layerwise, sections
from .config_periods import follow_periods
from .config_rewrite import rewrite_fields
from .model_class import build_model

_UNVERIFIED = "Without this check (verify), the checkpoint can be written at your own risk."


def load_hf_config(config: Json) -> Any:
    """Return the transformers config object for a config.json; the model's own code (`auto_map`) is never run.

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
        remote = " (it comes with its own code, which is not run here)" if "auto_map" in config else ""
        raise UnsupportedEditError(
            f"transformers {transformers.__version__} does not know the model type {model_type!r}{remote}, so it "
            f"cannot be checked whether the edited checkpoint would load. {_UNVERIFIED}"
        )
    try:
        # Write a file and read it back: the reader restores values that JSON cannot represent, such as infinity.
        with silence_transformers(), TemporaryDirectory() as directory:
            path = Path(directory) / "config.json"
            path.write_text(json.dumps(fields), "utf-8")
            return CONFIG_MAPPING[model_type].from_json_file(path)
    except Exception as error:  # a config class may raise anything on values that it does not accept
        raise UnsupportedEditError(f"{model_type}'s config class does not accept the config: {error}") from error


def resolve_section(config: Json) -> DecoderSection:
    """Find the decoder's section, even if only the config class defines the depth or the name of the depth field.

    The depth is then written into that section of `config`.

    Raises:
        SourceError: transformers does not know the model type, or the class does not give the depth.
    """
    with suppress(SourceError):
        return find_section(config)
    try:
        text = load_hf_config(config).get_text_config(decoder=True)
    except UnsupportedEditError as error:
        raise SourceError(f"config.json has no number of layers, and {error}") from error
    name = depth_field(text)
    *_, (_, fields) = sections(config, ())
    fields[name] = int(getattr(text, name, 0) or 0)
    return find_section(config, name)


def is_known_model_type(config: Json) -> bool:
    """Check whether transformers itself defines the config's model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def write_derived_fields(config: Json, edited: Json, section: DecoderSection, route: Route) -> Json:
    """Write the per-layer lists that the config class would derive wrongly from positions into the edited config.

    A class that derives one value for each layer from a number (`sliding_window_pattern`, `max_window_layers`) uses
    positions, so after an edit the config must hold the list itself, and no number that contradicts it.

    Raises:
        UnsupportedEditError: a per-layer value that the class does not accept from the config.
    """
    fields = _read_fields(load_hf_config(config))
    fields = {key: value for key, value in fields.items() if key not in section.depth_fields}
    layerwise = [key for key, value in fields.items() if is_layerwise(key, value, section.depth)]
    rewritten = rewrite_fields(fields, section.depth, route)
    expected = {key: rewritten[key] for key in layerwise}
    differing = _find_differing(expected, edited)
    if not differing:
        return edited
    edited = copy.deepcopy(edited)
    edited_fields = section.get_fields(edited)
    edited_fields.update({key: expected[key] for key in differing})
    followed = follow_periods(edited_fields, len(route))
    edited_fields.clear()
    edited_fields.update(followed)
    accepts = "list"
    try:
        if not (still := _find_differing(expected, edited)):
            return edited
        actual = _read_fields(load_hf_config(edited)).get(still[0])
        if isinstance(actual, list) and len(actual) == len(route):
            # Some classes accept a list and change entries of it: Gemma 4 makes the last layer full attention.
            position = next(index for index, value in enumerate(actual) if value != expected[still[0]][index])
            accepts = f"other value than {actual[position]!r} at position {position}"
    except UnsupportedEditError:  # a property without a setter
        pass
    raise UnsupportedEditError(
        f"the config class of {config.get('model_type')!r} computes {', '.join(differing)} from the positions of "
        f"layers and accepts no {accepts}, so it cannot represent the route {route}"
    )


def write_prefix_list(config: Json, section: DecoderSection) -> Json:
    """Write the list that the config class derives from a count of the first layers, if it has one, next to it."""
    value = _read_fields(load_hf_config(config)).get(PREFIX_LIST)
    if isinstance(value, list) and len(value) == section.depth:
        config = copy.deepcopy(config)
        section.get_fields(config)[PREFIX_LIST] = value
    return config


def _find_differing(expected: Json, edited: Json) -> list[str]:
    """List the fields for which the edited config gives another value than expected."""
    actual = _read_fields(load_hf_config(edited))
    return [key for key, value in expected.items() if actual.get(key) != value]


def _read_fields(config: Any) -> Json:
    """Return the fields of the text config, including lists that the class derives."""
    text = config.get_text_config(decoder=True)
    fields = text.to_dict()
    for name in [*fields, *LISTS]:
        try:
            fields[name] = getattr(text, name)
        except Exception:  # a field of another model type, or one that differs by layer and cannot be read as one value
            continue
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(fields.items())}


# Initializations; a tensor on the meta device has no values that they could set.
_FILLS = ("kaiming_uniform_", "normal_", "uniform_")


class _EmptyOnMeta(TorchFunctionMode):
    """Creates tensors that constructors fill later on the meta device, and computes all others.

    `torch.device("meta")` would also discard the values of buffers. accelerate's `init_empty_weights` first allocates
    each parameter, and the stacked experts of one layer can exceed the memory.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.rand, torch.randn):
            kwargs["device"] = "meta"
        elif getattr(func, "__name__", "") in _FILLS:  # half of the time of building a model
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def build_meta_model(config: Json, quantization: Any = None) -> nn.Module:
    """Build the model that a reload would build, without memory for its parameters.

    Buffers are real, since their values are compared.

    Args:
        config: the config.
        quantization: the settings of a quantized model; the modules are then those of its format.

    Raises:
        UnsupportedEditError: transformers cannot build it.
    """
    with quick_imports():
        import transformers.generation.utils  # noqa: F401 - the slow part of what it needs
        import transformers.modeling_utils

    hf_config = load_hf_config(config)
    architecture_name = next(iter(config.get("architectures") or []), "")
    architecture = getattr(transformers, architecture_name, None)
    try:
        with silence_transformers(), _EmptyOnMeta():
            if isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel):
                model: nn.Module = architecture(hf_config)
            else:
                model = build_model(hf_config)
        if quantization is not None:
            from transformers.quantizers.auto import AutoHfQuantizer

            with silence_transformers():
                quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantization), pre_quantized=True)
                quantizer.preprocess_model(model=model, dtype=None, device_map=None, checkpoint_files=None)
    except Exception as error:  # a model's constructor may raise anything
        raise UnsupportedEditError(
            f"transformers cannot build {architecture_name or hf_config.model_type} from the config: {error}. "
            f"{_UNVERIFIED}"
        ) from error
    return model


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Suppress warnings while a temporary model is built, and preserve the user's random state."""
    with quiet_libraries(logging.CRITICAL + 1), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
