"""Run the sweep with nnsight: one trace for each edit and batch.

Blocks are skipped and called out of order as nnsight's documentation describes: nnsight.net, "Skipping Modules"
(a skipped module is not run) and "Module Access" (a module may be called on any input).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from nnsight import TransformersModel

from . import common


def load(task: common.Task) -> Any:
    if task.model in common.GEOMETRIES:
        raise common.UnsupportedError("it cannot load models with random weights")
    model = TransformersModel(task.model, task="text-generation", dtype=task.dtype, dispatch=True)
    return model.to(task.device) if task.device != "cpu" else model


def unedited_logits(model: Any, batch: torch.Tensor) -> Any:
    with model.trace(batch, use_cache=False):
        logits = model.lm_head.output.save()
    return logits


def swapped_logits(model: Any, batch: torch.Tensor, layer: int) -> Any:
    first, second = model.model.layers[layer], model.model.layers[layer + 1]
    with model.trace(batch, use_cache=False):
        (stream, *_), kwargs = first.inputs
        after_second = second(stream, **kwargs)
        first.skip(after_second)
        second.skip(first(after_second, **kwargs))
        logits = model.lm_head.output.save()
    return logits


def dropped_logits(model: Any, batch: torch.Tensor, layer: int) -> Any:
    block = model.model.layers[layer]
    with model.trace(batch, use_cache=False):
        block.skip(block.input)
        logits = model.lm_head.output.save()
    return logits


def measure(model: Any, task: common.Task) -> common.Rows:
    def edited(batch: torch.Tensor, edit: common.Edit) -> Any:
        return (swapped_logits if edit.kind == "swap" else dropped_logits)(model, batch, edit.layer)

    return common.measure_batches(task, partial(unedited_logits, model), edited)


if __name__ == "__main__":
    common.main("nnsight", load, measure)
