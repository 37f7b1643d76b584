"""Run the sweep with layersurgery.

`--option compiled` compiles the blocks with PyTorch, `--option disk` leaves all weights on disk, and
`--option depth-first` runs one route after another instead of one layer after another.
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM

import layersurgery as ls

from . import common


def load(task: common.Task, *, disk: bool) -> Any:
    model = common.load_with_transformers(task) if not disk else _load_on_disk(task)
    return model, ls.anatomy(model)


def _load_on_disk(task: common.Task) -> Any:
    if task.model in common.GEOMETRIES:
        raise common.UnsupportedError("a geometry has no checkpoint; --option disk needs a directory")
    with tempfile.TemporaryDirectory() as empty:  # nothing is written here: the weights stay in the checkpoint's files
        return AutoModelForCausalLM.from_pretrained(
            task.model, dtype=task.dtype, device_map={"": "disk"}, offload_folder=empty
        ).eval()


def measure(loaded: Any, task: common.Task, *, compiled: bool, order: str | None) -> common.Rows:
    model, anatomy = loaded
    plans = [edit.plan for edit in task.edits]
    frame = ls.sweep(
        model, plans, task.tokens, batch_size=task.batch_size, anatomy=anatomy, compile=compiled, schedule=order
    )
    return [row for row in frame[["plan", *common.METRICS]].to_dict("records") if row["plan"]]


if __name__ == "__main__":
    options = common.argument_parser().parse_args().option
    order = "depth-first" if "depth-first" in options else None
    common.main(
        "layersurgery",
        partial(load, disk="disk" in options),
        partial(measure, compiled="compiled" in options, order=order),
    )
