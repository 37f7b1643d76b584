"""Find the model that reads text alone in a model that also reads images or sound."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedEditError
from .block_probe import probe_forward
from .call_tracing import eval_no_grad


def find_text_model(model: Any) -> Any:
    """Return a loaded model, or the language model in it, if only that can be run on text alone.

    Some image-text models need an image in every forward, and a classifier of images may be made of one. They hold a
    whole language model, with an unembedding, as a module.

    Args:
        model: a transformers model.
    """
    from transformers import GenerationMixin

    inner = _find_inner_language_model(model)
    if inner is None or not isinstance(model, GenerationMixin):
        return model if inner is None else inner
    try:
        with eval_no_grad(model):
            probe_forward(model)
    except UnsupportedEditError:
        return inner
    return model


def _find_inner_language_model(model: Any) -> Any:
    """Return the module of the model's text config that generates text by itself; None if there is none."""
    from transformers import GenerationMixin

    if getattr(model.config, "is_encoder_decoder", False):
        return None
    text = model.config.get_text_config(decoder=True)
    for module in model.modules():
        if module is not model and isinstance(module, GenerationMixin):
            if module.config.get_text_config(decoder=True) is text:
                return module
    return None
