"""The loop that anybody would write with transformers: the list of blocks edited by hand, one batched forward for each edit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import common


def edited(blocks: list[nn.Module], edit: common.Edit) -> list[nn.Module]:
    after, layer = list(blocks), edit.layer
    if edit.kind == "swap":
        after[layer], after[layer + 1] = after[layer + 1], after[layer]
    else:
        del after[layer]
    return after


def put(model: Any, blocks: list[nn.Module]) -> None:
    model.base_model.layers = nn.ModuleList(blocks)
    model.config.num_hidden_layers = len(blocks)


def measure(model: Any, task: common.Task) -> common.Rows:
    blocks = list(model.base_model.layers)

    def logits(batch: torch.Tensor, edit: common.Edit) -> Any:
        put(model, edited(blocks, edit))
        found = model(batch, use_cache=False).logits
        put(model, blocks)
        return found

    return common.batched(task, lambda batch: model(batch, use_cache=False).logits, logits)


if __name__ == "__main__":
    common.main("transformers", common.load_plain, measure)
