"""Where and in what precision a model is to run: the options for it, resolved and said out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layersurgery.errors import PlanError, SourceError
from layersurgery.runtime.device_map import (
    DeviceMap,
    MaxMemory,
    describe,
    local_device,
    read_device_map,
    read_max_memory,
)

if TYPE_CHECKING:
    from layersurgery.checkpoints.sources import Source
    from layersurgery.runs.distributed import ProcessGroup

    from ..terminal.console import Console
    from .run_options import MeasureOptions

_SHARE = 0.9
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model runs.

    Attributes:
        device: of the whole model; of a dispatched one, what the map is made for.
        dtype: of its weights.
        device_map: of modules to devices, or a way to make one; None for one device.
        max_memory: that each device may give.
        offload_folder: for weights that a checkpoint does not hold as they are wanted.
    """

    device: str
    dtype: str
    device_map: DeviceMap | None = None
    max_memory: MaxMemory | None = None
    offload_folder: Path | None = None

    def arguments(self) -> dict[str, Any]:
        """What the digits may depend on: the kind of device, not which of several equal ones; and how a model is spread over kinds."""
        where = {"device": self.device.partition(":")[0], "dtype": self.dtype}
        return (
            where if self.device_map is None else where | {"device_map": self.device_map, "max_memory": self.max_memory}
        )


def choose_placement(options: MeasureOptions, source: Source, console: Console) -> Placement:
    """Device and dtype, said out.

    Raises:
        PlanError: options that cannot be meant.
        SourceError: a device that is not there.
    """
    import torch

    if options.device and options.device_map:
        raise PlanError("give either --device or --device-map")
    if (options.max_memory or options.offload_folder) and not options.device_map:
        raise PlanError("--max-memory and --offload-folder go with --device-map, as in --device-map auto")
    device_map = read_device_map(options.device_map) if options.device_map else None
    max_memory = read_max_memory(options.max_memory) if options.max_memory else None
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] == "meta":
        raise PlanError("--device meta computes nothing; write cpu or cuda")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SourceError(f"--device {device} cannot be used: {str(error).partition(chr(10))[0]}") from error
    return Placement(
        device, _dtype(options.dtype, device, source, console), device_map, max_memory, options.offload_folder
    )


def _dtype(asked: str, device: str, source: Source, console: Console) -> str:
    dtype = asked.removeprefix("torch.")
    if dtype == "auto":
        config = json.loads((source.directory / "config.json").read_text("utf-8"))
        inner = config.get("text_config") or {}
        named = (owner.get(name) for owner in (inner, config) for name in ("dtype", "torch_dtype"))
        # Where no config says it, transformers looks at the weights.
        dtype = str(next(filter(None, named), "auto")).removeprefix("torch.")
        if device == "cpu" and dtype == "float16":
            dtype = "float32"
            console.log(
                "Note: the checkpoint is in float16, which few CPUs multiply at all, so it is loaded in float32; --dtype float16 insists"
            )
    if dtype not in _DTYPES:
        raise PlanError(f"--dtype {asked!r} is not one to run a model in; write float32, bfloat16, float16 or auto")
    return dtype


@contextmanager
def load_model(source: Source, place: Placement, group: ProcessGroup) -> Iterator[Any]:
    """The model where it is to be; of several processes, each counts its own share of the GPUs from 0.

    Raises:
        PlanError: a GPU that this process does not have.
    """
    from layersurgery.checkpoints.loading import load

    if place.device_map is None:
        yield load(source.directory, dtype=place.dtype).model.to(_own(place.device, group))
        return
    if place.offload_folder is not None:
        place.offload_folder.mkdir(parents=True, exist_ok=True)
    # One's own, for what is written there is named after weights only.
    with tempfile.TemporaryDirectory(prefix="layersurgery-offload-", dir=place.offload_folder) as folder:
        given = place.device_map
        spread: Any = (
            {name: _own(device, group) for name, device in given.items()}
            if isinstance(given, dict)
            else _own(given, group)
        )
        yield load(
            source.directory,
            dtype=place.dtype,
            device_map=spread,
            max_memory=_memory(place.max_memory, group),
            offload_folder=folder,
        ).model


def _own(device: int | str, group: ProcessGroup) -> int | str:
    """One of this process's own devices."""
    import torch

    from layersurgery.runs.distributed import own_devices

    return device if group.size == 1 else local_device(device, own_devices(group, torch.cuda.device_count()))


def _memory(asked: MaxMemory | None, group: ProcessGroup) -> MaxMemory | None:
    """What each device may give to this process; where nothing is asked, most of what is free of its share."""
    import psutil
    import torch

    from layersurgery.runs.distributed import own_devices

    if group.size == 1:
        return asked
    if asked is not None:
        return {_own(device, group): size for device, size in asked.items()}
    mine = own_devices(group, torch.cuda.device_count())
    found: MaxMemory = {device: int(_SHARE * torch.cuda.mem_get_info(device)[0]) for device in mine}
    return found | {"cpu": int(_SHARE * psutil.virtual_memory().available / group.local_size)}


def describe_placement(model: Any, place: Placement, blocks: str) -> str:
    """Where a loaded model is, in words."""
    devices = getattr(model, "hf_device_map", None)
    if place.device_map is None or not isinstance(devices, dict):
        return str(place.device)
    return describe(devices, blocks)
