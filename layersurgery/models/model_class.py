"""Choose the class of transformers that makes a language model of a config, also of one that reads images or sound."""

from __future__ import annotations

from typing import Any

# In order: the text decoder alone where transformers can build it, else the model that also reads images or sound.
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText")


def find_model_classes(config: Any) -> list[tuple[Any, Any]]:
    """List the classes of transformers that load or build a model which predicts next tokens, the best first.

    These are AutoModelForCausalLM, the auto classes of models that also read images or sound, and the class that saved
    the checkpoint. Of an omni model, the part that reads comes before the whole.

    Args:
        config: a transformers config.

    Returns:
        Each class, with the config to give it. The first alone is enough to build a model; a checkpoint may hold the
        weights of another.
    """
    import transformers

    classes = []
    if (section := _reading_section(config)) is not None:
        classes += find_model_classes(section)
    own_code = getattr(config, "auto_map", None) or {}
    for name in _AUTO_CLASSES:
        auto_class = getattr(transformers, name, None)  # older versions of transformers lack the second
        if auto_class is not None and (name in own_code or type(config) in auto_class._model_mapping):
            classes.append((auto_class, config))
    for name in getattr(config, "architectures", None) or ():
        named_class = getattr(transformers, name, None)
        if isinstance(named_class, type) and issubclass(named_class, transformers.PreTrainedModel):
            classes.append((named_class, config))
    return classes or [(transformers.AutoModelForCausalLM, config)]  # its own error says what it knows


def _reading_section(config: Any) -> Any:
    """Return the section of an omni model's config that describes the model which reads; None for other models."""
    text = config.get_text_config(decoder=True)
    for section in vars(config).values():
        if hasattr(section, "get_text_config") and section is not text:
            if section.get_text_config(decoder=True) is text:
                if (quantization := getattr(config, "quantization_config", None)) is not None:
                    section.quantization_config = quantization
                return section
    return None


def build_model(config: Any, **options: Any) -> Any:
    """Build the model of a config with random weights, with the best of `find_model_classes`.

    Args:
        config: a transformers config.
        options: further arguments for `from_config`.

    Raises:
        Exception: as the model's constructor.
    """
    model_class, config = find_model_classes(config)[0]
    if hasattr(model_class, "from_config"):
        return model_class.from_config(config, **options)
    options.pop("trust_remote_code", None)  # for auto classes only
    return model_class._from_config(config, **options)
