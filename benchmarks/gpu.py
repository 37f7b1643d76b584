"""Run all benchmarks that need a GPU: readouts, sweeps, offloaded weights and signals, against their goals.

They use random weights and need nothing but the checkout. Every variant is a process of its own with a time limit, so
a fault costs that variant and nothing else. Rows are written as they come, and the table of goals is printed after
each part and at the end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from . import sweep
from .observe import PLAIN
from .readout_variants import FUSED, LIMIT, MEASURE, VARIANTS
from .sweep import NO_TIME, Method, Setting
from .timing import append_results, make_table, wide_console

PARTS = ("readout", "small", "large", "offloaded", "observe")
_ROOT = Path(__file__).parent.parent
_LEAST_SECONDS = 20
_MEBIBYTE = 1 << 20
# Goals by (width, vocabulary): the fused readout's share of the rate of the product alone, 8192 tokens.
_SHARES = {(2048, 50304): 0.80, (4096, 50432): 0.85}


@dataclass(frozen=True, slots=True)
class Protocol:
    """Describe the paper's protocol on one geometry, and its goals on one H100.

    Attributes:
        setting: model and text.
        minutes: for a million tokens.
        times_by_hand: speed compared with the loop by hand.
        of_limit: share of the limit.
    """

    setting: Setting
    minutes: float
    times_by_hand: float
    of_limit: float


_PROTOCOLS = {
    "small": Protocol(Setting("pythia-1.4b", 32, 2048, 8, "cuda", 1, repeats=3), 160 / 60, 2.2, 0.6),
    "large": Protocol(Setting("pythia-6.9b", 16, 2048, 8, "cuda", 1), 13, 2.0, 0.6),
}
_OFFLOADED = Setting("pythia-6.9b", 8, 2048, 8, "cuda", 1)
_DRY = Setting("tiny", 4, 24, 2, "cpu", 1, repeats=2)
_IN_MEMORY, _HALF = "layersurgery, drops", "layersurgery, drops, half the blocks on the CPU"


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a run.

    Attributes:
        minutes: time for all parts.
        directory: where rows are written; benchmarks/results if not given.
        only: parts of names of variants and methods to run, comma-separated; empty for all.
        dry: run everything on a CPU at tiny sizes.
    """

    minutes: float = 60
    directory: Path | None = None
    only: str = ""
    dry: bool = False

    @property
    def selects_method(self) -> bool:
        """Return whether `only` selects a method of the sweeps."""
        methods = sweep.list_methods(["bfloat16"], peers=False, sequences=1, slow_sequences=1)
        return any(self.selects(method.name) for method in methods)

    def selects(self, name: str) -> bool:
        """Return whether `only` selects a variant or method."""
        return any(item in name for item in self.only.split(","))


@dataclass(slots=True)
class Report:
    """Collect what was measured: lines of the table of goals, and what failed.

    Attributes:
        title: title of the table.
        goals: quantity, measured value, goal, and whether it was met (None without a goal).
        failed: faults of layersurgery.
    """

    title: str
    goals: list[tuple[str, str, str, bool | None]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, quantity: str, value: float | None, goal: float, *, unit: str = "", at_most: bool = False) -> None:
        """Add a quantity and its goal; None for a value that could not be measured."""
        sign, text = "<=" if at_most else ">=", f"{goal:.3g}{unit}"
        if value is None:
            self.goals.append((quantity, "not measured", f"{sign} {text}", False))
            return
        met = value <= goal if at_most else value >= goal
        digits = f"{value:.2f}" if value == 0 or value >= 0.01 else f"{value:.1e}"
        self.goals.append((quantity, f"{digits}{unit}", f"{sign} {text}", met))

    def fail(self, name: str, fault: str) -> None:
        """Note a fault of layersurgery. That no time was left for it is none."""
        if fault != NO_TIME:
            self.failed.append(f"{name}: {fault}")

    def table(self, *, dry: bool) -> Table:
        """Return the table of goals."""
        table = make_table(self.title, "quantity", "measured", "goal", "met")
        for quantity, measured, goal, met in self.goals:
            table.add_row(quantity, measured, goal, "" if met is None or dry else "yes" if met else "no")
        return table


def measure(parts: Sequence[str], settings: Settings) -> list[str]:
    """Run the chosen parts, and print the table of goals after each part and at the end.

    Returns:
        The faults of layersurgery: processes that failed and wrong results. A missed goal is not a fault.

    Raises:
        SystemExit: there is no GPU.
    """
    title = _device_name(dry=settings.dry)
    report, deadline, console = Report(title), time.monotonic() + 60 * settings.minutes, wide_console()
    run: dict[str, Callable[[], None]] = {
        "readout": lambda: _measure_readout(settings, report, deadline),
        "small": lambda: _measure_protocol("small", settings, report, deadline),
        "large": lambda: _measure_protocol("large", settings, report, deadline),
        "offloaded": lambda: _measure_offloaded(settings, report, deadline),
        "observe": lambda: _measure_signals(settings, report, deadline),
    }
    for part in parts:
        if part in _PROTOCOLS and not settings.selects_method:
            console.print(f"{part}: left out, since --only selects none of its methods")
            continue
        started = time.monotonic()
        try:
            run[part]()
        except Exception as error:  # the other parts must run, whatever happens in this one
            report.fail(part, f"{type(error).__name__}: {error}")
        console.print(f"{part}: {time.monotonic() - started:.0f} s")
        console.print(report.table(dry=settings.dry))
    for fault in report.failed:
        console.print(f"failed: {fault}", markup=False)
    return report.failed


def _device_name(*, dry: bool) -> str:
    if dry:
        return "a dry run on a CPU: its figures mean nothing"
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found; run this benchmark on a machine with an NVIDIA GPU, or with --dry")
    return torch.cuda.get_device_name()


def run_process(command: Sequence[str], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Run a module of Python that prints lines of JSON.

    Args:
        command: module and arguments.
        seconds: time after which it is stopped, with all its children.

    Returns:
        The rows, also of a process that failed, and its fault: empty, or why it ended.
    """
    if seconds < _LEAST_SECONDS:
        return [], NO_TIME
    env = os.environ | {"PYTHONPATH": str(_ROOT), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as output,
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=output, stderr=errors, env=env, cwd=_ROOT, start_new_session=True
        )
        fault = ""
        try:
            if process.wait(seconds):
                fault = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            fault = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        errors.seek(0)
        rows = [json.loads(line) for line in output if line.startswith("{") and line.endswith("}\n")]
        if fault and (lines := [line.strip() for line in errors if line.strip()]):
            fault += f": {lines[-1][:200]}"
    return rows, fault


def _measure_readout(settings: Settings, report: Report, deadline: float) -> None:
    """Check and time all variants of the readout."""
    console, rows = wide_console(), []
    for variant in filter(settings.selects, VARIANTS):
        arguments = ["benchmarks.readout_variants", variant, *(["--dry"] if settings.dry else [])]
        found, fault = run_process(arguments, min(150, deadline - time.monotonic()))
        if fault:
            found.append({"variant": variant, "fault": fault})
        is_ours = variant not in (LIMIT, "cut-cross-entropy", "Liger")
        for row in found:
            if is_ours and row.get("fault"):
                report.fail(" ".join(["readout,", variant, row.get("tiling", "")]).strip(), row["fault"])
        rows += found
        _append("gpu-readout", found, report.title, settings)
        console.print(f"  {variant}: {len(found)} rows{f', {fault}' if fault else ''}", markup=False)
    console.print(_readout_table(rows))
    for row in rows:
        if row.get("fault"):
            place = " ".join(filter(None, [_shape_text(row), row["variant"], row.get("tiling")]))
            console.print(f"  {place}: {row['fault']}", markup=False)
        elif row.get("same_digits") is False:
            console.print(f"  {_shape_text(row)} {row['variant']}: a second run gave other digits", markup=False)
    for width, vocabulary in _SHARES:
        shape = (8192, width, vocabulary)
        name = f"readout, 8192 x ({width}, {vocabulary})"
        fused = next((row for row in rows if row["variant"] == FUSED and _shape(row) == shape), {})  # the chosen tiling
        report.add(f"{name}: share of the product alone", _share(fused, rows), _SHARES[width, vocabulary])
        whole = next((row for row in rows if row["variant"] == MEASURE and _shape(row) == shape), {})
        extra = whole.get("bytes_extra")
        report.add(
            f"{name}: extra memory of all metrics of an edit",
            None if extra is None else extra / _MEBIBYTE,
            64,
            unit=" MiB",
            at_most=True,
        )


def _shape(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("tokens"), row.get("width"), row.get("vocabulary")


def _share(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the time of the product alone divided by that of a row."""
    limit = next((other for other in rows if other["variant"] == LIMIT and _shape(other) == _shape(row)), {})
    if row.get("fault") or "milliseconds" not in row or "milliseconds" not in limit:
        return None
    return float(limit["milliseconds"] / row["milliseconds"])


def _readout_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table of all variants that ran, by shape and time."""
    table = make_table(
        "Readout", "tokens x (width, vocabulary), variant, tiling", "ms", "share", "TFLOP/s", "MiB", "error"
    )
    timed = [row for row in rows if "milliseconds" in row]
    for row in sorted(timed, key=lambda row: (_shape(row), row["milliseconds"])):
        errors = [value for name, value in row.items() if name.startswith("error_")]
        share, extra = _share(row, rows), row.get("bytes_extra")
        table.add_row(
            " ".join([_shape_text(row), row["variant"], row["tiling"]]),
            f"{row['milliseconds']:.3f}", "" if share is None else f"{share:.2f}", f"{row['teraflops']:.0f}",
            "" if extra is None else f"{extra / _MEBIBYTE:.0f}", f"{max(errors):.0e}" if errors else "",
        )  # fmt: skip
    return table


def _shape_text(row: dict[str, Any]) -> str:
    return "" if "tokens" not in row else f"{row['tokens']} x ({row['width']}, {row['vocabulary']})"


def _measure_protocol(part: str, settings: Settings, report: Report, deadline: float) -> None:
    """Time the sweep of swap and drop of every layer against the loop by hand and the limit."""
    protocol = _PROTOCOLS[part]
    setting = _with_deadline(_DRY if settings.dry else protocol.setting, deadline)
    methods = sweep.list_methods(["bfloat16"], peers=False, sequences=setting.sequences, slow_sequences=1)
    methods = [method for method in methods if settings.selects(method.name)]
    rows = sweep.measure(setting, [], methods=methods, name=f"gpu-{part}", directory=settings.directory)
    for row in rows:
        if not row["way"].startswith("layersurgery"):
            continue
        name = f"{setting.model}, {row['way']}"
        if row["fault"]:
            report.fail(name, row["fault"])
        speed = row["tokens_per_second"]
        report.add(
            f"{name}: a million tokens, swap and drop",
            None if speed is None else 1e6 / speed / 60,
            protocol.minutes,
            unit=" min",
            at_most=True,
        )
        report.add(f"{name}: times the loop by hand", row["times_by_hand"], protocol.times_by_hand)
        report.add(f"{name}: share of the limit", row["of_limit"], protocol.of_limit)
    if (limit := _limit_by_hand(rows)) is not None:
        report.goals.append((f"{setting.model}: the limit itself, times the loop by hand", f"{limit:.2f}", "", None))


def _limit_by_hand(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return how much faster than the loop by hand the limit is: no method can reach more."""
    speeds = {row["way"]: row["tokens_per_second"] for row in rows}
    limit, by_hand = speeds.get(sweep.LIMIT), speeds.get("loop by hand")
    return limit / by_hand if limit and by_hand else None


def _measure_offloaded(settings: Settings, report: Report, deadline: float) -> None:
    """Time drops of every layer with every second block on the CPU, and compare the metrics with those in memory."""
    setting = _with_deadline(_DRY if settings.dry else _OFFLOADED, deadline)
    methods = [
        Method(name, "with_layersurgery", "bfloat16", sequences=setting.sequences, options=options, edits="drop")
        for name, options in ((_IN_MEMORY, ()), (_HALF, ("half",)))
    ]
    results, rows = sweep.measure_without_reference(setting, methods)
    _append("gpu-offloaded", rows, report.title, settings)
    for row in rows:
        if row["fault"]:
            report.fail(f"{setting.model}, {row['way']}", row["fault"])
    speeds = [row["tokens_per_second"] for row in rows]
    name = f"{setting.model}, half the blocks on the CPU"
    ratio = speeds[1] / speeds[0] if all(speeds) else None
    report.add(f"{name}: speed, share of that in memory", ratio, 0.9)
    difference = None if len(results) < 2 else _largest_difference(*results)
    report.add(f"{name}: largest change of a metric", difference, 0, at_most=True)
    if difference:
        report.fail(name, f"wrong result: a metric differs by {difference:.2g} from that in memory")


def _largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = zip(one["rows"], other["rows"], strict=True)
    return max(abs(float(a[name]) - float(b[name])) for a, b in pairs for name in a if name != "plan")


def _measure_signals(settings: Settings, report: Report, deadline: float) -> None:
    """Time signals that are measured on the blocks while they run."""
    arguments = ["pythia-410m", "cuda"] if not settings.dry else ["tiny", "cpu", "--sequences", "2", "--context", "24"]
    rows, fault = run_process(["benchmarks.observe", *arguments], min(240, deadline - time.monotonic()))
    _append("gpu-observe", rows, report.title, settings)
    if fault:
        report.fail("observe", fault)
    table = make_table("Signals", "way", "s", "x a plain forward")
    for row in rows:
        if row.get("fault"):
            report.fail(f"observe, {row['way']}", row["fault"])
            table.add_row(f"{row['way']}: {row['fault']}")
            continue
        table.add_row(row["way"], f"{row['seconds']:.3f}", f"{row['ratio']:.2f}")
        if row["way"] != PLAIN:
            quantity = f"{row['model']}, {row['way']}: times a plain forward"
            report.goals.append((quantity, f"{row['ratio']:.2f}", "", None))
    wide_console().print(table)


def _with_deadline(setting: Setting, deadline: float) -> Setting:
    return replace(setting, deadline=deadline)


def _append(name: str, rows: Sequence[dict[str, Any]], device: str, settings: Settings) -> None:
    append_results(name, [{"device": device, **row} for row in rows], settings.directory)
