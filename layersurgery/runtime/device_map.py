"""Where a model is to be: maps of modules to devices, and how much memory each device may give, as people write them."""

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
    """A device map from its text: a way to make one, a device for everything, a JSON object, or a file that holds one.

    >>> read_device_map('{"model.embed_tokens": 0, "model.layers": "disk"}')
    {'model.embed_tokens': 0, 'model.layers': 'disk'}

    Raises:
        PlanError: it is none of these.
    """
    text = text.strip()
    if text in AUTO or re.fullmatch(r"cpu|disk|(cuda|xpu|npu|mps)(:\d+)?", text):
        return {"": text} if text == "disk" else text
    if not text.startswith("{"):
        try:
            text = Path(text).read_text("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError, ValueError):
            raise PlanError(
                f"--device-map {text!r} is no map and no file: write {', '.join(AUTO)}, a device, a JSON object "
                '(\'{"model.layers.0": 0, "lm_head": "cpu"}\') or the path of a file that holds one'
            ) from None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise PlanError(f"--device-map is no JSON: {error}") from None
    wrong = not isinstance(found, dict) or not found
    if wrong or not all(isinstance(device, int | str) and not isinstance(device, bool) for device in found.values()):
        raise PlanError(
            f"--device-map maps names of modules to devices (a GPU's number, cpu or disk), not {json.dumps(found)[:80]}"
        )
    return {name: int(device) if str(device).isdecimal() else device for name, device in found.items()}


def read_max_memory(text: str) -> MaxMemory:
    """How much each device may give, in bytes, from text.

    >>> read_max_memory("0=70GiB, cpu=1.5TB")
    {0: 75161927680, 'cpu': 1500000000000}

    Raises:
        PlanError: it cannot be read.
    """
    found: MaxMemory = {}
    for part in filter(None, map(str.strip, text.split(","))):
        device, _, size = map(str.strip, part.partition("="))
        match = _SIZE.fullmatch(size)
        if not re.fullmatch(r"\d+|cpu|mps", device) or match is None:
            raise PlanError(f"--max-memory {part!r} is no DEVICE=SIZE: write 0=70GiB,cpu=100GiB")
        unit = (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1)
        found[int(device) if device.isdecimal() else device] = int(float(match[1]) * unit)
    if not found:
        raise PlanError("--max-memory is empty: write 0=70GiB,cpu=100GiB")
    return found


def local_device(device: int | str, own: Sequence[int]) -> int | str:
    """A device as one of several processes means it: its own first GPU is its 0, and so on; what is no GPU is left.

    >>> renumbered(1, range(4, 6)), renumbered("cuda:0", range(4, 6)), renumbered("cuda", range(4, 6)), renumbered("disk", range(4, 6))
    (5, 'cuda:4', 'cuda:4', 'disk')

    Raises:
        PlanError: the process has no such GPU.
    """
    match = re.fullmatch(r"(cuda:?)?(\d*)", str(device))
    if match is None or not (match[1] or match[2]):
        return device
    number = int(match[2] or 0)
    if number >= len(own):
        raise PlanError(
            f"GPU {number} is asked for, and each process has {len(own)} of this machine's (its own are numbered from 0): start fewer processes"
        )
    return f"cuda:{own[number]}" if match[1] else own[number]


def describe(devices: dict[str, Any], blocks: str) -> str:
    """A device map in words: how many blocks, and what else, is where.

    >>> describe({"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "disk", "lm_head": "disk"}, "model.layers")
    '1 block on 0, 1 on disk; the rest on 0 and disk'
    """
    number = re.compile(rf"{re.escape(blocks)}\.\d+")
    places: dict[str, int] = {}
    rest: dict[str, None] = {}
    for name, device in devices.items():
        if number.fullmatch(name):
            places[str(device)] = places.get(str(device), 0) + 1
        elif not number.match(name):
            rest[str(device)] = None
    if not places:
        return " and ".join(rest)
    counted = [f"{count} on {place}" for place, count in places.items()]
    first = next(iter(places.values()))
    counted[0] = counted[0].replace(" on", f" block{'s'[: first != 1]} on", 1)
    return ", ".join(counted) + (f"; the rest on {' and '.join(rest)}" if rest else "")
