"""Run the sweep as a plain transformers loop: edit the list of blocks by hand, and run one batched forward per edit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import common


def edit_blocks(blocks: list[nn.Module], edit: common.Edit) -> list[nn.Module]:
    result, layer = list(blocks), edit.layer
    if edit.kind == "swap":
        result[layer], result[layer + 1] = result[layer + 1], result[layer]
    else:
        del result[layer]
    return result


def set_blocks(model: Any, blocks: list[nn.Module]) -> None:
    model.base_model.layers = nn.ModuleList(blocks)
    model.config.num_hidden_layers = len(blocks)


def measure(model: Any, task: common.Task) -> common.Rows:
    blocks = list(model.base_model.layers)

    def run_edited(batch: torch.Tensor, edit: common.Edit) -> Any:
        set_blocks(model, edit_blocks(blocks, edit))
        edited_logits = model(batch, use_cache=False).logits
        set_blocks(model, blocks)
        return edited_logits

    return common.measure_batches(task, lambda batch: model(batch, use_cache=False).logits, run_edited)


if __name__ == "__main__":
    common.main("transformers", common.load_with_transformers, measure)
