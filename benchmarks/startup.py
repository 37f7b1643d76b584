"""Time how long a sweep takes until its first number, and how long commands that only read take.

The first number is the loss of the unedited model on the first batch. The floor is a script that imports torch and
transformers, loads the same model and tokenizer, and computes the same loss in one forward.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from layersurgery.checkpoints.sources import find_source

from .timing import Run, append_results, make_table, run_timed, wide_console

FLOOR, SWEEP = "transformers alone", "layersurgery sweep"
_TOLERANCE = 1e-3
# Modules are compiled once and then read, as on a user's machine; one thread, so that waiting threads use no CPU time.
_ENV = {"PYTHONDONTWRITEBYTECODE": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def measure(
    runs: int, model: str, tokens: int, *, as_json: bool = False, name: str = "startup"
) -> list[dict[str, Any]]:
    """Time each command `runs` times, in turn with the others; a first run that does not count warms up the caches.

    Args:
        runs: runs of each command that count.
        model: name of the model; it is converted before, if it needs that.
        tokens: tokens of the one sequence.
        as_json: print progress on stderr, since stdout is for JSON.
        name: name of the results file.

    Returns:
        The rows of the table, which are appended to the results.

    Raises:
        SystemExit: a command failed, or the sweep's first number is not that of transformers.
    """
    console = wide_console(stderr=as_json)
    directory = find_source(model).directory
    with tempfile.TemporaryDirectory(prefix="layersurgery-benchmark-") as work:
        commands = _list_commands(model, directory, tokens, Path(work) / "out")
        finished: dict[str, list[Run]] = {command: [] for command in commands}
        for number in range(runs + 1):
            for method, command in commands.items():
                shutil.rmtree(Path(work) / "out", ignore_errors=True)
                run = run_timed(command, env=_ENV)
                if run.exit_code:
                    raise SystemExit(f"{method} failed: {run.output[-2000:]}")
                if number:
                    finished[method].append(run)
    check_same_loss([_facts(run) for method in (FLOOR, SWEEP) for run in finished[method]])
    floor = median(run.cpu_seconds for run in finished[FLOOR])
    table = make_table(f"{model}, {tokens} tokens, one thread", "way", "phase", "CPU s", "wall s", "x the floor")
    rows: list[dict[str, Any]] = []
    for method, of_method in finished.items():
        for row in (_total(method, of_method), *_phases(method, of_method)):
            ratio = row["cpu_seconds"] / floor if method in (FLOOR, SWEEP) else None
            rows.append({**row, "model": model, "tokens": tokens, "runs": runs, "ratio_to_floor": ratio})
            numbers = (f"{row['cpu_seconds']:.2f}", f"{row['seconds']:.2f}", "" if ratio is None else f"{ratio:.2f}")
            table.add_row(method, row["phase"], *numbers)
    console.print(table)
    console.print(f"Appended to {append_results(name, rows)}")
    return rows


def _list_commands(model: str, directory: Path, tokens: int, output: Path) -> dict[str, list[str]]:
    first_number = [sys.executable, "-m", "benchmarks.first_number"]
    text = ["--data", "pydoc", "--tokens", str(tokens), "--context", str(tokens), "-o", str(output)]
    terminal = [sys.executable, "-m", "layersurgery_cli"]
    return {
        FLOOR: [*first_number, "plain", str(directory), str(tokens)],
        SWEEP: [*first_number, "layersurgery", "sweep", model, *text],
        "layersurgery --help": [*terminal, "--help"],
        "layersurgery drop --help": [*terminal, "drop", "--help"],
        "layersurgery inspect": [*terminal, "inspect", model],
    }


def check_same_loss(facts: list[dict[str, Any]]) -> None:
    """Check that all runs gave the same loss.

    Raises:
        SystemExit: they did not.
    """
    losses = [run["loss_nats"] for run in facts]
    if not all(abs(loss - losses[0]) <= _TOLERANCE for loss in losses):  # also refuses NaN
        raise SystemExit(f"wrong result: the losses of the unedited model are {losses}")


def _facts(run: Run) -> dict[str, Any]:
    """Return what a process printed of its phases."""
    facts: dict[str, Any] = json.loads(next(line for line in run.output.splitlines() if line.startswith("{")))
    return facts


def _total(method: str, runs: list[Run]) -> dict[str, Any]:
    cpu_seconds, seconds = median(run.cpu_seconds for run in runs), median(run.seconds for run in runs)
    return {"way": method, "phase": "total", "cpu_seconds": cpu_seconds, "seconds": seconds}


def _phases(method: str, runs: list[Run]) -> list[dict[str, Any]]:
    """Return a row for each phase, the longest first."""
    if method not in (FLOOR, SWEEP):
        return []
    facts = [_facts(run) for run in runs]
    rows = [
        {"way": method, "phase": phase}
        | {kind: median(run[kind].get(phase, 0.0) for run in facts) for kind in ("cpu_seconds", "seconds")}
        for phase in facts[0]["seconds"]
    ]
    return sorted(rows, key=lambda row: -row["cpu_seconds"])
