"""Time the readout: from normalized streams to lse, entropy, loss and argmax of every token.

The limit is the product of the same matrices in the model's dtype, written slice by slice into memory that is already
allocated.
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

from .timing import append_results, make_table, quartiles, wide_console

LIMIT = "product alone"
_VOCAB_SLICE = 8192


@dataclass(frozen=True, slots=True)
class Shape:
    """Shapes of the product: streams (tokens, width) and unembedding (vocabulary, width)."""

    tokens: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    device: str

    @property
    def flops(self) -> int:
        """Return the floating-point operations of the product."""
        return 2 * self.tokens * self.width * self.vocabulary


Method = Callable[[], Any]


def _dense(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> LogitStats:
    """Compute all logits at once, in float32."""
    logits = (x @ w.T).float()
    log = logits.log_softmax(-1)
    lse = logits[:, 0] - log[:, 0]
    best, top = log.max(-1)
    return LogitStats(lse, -(log.exp() * log).sum(-1), -log.gather(-1, target[:, None])[:, 0], top, best.exp())


def list_methods(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> dict[str, Method | str]:
    """Return all methods by name; a string instead of a function says why the method cannot run."""
    readout = Unembedding(None, None, SimpleNamespace(weight=w))  # type: ignore[arg-type] # its block runner is not used
    methods: dict[str, Method | str] = {
        LIMIT: product_alone(x, w),
        "layersurgery, in tiles": lambda: tiled.logit_stats(readout, x, target),
        "layersurgery, fused": "it is for half precision on CUDA",
        "layersurgery, in tiles, compiled": lambda: tiled.logit_stats(readout, x, target, compiled=True),
        "all logits at once": lambda: _dense(x, w, target),
        "cut-cross-entropy (loss only)": _if_available(cut_cross_entropy, x, w, target),
        "Liger (loss only)": _if_available(liger, x, w, target),
    }
    if x.is_cuda and x.element_size() == 2:
        from layersurgery.metrics import dispatch

        methods["layersurgery, fused"] = lambda: dispatch._logit_stats(readout, x, target, compiled=False)
    return methods


def product_alone(x: torch.Tensor, w: torch.Tensor) -> Method:
    """Return the product of x and the unembedding, slice by slice into memory that is already allocated."""
    out = torch.empty(len(x) * _VOCAB_SLICE, dtype=x.dtype, device=x.device)

    def multiply() -> None:
        for rows in torch.split(w, _VOCAB_SLICE):
            torch.mm(x, rows.T, out=out[: len(x) * len(rows)].view(len(x), len(rows)))

    return multiply


def _if_available(
    method: Callable[..., Method], x: torch.Tensor, w: torch.Tensor, target: torch.Tensor
) -> Method | str:
    """Return another library's method, or why it cannot run."""
    if not x.is_cuda:
        return "it is for CUDA"
    try:
        return method(x, w, target)
    except ImportError:
        return "it is not installed"


def cut_cross_entropy(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> Method:
    """Return the loss of cut-cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(x, w, target, reduction="none")


def liger(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> Method:
    """Return the loss of Liger."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda: loss(w, x, target)


def measure(shape: Shape, runs: int, *, as_json: bool = False, name: str = "readout") -> list[dict[str, Any]]:
    """Check all methods, time them in turn, print a table, append its rows to the results, and return them."""
    console = wide_console(stderr=as_json)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.tokens, shape.width, generator=generator).to(shape.device, shape.dtype)
    w = (torch.randn(shape.vocabulary, shape.width, generator=generator) * shape.width**-0.5 * 3).to(
        shape.device, shape.dtype
    )
    target = torch.randint(0, shape.vocabulary, (shape.tokens,), generator=generator).to(shape.device)
    times: dict[str, list[float]] = {}
    extra_memory: dict[str, int] = {}
    errors: dict[str, str] = {}
    with torch.inference_mode():
        methods = list_methods(x, w, target)
        for method_name, method in methods.items():
            errors[method_name] = (
                method if isinstance(method, str) else _find_error(method_name, method(), x, w, target)
            )
        for _ in range(runs):
            for method_name, method in methods.items():
                if isinstance(method, str) or errors[method_name]:
                    continue
                with (
                    _MemoryMeter(shape.device, extra_memory, method_name),
                    reuse_cpu_memory() if shape.device == "cpu" else nullcontext(),
                ):
                    for counts in (False, True):  # the first run warms up caches and memory
                        started = time.perf_counter()
                        method()
                        _synchronize(shape.device)
                        if counts:
                            times.setdefault(method_name, []).append(time.perf_counter() - started)
    rows = _make_rows(shape, list(methods), times, extra_memory, errors)
    console.print(_make_table(shape, rows))
    console.print(f"Appended to {append_results(name, rows)}")
    return rows


class _MemoryMeter:
    """Context that records the peak of memory above the memory in use before."""

    def __init__(self, device: str, extra_memory: dict[str, int], method: str) -> None:
        self.device, self.extra_memory, self.method = device, extra_memory, method

    def __enter__(self) -> None:
        gc.collect()
        if self.device != "cpu":
            _synchronize(self.device)
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
        self.before = _read_status("VmRSS")

    def __exit__(self, *_: object) -> None:
        peak = _read_status("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated()
        self.extra_memory[self.method] = max(self.extra_memory.get(self.method, 0), peak - self.before)


def _read_status(field: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _find_error(method: str, result: Any, x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> str:
    """Describe what is wrong with a result; return "" if nothing is.

    The first tokens are compared with float64. The tolerance allows for logits that were rounded to half precision.
    """
    if method == LIMIT:
        return ""
    rows = slice(0, min(64, len(x)))
    logits = x[rows].double() @ w.double().T
    log = logits.log_softmax(-1)
    expected = {"loss": -log.gather(-1, target[rows, None])[:, 0]}
    if isinstance(result, LogitStats):
        expected |= {"lse": logits.logsumexp(-1), "entropy": -(log.exp() * log).sum(-1)}
    # Other libraries keep their logits in half precision.
    tolerance = 1e-4 if method.startswith("layersurgery") or x.dtype == torch.float32 else 0.1
    for name, value in expected.items():
        actual = getattr(result, name) if isinstance(result, LogitStats) else result
        difference = float((actual[rows].double().to(value.device) - value).abs().max())
        if not difference <= tolerance:
            return f"wrong result: {name} is off by {difference:.2g}"
    return ""


def _make_rows(
    shape: Shape,
    methods: list[str],
    times: dict[str, list[float]],
    extra_memory: dict[str, int],
    errors: dict[str, str],
) -> list[dict[str, Any]]:
    limit = quartiles(times[LIMIT])[1]
    device = torch.cuda.get_device_name() if shape.device != "cpu" else "cpu"
    rows = []
    for method in methods:
        low, middle, high = quartiles(times[method]) if method in times else (None, None, None)
        rows.append({
            "way": method, "device": device, "dtype": str(shape.dtype).removeprefix("torch."), "tokens": shape.tokens,
            "width": shape.width, "vocabulary": shape.vocabulary, "runs": len(times.get(method, [])),
            "milliseconds": middle and 1e3 * middle, "milliseconds_low": low and 1e3 * low,
            "milliseconds_high": high and 1e3 * high,
            "teraflops": middle and shape.flops / middle / 1e12, "of_limit": middle and limit / middle,
            "bytes_extra": extra_memory.get(method), "fault": errors[method],
        })  # fmt: skip
    return rows


def _make_table(shape: Shape, rows: list[dict[str, Any]]) -> Table:
    dtype = str(shape.dtype).removeprefix("torch.")
    title = f"readout of {shape.tokens} tokens, {shape.width} x {shape.vocabulary}, {dtype}"
    table = make_table(title, "way", "ms", "quartiles", "TFLOP/s", "of limit", "extra MB")
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
