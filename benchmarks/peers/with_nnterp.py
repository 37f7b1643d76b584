"""Run the drops of the sweep with nnterp's `skip_layer`; nnterp has no swap."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from nnterp import StandardizedTransformer

from . import common


def load(task: common.Task) -> Any:
    if task.model in common.GEOMETRIES:
        raise common.UnsupportedError("it cannot load models with random weights")
    device_map = None if task.device == "cpu" else task.device
    return StandardizedTransformer(task.model, dtype=task.dtype, device_map=device_map, dispatch=True)


def unedited_logits(model: Any, batch: torch.Tensor) -> Any:
    with model.trace(batch, use_cache=False):
        logits = model.logits.save()
    return logits


def dropped_logits(model: Any, batch: torch.Tensor, layer: int) -> Any:
    with model.trace(batch, use_cache=False):
        model.skip_layer(layer)
        logits = model.logits.save()
    return logits


def measure(model: Any, task: common.Task) -> common.Rows:
    return common.measure_batches(
        task, partial(unedited_logits, model), lambda batch, edit: dropped_logits(model, batch, edit.layer)
    )


if __name__ == "__main__":
    common.main("nnterp", load, measure, supported=("drop",))
