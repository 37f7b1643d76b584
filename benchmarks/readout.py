"""The readout by itself: from normed streams to lse, entropy, loss and argmax of every token, beside the product alone.

The limit is the product of the same matrices, written slice by slice into memory that is there, in the dtype of the model.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.table import Table

from layersurgery.metrics import tiled
from layersurgery.metrics.tiled import LogitStats
from layersurgery.runtime.cpu_memory import reuse_cpu_memory
from layersurgery.runtime.unembedding import Unembedding

from .timing import quartiles, record, table_of, wide_console

LIMIT = "product alone"
_SLICE = 8192


@dataclass(frozen=True, slots=True)
class Shape:
    """What is read: tokens x width, by a vocabulary x width."""

    tokens: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    device: str

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.width * self.vocabulary


Way = Callable[[], Any]


def _dense(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> LogitStats:
    """All logits at once, float32, as anybody would."""
    logits = (x @ w.T).float()
    log = logits.log_softmax(-1)
    lse = logits[:, 0] - log[:, 0]
    return LogitStats(lse, -(log.exp() * log).sum(-1), -log.gather(-1, target[:, None])[:, 0], logits.argmax(-1))


def ways(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> dict[str, Way | str]:
    """All of them; a text where one cannot run says why."""
    readout = Unembedding(None, None, SimpleNamespace(weight=w))  # type: ignore[arg-type] # nothing asks for its stack
    out = torch.empty(len(x), _SLICE, dtype=x.dtype, device=x.device)

    def product() -> None:
        for start in range(0, len(w), _SLICE):
            part = w[start : start + _SLICE]
            torch.mm(x, part.T, out=out[:, : len(part)] if len(part) == _SLICE else None)

    found: dict[str, Way | str] = {
        LIMIT: product,
        "layersurgery, in tiles": lambda: tiled.logit_stats(readout, x, target),
        "layersurgery, fused": "it is for half precision on CUDA",
        "layersurgery, in tiles, compiled": lambda: tiled.logit_stats(readout, x, target, compiled=True),
        "all logits at once": lambda: _dense(x, w, target),
        "cut-cross-entropy (loss only)": _cut_cross_entropy(x, w, target),
        "Liger (loss only)": _liger(x, w, target),
    }
    if x.is_cuda and x.element_size() == 2:
        from layersurgery.metrics import dispatch

        found["layersurgery, fused"] = lambda: dispatch._logit_stats(readout, x, target, compiled=False)
    return found


def _cut_cross_entropy(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> Way | str:
    if not x.is_cuda:
        return "it is for CUDA"
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return "it is not installed"
    return lambda: linear_cross_entropy(x, w, target, reduction="none")


def _liger(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> Way | str:
    if not x.is_cuda:
        return "it is for CUDA"
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return "it is not installed"
    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda: loss(w, x, target)


def measure(shape: Shape, runs: int, *, as_json: bool = False, name: str = "readout") -> list[dict[str, Any]]:
    """Check all ways, time them in turn, and print a table; returns its rows, which are appended to the results."""
    console = wide_console(stderr=as_json)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.tokens, shape.width, generator=generator).to(shape.device, shape.dtype)
    w = (torch.randn(shape.vocabulary, shape.width, generator=generator) * shape.width**-0.5 * 3).to(
        shape.device, shape.dtype
    )
    target = torch.randint(0, shape.vocabulary, (shape.tokens,), generator=generator).to(shape.device)
    times: dict[str, list[float]] = {}
    extra: dict[str, int] = {}
    faults: dict[str, str] = {}
    with torch.inference_mode():
        known = ways(x, w, target)
        for way, work in known.items():
            faults[way] = work if isinstance(work, str) else _wrong(way, work(), x, w, target)
        for _ in range(runs):
            for way, work in known.items():
                if isinstance(work, str) or faults[way]:
                    continue
                with _memory(shape.device, extra, way), reuse_cpu_memory() if shape.device == "cpu" else nullcontext():
                    for counted in (False, True):  # the first one warms caches and memory
                        started = time.perf_counter()
                        work()
                        _wait(shape.device)
                        if counted:
                            times.setdefault(way, []).append(time.perf_counter() - started)
    rows = _rows(shape, list(known), times, extra, faults)
    console.print(_table(shape, rows))
    console.print(f"Appended to {record(name, rows)}")
    if red := [row["fault"] for row in rows if "gate is red" in row["fault"] and row["way"].startswith("layersurgery")]:
        raise SystemExit(f"layersurgery: {red[0]}")
    return rows


class _memory:  # noqa: N801 - a context
    """Notes how much more memory than before was in use."""

    def __init__(self, device: str, extra: dict[str, int], way: str) -> None:
        self.device, self.extra, self.way = device, extra, way

    def __enter__(self) -> None:
        gc.collect()
        if self.device != "cpu":
            _wait(self.device)
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.before = _status("VmRSS")

    def __exit__(self, *_: object) -> None:
        peak = _status("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated()
        self.extra[self.way] = max(self.extra.get(self.way, 0), peak - self.before)


def _status(field: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _wrong(way: str, found: Any, x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> str:
    """What is wrong with a result, judged on some tokens by float64; rounding of logits in half precision is allowed for."""
    if way == LIMIT:
        return ""
    some = slice(0, min(64, len(x)))
    logits = x[some].double() @ w.double().T
    log = logits.log_softmax(-1)
    meant = {"loss": -log.gather(-1, target[some, None])[:, 0]}
    if isinstance(found, LogitStats):
        meant |= {"lse": logits.logsumexp(-1), "entropy": -(log.exp() * log).sum(-1)}
    # Others keep their logits in half precision.
    tolerance = 1e-4 if way.startswith("layersurgery") or x.dtype == torch.float32 else 0.1
    for name, value in meant.items():
        given = getattr(found, name) if isinstance(found, LogitStats) else found
        off = float((given[some].double().to(value.device) - value).abs().max())
        if not off <= tolerance:
            return f"the gate is red: {name} is off by {off:.2g}"
    return ""


def _rows(
    shape: Shape, known: list[str], times: dict[str, list[float]], extra: dict[str, int], faults: dict[str, str]
) -> list[dict[str, Any]]:
    limit = quartiles(times[LIMIT])[1]
    device = torch.cuda.get_device_name() if shape.device != "cpu" else "cpu"
    rows = []
    for way in known:
        low, middle, high = quartiles(times[way]) if way in times else (None, None, None)
        rows.append({
            "way": way, "device": device, "dtype": str(shape.dtype).removeprefix("torch."), "tokens": shape.tokens, "width": shape.width,
            "vocabulary": shape.vocabulary, "runs": len(times.get(way, [])),
            "milliseconds": middle and 1e3 * middle, "milliseconds_low": low and 1e3 * low, "milliseconds_high": high and 1e3 * high,
            "teraflops": middle and shape.flops / middle / 1e12, "of_limit": middle and limit / middle,
            "bytes_extra": extra.get(way), "fault": faults[way],
        })  # fmt: skip
    return rows


def _table(shape: Shape, rows: list[dict[str, Any]]) -> Table:
    title = f"readout of {shape.tokens} tokens, {shape.width} x {shape.vocabulary}, {str(shape.dtype).removeprefix('torch.')}"
    table = table_of(title, "way", "ms", "quartiles", "TFLOP/s", "of limit", "extra MB")
    for row in rows:
        if row["fault"]:
            table.add_row(f"{row['way']}: {row['fault']}")
            continue
        spread = f"{row['milliseconds_low']:.1f}-{row['milliseconds_high']:.1f}"
        table.add_row(
            row["way"], f"{row['milliseconds']:.1f}", spread, f"{row['teraflops']:.2f}", f"{row['of_limit']:.2f}",
            f"{row['bytes_extra'] / 1e6:.0f}",
        )  # fmt: skip
    return table
