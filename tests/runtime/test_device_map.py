"""Device maps and memory, as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from layersurgery.errors import PlanError
from layersurgery.runtime.device_map import describe, local_device, read_device_map, read_max_memory


def test_device_maps(tmp_path: Path) -> None:
    assert read_device_map(" auto ") == "auto"
    assert read_device_map("cuda:1") == "cuda:1"
    assert read_device_map("disk") == {"": "disk"}
    meant = {"model.layers": 0, "lm_head": "cpu", "model.norm": 1}
    text = '{"model.layers": 0, "lm_head": "cpu", "model.norm": "1"}'
    assert read_device_map(text) == meant
    (tmp_path / "map.json").write_text(text)
    assert read_device_map(str(tmp_path / "map.json")) == meant
    for wrong, said in {
        "atuo": "is not a map and not a file: write auto, balanced",
        '{"a": 1,}': "is not valid JSON",
        "{}": "must map names of modules to devices",
        '{"a": [1]}': "must map names of modules to devices",
        '{"a": true}': "must map names of modules to devices",
    }.items():
        with pytest.raises(PlanError, match=said):
            read_device_map(wrong)


def test_max_memory() -> None:
    assert read_max_memory("0=70GiB,1=8.5gb, cpu = 2 TiB") == {0: 70 * 2**30, 1: 8_500_000_000, "cpu": 2**41}
    for wrong in ("", "0", "0=lots", "gpu=1GB", "0=70"):
        with pytest.raises(PlanError, match=r"^`max_memory` .*write 0=70GiB,cpu=100GiB"):
            read_max_memory(wrong)


def test_each_process_counts_its_own_devices() -> None:
    assert [local_device(device, range(2, 4)) for device in (0, 1, "cuda", "cuda:1", "cpu", "disk", "auto")] == [
        2, 3, "cuda:2", "cuda:3", "cpu", "disk", "auto"
    ]  # fmt: skip
    for device in (2, "cuda:2"):
        with pytest.raises(
            PlanError, match=r"GPU 2 is requested, but each process has 2 of this machine.*start fewer processes"
        ):
            local_device(device, range(2, 4))


def test_a_map_in_words() -> None:
    blocks = {f"h.{number}": 0 if number < 2 else "disk" for number in range(5)}
    assert describe({"wte": 0, **blocks, "lm_head": "disk"}, "h") == "2 blocks on 0, 3 on disk; the rest on 0 and disk"
    assert describe({"": "disk"}, "h") == "disk"
