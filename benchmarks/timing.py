"""Measure the wall time and the peak resident memory of whole processes, and append results to CSV files.

A method is one of the ways to do a job that a benchmark compares. The CSV column `way` holds its name.
"""

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
from pathlib import Path
from statistics import quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from .peers.common import library_version

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Run:
    """Result of one finished process.

    Attributes:
        seconds: wall time.
        bytes_peak: peak resident memory of its largest process.
        exit_code: of the process; negative if a signal ended it.
        output: its stdout and stderr together.
        cpu_seconds: CPU time of the process and its children, which says more than wall time on a busy machine.
    """

    seconds: float
    bytes_peak: int
    exit_code: int
    output: str
    cpu_seconds: float = 0.0


# Runs in a separate small interpreter: the peak memory of a child process includes that of the process that forked it.
_MEASURE_SCRIPT = """
import json, os, subprocess, sys, time
command, limit = json.loads(sys.argv[1]), float(sys.argv[2])
with open(sys.argv[3], "wb") as output:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if time.perf_counter() - started > limit:
            process.kill()
        time.sleep(0.005)
    cpu = usage.ru_utime + usage.ru_stime
    print(json.dumps([time.perf_counter() - started, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status), cpu]))
"""


def run_timed(command: Sequence[str], *, env: Mapping[str, str] | None = None, limit: float = 900) -> Run:
    """Run a command until it ends, and measure its time and memory.

    Args:
        command: program and arguments.
        env: environment variables to add to the current ones.
        limit: seconds after which the process is killed.

    Returns:
        The finished run. Its peak memory is that of its largest process.
    """
    with tempfile.NamedTemporaryFile() as output:
        measure = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            _MEASURE_SCRIPT,
            json.dumps(list(command)),
            str(limit),
            output.name,
        ]
        finished = subprocess.run(
            measure, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=True
        )
        seconds, peak, exit_code, cpu = json.loads(finished.stdout)
        return Run(seconds, peak, exit_code, output.read().decode(errors="replace"), cpu)


@dataclass(frozen=True, slots=True)
class Summary:
    """Summary of several runs of one method: median and quartiles of the wall time, and the highest peak memory."""

    way: str
    runs: int
    seconds: float
    seconds_low: float
    seconds_high: float
    bytes_peak: int


def summarize(method: str, runs: Sequence[Run]) -> Summary:
    """Summarize the runs of one method."""
    low, middle, high = quartiles([run.seconds for run in runs])
    return Summary(method, len(runs), middle, low, high, max(run.bytes_peak for run in runs))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return low, middle, high


def describe_machine() -> dict[str, str]:
    """Return the machine and the package versions that results were measured with."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _read_lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    description = {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "memory_gib": f"{memory / 2**30:.0f}",
        "python": platform.python_version(),
    }
    for package in ("layersurgery", "torch", "triton", "transformers", "safetensors"):
        try:
            description[package] = library_version(package)
        except ImportError:
            description[package] = "none"
    return description


def wide_console(*, stderr: bool = False) -> Console:
    """Return a console that is wide enough for a table, also if the output is not a terminal."""
    return Console(stderr=stderr, width=max(110, Console().width))


def make_table(title: str, first: str, *number_columns: str) -> Table:
    """Return an empty table with a column of names, columns of numbers, and the machine as its caption."""
    table = Table(title=title, caption=", ".join(f"{name} {value}" for name, value in describe_machine().items()))
    table.add_column(first)
    for column in number_columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def append_results(name: str, rows: Sequence[Mapping[str, Any]], directory: Path | None = None) -> Path:
    """Append rows, with date and machine, to NAME.csv in a directory (benchmarks/results), and return its path."""
    directory = directory or RESULTS
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.csv"
    dated = [{"date": datetime.now(UTC).date().isoformat(), **row, **describe_machine()} for row in rows]
    existing: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            existing = list(csv.DictReader(file))
    names = list(dict.fromkeys(name for row in (*existing, *dated) for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(existing + dated)
    return path
