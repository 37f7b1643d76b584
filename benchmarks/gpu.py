"""All that is to be known of a GPU, in one go and with nothing but the checkout: readouts, sweeps, and the paper's protocol in minutes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .readout import Shape
from .readout import measure as measure_readout
from .sweep import Setting
from .sweep import measure as measure_sweep
from .timing import table_of, wide_console

PARTS = ("readout", "small", "large")
_SHAPES = ((2048, 50304), (4096, 50432))
_SETTINGS = {
    "small": Setting("pythia-1.4b", 16, 2048, 8, "cuda", 3),
    "large": Setting("pythia-6.9b", 8, 2048, 8, "cuda", 1),
}


def measure(parts: Sequence[str], *, as_json: bool) -> list[dict[str, Any]]:
    """Run the parts asked for, and print a short table last.

    Raises:
        SystemExit: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here")
    console = wide_console(stderr=as_json)
    rows: list[dict[str, Any]] = []
    table = table_of(torch.cuda.get_device_name(), "what", "measured", "goal")
    if "readout" in parts:
        for width, vocabulary in _SHAPES:
            found = measure_readout(Shape(8192, width, vocabulary, torch.bfloat16, "cuda"), 21, as_json=as_json)
            rows += found
            fused = next(row for row in found if row["way"] == "layersurgery, fused")
            what = f"fused readout, 8192 x ({width}, {vocabulary}), bfloat16"
            table.add_row(f"{what}: share of the limit", fused["fault"] or f"{fused['of_limit']:.2f}", ">= 0.75")
            table.add_row(
                f"{what}: extra memory", "" if fused["fault"] else f"{fused['bytes_extra'] / 2**20:.0f} MiB", "< 64 MiB"
            )
    for part in ("small", "large"):
        if part in parts:
            setting = _SETTINGS[part]
            found = measure_sweep(setting, ["bfloat16"], peers=False, as_json=as_json)
            rows += found
            ours = [row for row in found if row["way"].startswith("layersurgery") and not row["fault"]]
            for row in ours:
                minutes = 1e6 / row["tokens_per_second"] / 60
                goal = "<= 4 min" if part == "small" else "<= 20 min"
                table.add_row(
                    f"{setting.model}, {row['way']}: a million tokens, swap and drop", f"{minutes:.1f} min", goal
                )
                table.add_row(
                    f"{setting.model}, {row['way']}: times by hand", f"{row['times_by_hand'] or 0:.2f}", ">= 2.2"
                )
                table.add_row(f"{setting.model}, {row['way']}: share of the limit", f"{row['of_limit']:.2f}", ">= 0.6")
    console.print(table)
    return rows
