"""Timing whole processes: wall time and peak resident memory as the operating system counts them."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Run:
    """One finished process."""

    seconds: float
    bytes_peak: int
    code: int
    said: str


# Run in a small interpreter of its own: a child's peak memory counts that of the process it was forked from.
_WATCH = """
import json, os, subprocess, sys, time
command, limit = json.loads(sys.argv[1]), float(sys.argv[2])
with open(sys.argv[3], "wb") as said:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if time.perf_counter() - started > limit:
            process.kill()
        time.sleep(0.005)
    print(json.dumps([time.perf_counter() - started, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)]))
"""


def timed(command: Sequence[str], *, env: Mapping[str, str] | None = None, limit: float = 900) -> Run:
    """Run a command to its end; its peak memory is that of its largest process."""
    with tempfile.NamedTemporaryFile() as said:
        watch = [sys.executable, "-I", "-S", "-c", _WATCH, json.dumps(list(command)), str(limit), said.name]
        found = subprocess.run(watch, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=True)
        seconds, peak, code = json.loads(found.stdout)
        return Run(seconds, peak, code, said.read().decode(errors="replace"))


@dataclass(frozen=True, slots=True)
class Summary:
    """Several runs of one way: median and quartiles of the wall time, and the greatest peak."""

    way: str
    runs: int
    seconds: float
    seconds_low: float
    seconds_high: float
    bytes_peak: int


def summary(way: str, runs: Sequence[Run]) -> Summary:
    """Condense the runs of one way."""
    low, middle, high = quartiles([run.seconds for run in runs])
    return Summary(way, len(runs), middle, low, high, max(run.bytes_peak for run in runs))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return low, middle, high


def machine() -> dict[str, str]:
    """What the figures were measured on, and with."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "memory_gib": f"{memory / 2**30:.0f}",
        "python": platform.python_version(),
    }
    for package in ("layersurgery", "torch", "transformers", "safetensors"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "none"
    return facts


def wide_console(*, stderr: bool = False) -> Console:
    """Wide enough for a table, also where the output is no terminal."""
    return Console(stderr=stderr, width=max(110, Console().width))


def table_of(title: str, first: str, *numbers: str) -> Table:
    """A table of ways and their numbers, with the machine below it."""
    table = Table(title=title, caption=", ".join(f"{name} {value}" for name, value in machine().items()))
    table.add_column(first)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def record(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Append rows, dated and with the machine, to benchmarks/results/NAME.csv."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    full = [{"date": datetime.now(UTC).date().isoformat(), **row, **machine()} for row in rows]
    before: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            before = list(csv.DictReader(file))
    names = list(dict.fromkeys(name for row in (*before, *full) for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(before + full)
    return path
