"""The loop that anybody would write with transformers: the list of blocks edited by hand, one batched forward for each edit."""

from __future__ import annotations

from typing import Any

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
    means, blocks = common.Means(), list(model.base_model.layers)
    for batch in task.batches():
        unedited = common.log_probabilities(model(batch, use_cache=False).logits)
        for edit in task.edits:
            put(model, edited(blocks, edit))
            logits = model(batch, use_cache=False).logits
            put(model, blocks)
            means.add(edit, common.metrics(unedited, common.log_probabilities(logits), batch))
    return means.rows()


if __name__ == "__main__":
    common.main("transformers", common.load_plain, measure)
