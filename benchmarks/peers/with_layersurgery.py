"""With layersurgery; `--option compiled` has torch compile the blocks, `disk` leaves all weights on disk, and `depth-first` goes route by route."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM

import layersurgery as ls

from . import common


def load(task: common.Task, *, disk: bool) -> Any:
    model = common.load_plain(task) if not disk else _on_disk(task)
    return model, ls.anatomy(model)


def _on_disk(task: common.Task) -> Any:
    if task.model in common.GEOMETRIES:
        raise common.CannotError("there is no checkpoint of a geometry")
    with tempfile.TemporaryDirectory() as empty:  # the checkpoint holds the weights as they are wanted
        return AutoModelForCausalLM.from_pretrained(
            task.model, dtype=task.dtype, device_map={"": "disk"}, offload_folder=empty
        ).eval()


def measure(loaded: Any, task: common.Task, *, compiled: bool, order: str | None) -> common.Rows:
    model, anatomy = loaded
    plans = [edit.plan for edit in task.edits]
    frame = ls.sweep(
        model, plans, task.tokens, batch_size=task.at_once, anatomy=anatomy, compiled=compiled, order=order
    )
    return [row for row in frame[["plan", *common.METRICS]].to_dict("records") if row["plan"]]


if __name__ == "__main__":
    options = common.arguments().parse_args().option
    order = "depth-first" if "depth-first" in options else None
    common.main(
        "layersurgery",
        partial(load, disk="disk" in options),
        partial(measure, compiled="compiled" in options, order=order),
    )
