"""Run all benchmarks that need a GPU: readouts, sweeps, and the time of the paper's protocol in minutes.

They use random weights and need nothing but the checkout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .readout import Shape
from .readout import measure as measure_readout
from .sweep import Setting
from .sweep import measure as measure_sweep
from .timing import make_table, wide_console

PARTS = ("readout", "small", "large")
_SHAPES = ((2048, 50304), (4096, 50432))
_SETTINGS = {
    "small": Setting("pythia-1.4b", 16, 2048, 8, "cuda", 3),
    "large": Setting("pythia-6.9b", 8, 2048, 8, "cuda", 1),
}


def measure(parts: Sequence[str], *, as_json: bool) -> list[dict[str, Any]]:
    """Run the chosen parts, and print a table of goals and results at the end.

    Raises:
        SystemExit: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found; run this benchmark on a machine with an NVIDIA GPU")
    console = wide_console(stderr=as_json)
    rows: list[dict[str, Any]] = []
    table = make_table(torch.cuda.get_device_name(), "what", "measured", "goal")
    if "readout" in parts:
        for width, vocabulary in _SHAPES:
            readout_rows = measure_readout(Shape(8192, width, vocabulary, torch.bfloat16, "cuda"), 21, as_json=as_json)
            rows += readout_rows
            fused = next(row for row in readout_rows if row["way"] == "layersurgery, fused")
            label = f"fused readout, 8192 x ({width}, {vocabulary}), bfloat16"
            table.add_row(f"{label}: share of the limit", fused["fault"] or f"{fused['of_limit']:.2f}", ">= 0.75")
            table.add_row(
                f"{label}: extra memory",
                "" if fused["fault"] else f"{fused['bytes_extra'] / 2**20:.0f} MiB",
                "< 64 MiB",
            )
    for part in ("small", "large"):
        if part in parts:
            setting = _SETTINGS[part]
            sweep_rows = measure_sweep(setting, ["bfloat16"], peers=False, as_json=as_json)
            rows += sweep_rows
            layersurgery_rows = [
                row for row in sweep_rows if row["way"].startswith("layersurgery") and not row["fault"]
            ]
            for row in layersurgery_rows:
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
