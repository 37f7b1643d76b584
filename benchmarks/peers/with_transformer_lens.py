"""Run the paper's procedure with TransformerLens: two forwards per sample and edit, one sample at a time.

It follows "The Remarkable Robustness of LLMs" (arXiv 2406.19384) and its authors' published code, which keep the values
of all tokens in Python lists. Three things are made cheaper for them: a swap exchanges two blocks of the loaded model
instead of loading it again, weights are not processed, and tokens are not decoded. A drop uses hooks to replace the
block's output with its input.
"""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import get_pretrained_model_config, get_pretrained_state_dict

from . import common


def load(task: common.Task) -> Any:
    """Load a model from a directory.

    `HookedTransformer.from_pretrained` does not take local directories, so this repeats its steps.
    """
    if task.model in common.GEOMETRIES:
        raise common.UnsupportedError("it cannot load models with random weights")
    hf_model = common.load_with_transformers(task)
    config = get_pretrained_model_config(task.model, device=task.device, dtype=task.dtype)
    model = HookedTransformer(config)
    weights = get_pretrained_state_dict(task.model, config, hf_model, dtype=task.dtype)
    no_processing = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    model.load_and_process_state_dict(weights, **no_processing)
    return model.eval()


def edited_logits(model: Any, sample: torch.Tensor, edit: common.Edit) -> Any:
    layer = edit.layer
    if edit.kind == "swap":
        blocks = model.blocks
        blocks[layer], blocks[layer + 1] = blocks[layer + 1], blocks[layer]
        try:
            return model(sample, return_type="logits")
        finally:
            blocks[layer], blocks[layer + 1] = blocks[layer + 1], blocks[layer]
    stream: dict[str, torch.Tensor] = {}

    def save(resid: torch.Tensor, **_: Any) -> None:
        stream["before"] = resid

    def restore(*_: Any, **__: Any) -> torch.Tensor:
        return stream["before"]

    hooks = [(f"blocks.{layer}.hook_resid_pre", save), (f"blocks.{layer}.hook_resid_post", restore)]
    return model.run_with_hooks(sample, return_type="logits", fwd_hooks=hooks)


def measure(model: Any, task: common.Task) -> common.Rows:
    means = common.Means()
    for edit in task.edits:
        values_by_metric: list[list[float]] = [[] for _ in common.METRICS]
        for sample in torch.split(task.tokens.to(task.device), 1):
            unedited = common.log_probabilities(model(sample, return_type="logits"))
            edited = common.log_probabilities(edited_logits(model, sample, edit))
            for column, values in zip(values_by_metric, common.metrics(unedited, edited, sample), strict=True):
                column.extend(values.tolist())
        means.add(edit, torch.tensor(values_by_metric))
    return means.rows()


if __name__ == "__main__":
    common.main("transformer-lens", load, measure)
