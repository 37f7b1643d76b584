"""Parse device maps and memory limits, which place a model's modules on devices."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import PlanError

AUTO = ("auto", "balanced", "balanced_low_0", "sequential")
DeviceMap = str | dict[str, int | str]
MaxMemory = dict[int | str, int]
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", re.IGNORECASE)


def read_device_map(text: str) -> DeviceMap:
    """Parse a device map: an automatic method, one device for everything, a JSON object, or a file that contains one.

    >>> from layersurgery.runtime.device_map import read_device_map
    >>> read_device_map('{"model.embed_tokens": 0, "model.layers": "disk"}')
    {'model.embed_tokens': 0, 'model.layers': 'disk'}

    Raises:
        PlanError: the text is none of these.
    """
    text = text.strip()
    if text in AUTO or re.fullmatch(r"cpu|disk|(cuda|xpu|npu|mps)(:\d+)?", text):
        return {"": text} if text == "disk" else text
    if not text.startswith("{"):
        try:
            text = Path(text).read_text("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError, ValueError):
            raise PlanError(
                f"`device_map` {text!r} is not a map and not a file: write {', '.join(AUTO)}, a device, a JSON object "
                '(\'{"model.layers.0": 0, "lm_head": "cpu"}\') or the path of a file that contains one'
            ) from None
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise PlanError(f"`device_map` is not valid JSON: {error}") from None
    malformed = not isinstance(parsed, dict) or not parsed
    if malformed or not all(
        isinstance(device, int | str) and not isinstance(device, bool) for device in parsed.values()
    ):
        raise PlanError(
            "`device_map` must map names of modules to devices (a GPU's number, cpu or disk); "
            f"found {json.dumps(parsed)[:80]}"
        )
    return {name: int(device) if str(device).isdecimal() else device for name, device in parsed.items()}


def read_max_memory(text: str) -> MaxMemory:
    """Parse the memory limit of each device, in bytes.

    >>> from layersurgery.runtime.device_map import read_max_memory
    >>> read_max_memory("0=70GiB, cpu=1.5TB")
    {0: 75161927680, 'cpu': 1500000000000}

    Raises:
        PlanError: the text cannot be parsed.
    """
    parsed: MaxMemory = {}
    for part in filter(None, map(str.strip, text.split(","))):
        device, _, size = map(str.strip, part.partition("="))
        match = _SIZE.fullmatch(size)
        if not re.fullmatch(r"\d+|cpu|mps", device) or match is None:
            raise PlanError(f"`max_memory` {part!r} is not DEVICE=SIZE: write 0=70GiB,cpu=100GiB")
        unit = (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1)
        parsed[int(device) if device.isdecimal() else device] = int(float(match[1]) * unit)
    if not parsed:
        raise PlanError("`max_memory` is empty: write 0=70GiB,cpu=100GiB")
    return parsed


def local_device(device: int | str, own_gpus: Sequence[int]) -> int | str:
    """Translate the device of one of several processes: its GPU 0 is the first of its own GPUs.

    A device that is not a GPU stays as it is.

    >>> from layersurgery.runtime.device_map import local_device
    >>> [local_device(device, range(4, 6)) for device in (1, "cuda:0", "cuda", "disk")]
    [5, 'cuda:4', 'cuda:4', 'disk']

    Raises:
        PlanError: the process has no such GPU.
    """
    match = re.fullmatch(r"(cuda:?)?(\d*)", str(device))
    if match is None or not (match[1] or match[2]):
        return device
    gpu_index = int(match[2] or 0)
    if gpu_index >= len(own_gpus):
        raise PlanError(
            f"GPU {gpu_index} is requested, but each process has {len(own_gpus)} of this machine's GPUs "
            "(numbered from 0 in each process): start fewer processes"
        )
    return f"cuda:{own_gpus[gpu_index]}" if match[1] else own_gpus[gpu_index]


def describe(devices: dict[str, Any], blocks: str) -> str:
    """Describe a device map in words: the number of blocks on each device, and the devices of the rest.

    >>> from layersurgery.runtime.device_map import describe
    >>> devices = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "disk", "lm_head": "disk"}
    >>> describe(devices, "model.layers")
    '1 block on 0, 1 on disk; the rest on 0 and disk'
    """
    block_name = re.compile(rf"{re.escape(blocks)}\.\d+")
    blocks_by_device: dict[str, int] = {}
    rest: dict[str, None] = {}
    for name, device in devices.items():
        if block_name.fullmatch(name):
            blocks_by_device[str(device)] = blocks_by_device.get(str(device), 0) + 1
        elif not block_name.match(name):
            rest[str(device)] = None
    if not blocks_by_device:
        return " and ".join(rest)
    phrases = [f"{count} on {device_name}" for device_name, count in blocks_by_device.items()]
    first_count = next(iter(blocks_by_device.values()))
    phrases[0] = phrases[0].replace(" on", f" block{'s'[: first_count != 1]} on", 1)
    return ", ".join(phrases) + (f"; the rest on {' and '.join(rest)}" if rest else "")
