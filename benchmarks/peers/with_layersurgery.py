"""Run the sweep with layersurgery.

`--option compiled` compiles the blocks with PyTorch, `--option disk` leaves all weights on disk, `--option half` leaves
every second block in main memory, and `--option depth-first` runs one route after another instead of one layer after
another.
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

import layersurgery as ls

from . import common


def load(task: common.Task, *, disk: bool, half: bool) -> Any:
    model = _load_on_disk(task) if disk else common.load_with_transformers(task)
    anatomy = ls.anatomy(model)
    if half:
        _offload_every_second_block(model, anatomy, task.device)
    return model, anatomy


def _load_on_disk(task: common.Task) -> Any:
    if task.model in common.GEOMETRIES:
        raise common.UnsupportedError("a geometry has no checkpoint; --option disk needs a directory")
    with tempfile.TemporaryDirectory() as empty:  # nothing is written here: the weights stay in the checkpoint's files
        return AutoModelForCausalLM.from_pretrained(
            task.model, dtype=task.dtype, device_map={"": "disk"}, offload_folder=empty
        ).eval()


def _offload_every_second_block(model: Any, anatomy: ls.Anatomy, device: str) -> None:
    """Move every second block to main memory, or to the disk if the device is the CPU."""
    main: int | str = 0 if device.startswith("cuda") else "cpu"
    blocks = [f"{anatomy.blocks}.{number}" for number in range(anatomy.depth)]
    device_map: dict[str, int | str] = dict.fromkeys(blocks, main)
    device_map |= dict.fromkeys(blocks[1::2], "disk" if main == "cpu" else "cpu")
    for name, module in model.named_modules():
        if not any(True for _ in module.children()) and not name.startswith(f"{anatomy.blocks}."):
            device_map[name] = main
    if main != "cpu":
        # accelerate leaves the tensors of blocks on the CPU where they are, so they are moved first.
        for name in blocks[1::2]:
            model.get_submodule(name).to("cpu")
    model.offload_directory = tempfile.TemporaryDirectory(prefix="layersurgery-benchmark-")  # removed with the model
    dispatch_model(model, device_map, main_device=main, offload_dir=model.offload_directory.name, force_hooks=True)
    parameters = [parameter for name in blocks[1::2] for parameter in model.get_submodule(name).parameters()]
    assert all(parameter.is_meta for parameter in parameters), "every second block is offloaded"


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
        partial(load, disk="disk" in options, half="half" in options),
        partial(measure, compiled="compiled" in options, order=order),
    )
