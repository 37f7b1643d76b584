"""Drop every block with neuro-scan: its own loop over the layers, one forward for each edit and batch.

neuro-scan scores the last token of a prompt by ten digits. To compare the same work, its backend gets token ids here,
and the logits of all tokens are kept, so that the metrics are those of the other scripts.
"""

from __future__ import annotations

from typing import Any

import torch

from . import common


def load(task: common.Task) -> Any:
    if task.model in common.GEOMETRIES:
        raise common.UnsupportedError("it cannot load models with random weights")
    from neuro_scan.backends.transformers_backend import TransformersBackend

    class Backend(TransformersBackend):  # type: ignore[misc]
        def _tokenize(self, text: torch.Tensor) -> tuple[torch.Tensor, None]:
            return text, None

        def _apply_lm_head(self, hidden_states: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = super()._apply_lm_head(hidden_states)
            self.logits = logits
            return logits

    backend = Backend()
    backend.load(task.model, dtype=str(task.dtype).removeprefix("torch."), device_map=task.device)
    return backend


def measure(backend: Any, task: common.Task) -> common.Rows:
    def logits(batch: torch.Tensor, dropped: list[int]) -> torch.Tensor:
        backend.forward_with_ablation(batch, dropped)
        found: torch.Tensor = backend.logits
        return found

    return common.measure_batches(
        task, lambda batch: logits(batch, []), lambda batch, edit: logits(batch, [edit.layer])
    )


if __name__ == "__main__":
    common.main("neuro-scan", load, measure, supported=("drop",))
