"""Choose the devices and the data type that a model runs with, and load it there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.quantize_on_load import check_quantize
from ..errors import PlanError, SourceError
from ..runtime.device_map import (
    DeviceMap,
    MaxMemory,
    describe,
    local_device,
    read_device_map,
    read_max_memory,
)

if TYPE_CHECKING:
    from ..checkpoints.sources import Source
    from .distributed import ProcessGroup
    from .options import RunOptions
    from .reporter import Reporter

_FREE_MEMORY_SHARE = 0.9
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")


@dataclass(frozen=True, slots=True)
class Placement:
    """Devices and data type of a model.

    Attributes:
        device: device of the whole model, or the main device that a device map is made for.
        dtype: data type of the weights.
        device_map: devices by module, or the strategy to choose them; None for a single device.
        max_memory: memory limit of each device.
        offload_folder: directory for weights that a checkpoint does not hold in the form needed.
        quantize: format to which linear layers are quantized while they are loaded; None to leave them as they are.
    """

    device: str
    dtype: str
    device_map: DeviceMap | None = None
    max_memory: MaxMemory | None = None
    offload_folder: Path | None = None
    quantize: str | None = None

    @property
    def dtypes(self) -> str:
        """Describe the data types of the weights in words."""
        return f"{self.quantize} and {self.dtype}" if self.quantize else self.dtype

    def arguments(self) -> dict[str, Any]:
        """Return what the results may depend on: the type of device (not its index), the dtype and the device map."""
        arguments = {"device": self.device.partition(":")[0], "dtype": self.dtype}
        if self.quantize is not None:
            arguments["quantize"] = self.quantize
        return (
            arguments
            if self.device_map is None
            else arguments | {"device_map": self.device_map, "max_memory": self.max_memory}
        )


def choose_placement(options: RunOptions, source: Source, reporter: Reporter) -> Placement:
    """Resolve the options for devices and data type.

    Raises:
        PlanError: the options are invalid or exclude each other.
        SourceError: the device is not available.
    """
    import torch

    if options.device and options.device_map:
        raise PlanError("give either `device` or `device_map`, not both")
    if (options.max_memory or options.offload_folder) and not options.device_map:
        raise PlanError("`max_memory` and `offload_folder` need `device_map`, for example auto")
    device_map = read_device_map(options.device_map) if isinstance(options.device_map, str) else options.device_map
    if isinstance(device_map, dict):
        device_map = {name: place if isinstance(place, int) else str(place) for name, place in device_map.items()}
    max_memory = read_max_memory(options.max_memory) if isinstance(options.max_memory, str) else options.max_memory
    folder = None if options.offload_folder is None else Path(options.offload_folder)
    device = str(options.device or "") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] == "meta":
        raise PlanError("`device` meta cannot compute; use cpu or cuda")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SourceError(f"`device` {device} cannot be used: {str(error).partition(chr(10))[0]}") from error
    dtype = _resolve_dtype(options.dtype, device, source, reporter)
    if options.quantize is not None:
        check_quantize(options.quantize, source, dtype)
    return Placement(device, dtype, device_map, max_memory, folder, options.quantize)


def _resolve_dtype(requested: str, device: str, source: Source, reporter: Reporter) -> str:
    dtype = str(requested).removeprefix("torch.")
    if dtype == "auto":
        config = json.loads((source.directory / "config.json").read_text("utf-8"))
        inner = config.get("text_config") or {}
        values = (owner.get(name) for owner in (inner, config) for name in ("dtype", "torch_dtype"))
        # If the config has no dtype, transformers takes it from the weights.
        dtype = str(next(filter(None, values), "auto")).removeprefix("torch.")
        if device == "cpu" and dtype == "float16":
            dtype = "float32"
            reporter.note(
                "the checkpoint is in float16, which few CPUs can multiply, so it is loaded in float32; "
                "`dtype` float16 keeps float16"
            )
    if dtype not in _DTYPES:
        raise PlanError(f"`dtype` {requested!r} is not supported; use float32, bfloat16, float16 or auto")
    return dtype


@contextmanager
def load_model(source: Source, placement: Placement, group: ProcessGroup) -> Iterator[Any]:
    """Load the model onto its devices.

    With several processes on a machine, each numbers its own share of the GPUs from 0.

    Raises:
        PlanError: the placement names a GPU that this process does not have.
    """
    from ..checkpoints.loading import load_weights

    quantize = placement.quantize
    if quantize is not None and placement.device_map is None:
        # Weights are quantized where they are loaded to; without a device, this is the first GPU.
        device = _local_device(placement.device, group)
        yield load_weights(source, dtype=placement.dtype, device=device, quantize=quantize)
        return
    if placement.device_map is None:
        yield load_weights(source, dtype=placement.dtype).to(_local_device(placement.device, group))
        return
    if placement.offload_folder is not None:
        placement.offload_folder.mkdir(parents=True, exist_ok=True)
    # Each process needs a directory of its own: files in it are named after weights only.
    with tempfile.TemporaryDirectory(prefix="layersurgery-offload-", dir=placement.offload_folder) as folder:
        device_map = placement.device_map
        local_map: Any = (
            {name: _local_device(device, group) for name, device in device_map.items()}
            if isinstance(device_map, dict)
            else _local_device(device_map, group)
        )
        yield load_weights(
            source,
            dtype=placement.dtype,
            device_map=local_map,
            max_memory=_resolve_max_memory(placement.max_memory, group),
            offload_folder=folder,
            quantize=quantize,
        )


def _local_device(device: int | str, group: ProcessGroup) -> int | str:
    """Return the machine's device for a device number of this process."""
    import torch

    from .distributed import assign_gpus

    return device if group.size == 1 else local_device(device, assign_gpus(group, torch.cuda.device_count()))


def _resolve_max_memory(limits: MaxMemory | None, group: ProcessGroup) -> MaxMemory | None:
    """Return the memory limits of this process's devices; by default, 90 % of what is free."""
    import psutil
    import torch

    from .distributed import assign_gpus

    if group.size == 1:
        return limits
    if limits is not None:
        return {_local_device(device, group): size for device, size in limits.items()}
    devices = assign_gpus(group, torch.cuda.device_count())
    free: MaxMemory = {device: int(_FREE_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]) for device in devices}
    return free | {"cpu": int(_FREE_MEMORY_SHARE * psutil.virtual_memory().available / group.local_size)}


def describe_placement(model: Any, placement: Placement, blocks: str) -> str:
    """Describe where a loaded model is."""
    devices = getattr(model, "hf_device_map", None)
    if placement.device_map is None or not isinstance(devices, dict):
        return str(placement.device)
    return describe(devices, blocks)
