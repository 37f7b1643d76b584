"""Time swap and drop of every block: layersurgery, other libraries, and the limit of the machine.

Every method runs in its own process, and in its own environment if its packages need one. The methods take turns.
Timing starts after the model is loaded and has been used once. No speed is reported for a method whose metrics differ
from those of the loop by hand.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from layersurgery.checkpoints.sources import find_source

from .peers.common import GEOMETRIES, METRICS
from .timing import append_results, make_table, quartiles, run_timed, wide_console

_ROOT = Path(__file__).parent.parent
LIMIT = "limit"
NO_TIME = "no time was left"
_LEAST_SECONDS = 20
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class Method:
    """A method to measure the edits.

    Attributes:
        name: its name in tables and in the column `way`.
        script: module in `benchmarks/peers` that runs it.
        dtype: of the model.
        packages: packages of its environment; none if it runs in this environment.
        sequences: the most sequences that it gets; None for all.
        options: values of the script's `--option`.
        edits: edits that it can do.
    """

    name: str
    script: str
    dtype: str
    packages: tuple[str, ...] = ()
    sequences: int | None = None
    options: tuple[str, ...] = ()
    edits: str = "swap,drop"

    @property
    def label(self) -> str:
        """Return name and dtype, for messages."""
        return f"{self.name}, {self.dtype}"


@dataclass(slots=True)
class MethodRuns:
    """Results of the runs of one method.

    Attributes:
        results: contents of the results file of each run.
        bytes_peak: the highest peak of memory, of the device if it is a GPU.
        error: why the method gets no speed; empty if it gets one.
    """

    results: list[dict[str, Any]] = field(default_factory=list)
    bytes_peak: int = 0
    error: str = ""

    def tokens_per_second(self) -> list[float]:
        """Return the speed of each repeat of each run."""
        return [result["tokens"] / seconds for result in self.results for seconds in result["seconds"]]


@dataclass(frozen=True, slots=True)
class Setting:
    """Model, text and device of a benchmark.

    Attributes:
        model: name or directory of a checkpoint, or a key of `GEOMETRIES` for random weights.
        sequences: number of sequences.
        context: tokens in a sequence.
        batch_size: sequences in one batch.
        device: cpu or cuda.
        runs: runs of each method, each one a new process.
        repeats: times that a process measures all edits, after it has loaded the model.
        limit_seconds: time after which a run is stopped.
        deadline: `time.monotonic()` at which no run may be left; None for no limit.
    """

    model: str
    sequences: int
    context: int
    batch_size: int
    device: str
    runs: int
    repeats: int = 1
    limit_seconds: float = 3600
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Arguments of the scripts: model, number of blocks, and a file of token ids."""

    model: str
    depth: int
    tokens: Path


def list_methods(dtypes: Sequence[str], *, peers: bool, sequences: int, slow_sequences: int) -> list[Method]:
    """Return all methods of the sweep.

    Args:
        dtypes: dtypes of layersurgery, of the loop by hand and of the limit.
        peers: add the other libraries.
        sequences: sequences that most methods get.
        slow_sequences: sequences that TransformerLens gets, because it runs one sequence at a time.
    """
    torch = f"torch=={version('torch').partition('+')[0]}"
    methods: list[Method] = []
    for dtype in dtypes:
        methods += [
            Method(LIMIT, "roofline", dtype, sequences=sequences),
            Method("layersurgery", "with_layersurgery", dtype, sequences=sequences),
            # Before the compiled way: without it nothing can be checked, and time may run out.
            Method("loop by hand", "with_transformers", dtype, sequences=sequences),
            Method("layersurgery --compile", "with_layersurgery", dtype, sequences=sequences, options=("compiled",)),
        ]
    if peers:
        lens, nnsight, nnterp = "with_transformer_lens", "with_nnsight", "with_nnterp"
        methods += [
            Method("TransformerLens 3", lens, "float32", (torch, "transformer-lens<4"), slow_sequences),
            Method("nnsight 0.8", nnsight, "float32", (torch, "nnsight==0.8.1"), sequences),
            Method(
                "nnterp 1.3, drops", nnterp, "float32", (torch, "nnterp==1.3.0", "nnsight<0.8"), sequences, edits="drop"
            ),
            Method(
                "neuro-scan 0.2, drops",
                "with_neuro_scan",
                "float32",
                (torch, f"transformers=={version('transformers')}", "accelerate", "neuro-scan==0.2.3"),
                sequences,
                edits="drop",
            ),
            Method("layersurgery drops", "with_layersurgery", "float32", sequences=sequences, edits="drop"),
        ]
    return methods


def list_offload_methods(sequences: int) -> list[Method]:
    """Return layersurgery with the model in memory, and with all weights on disk, in both orders of the schedule."""
    script = "with_layersurgery"
    return [
        Method("layersurgery", script, "float32", sequences=sequences),
        Method("on disk, layer by layer", script, "float32", sequences=sequences, options=("disk",)),
        Method("on disk, route by route", script, "float32", sequences=sequences, options=("disk", "depth-first")),
    ]


def measure(
    setting: Setting,
    dtypes: Sequence[str],
    *,
    peers: bool = True,
    methods: Sequence[Method] | None = None,
    only: str = "",
    as_json: bool = False,
    name: str = "sweep",
    directory: Path | None = None,
) -> list[dict[str, Any]]:
    """Run all methods in turn, check their metrics, print a table, and append its rows to the results.

    Args:
        setting: model, text and device.
        dtypes: dtypes of layersurgery, of the loop by hand and of the limit.
        peers: run the other libraries, too.
        methods: methods to run instead of those of `list_methods`.
        only: methods to run: names or parts of names, separated by commas; empty for all.
        as_json: print progress on stderr, since stdout is for JSON.
        name: name of the results file.
        directory: where the results file is; benchmarks/results if not given.

    Returns:
        The rows of the table. A fault of a method is part of its row.
    """
    console = wide_console(stderr=as_json)
    if methods is None:
        slow_sequences = max(1, setting.sequences // 4)
        methods = list_methods(dtypes, peers=peers, sequences=setting.sequences, slow_sequences=slow_sequences)
    runs_by_method = {method: MethodRuns() for method in methods if _is_selected(method.name, only, methods)}
    with tempfile.TemporaryDirectory(prefix="layersurgery-benchmark-") as work:
        out = Path(work) / "out.json"
        inputs = _prepare_inputs(setting, Path(work))
        console.print(
            f"{setting.model}: {inputs.depth} blocks, {setting.sequences} x {setting.context} tokens, {setting.device}"
        )
        for number in range(setting.runs):
            for method, runs in runs_by_method.items():
                if runs.error:
                    continue
                _run(method, runs, setting, inputs, out)
                outcome = runs.error or ", ".join(f"{seconds:.1f} s" for seconds in runs.results[-1]["seconds"])
                console.print(f"  run {number + 1}: {method.label}: {outcome}")
        references: dict[tuple[str, int | None], MethodRuns] = {}
        for method, runs in runs_by_method.items():
            key = method.dtype, method.sequences
            if key not in references and runs.results and method.name != LIMIT:
                console.print(f"  correctness check: loop by hand, {method.dtype}, {method.sequences} sequences")
                references[key] = _find_reference(runs_by_method, key, setting, inputs, out)
    _check_metrics(runs_by_method, references)
    rows = _make_rows(runs_by_method, setting)
    console.print(_make_table(rows, setting))
    console.print(f"Appended to {append_results(name, rows, directory)}")
    return rows


def measure_without_reference(
    setting: Setting, methods: Sequence[Method]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run methods in turn without a comparison with the loop by hand.

    Returns:
        The latest results of the methods that have any, and the rows of the table.
    """
    console = wide_console()
    runs_by_method = {method: MethodRuns() for method in methods}
    with tempfile.TemporaryDirectory(prefix="layersurgery-benchmark-") as work:
        inputs = _prepare_inputs(setting, Path(work))
        for method, runs in runs_by_method.items():
            _run(method, runs, setting, inputs, Path(work) / "out.json")
            console.print(f"  {method.label}: {runs.error or runs.results[-1]['seconds']}", markup=False)
    rows = _make_rows(runs_by_method, setting)
    return [runs.results[-1] for runs in runs_by_method.values() if runs.results], rows


def require_no_fault(rows: Sequence[Mapping[str, Any]]) -> None:
    """Check that layersurgery ran and that its results are right.

    Raises:
        SystemExit: it failed, or its metrics are wrong.
    """
    # A method that does not run on this device is not a fault.
    faults = [row["fault"] for row in rows if row["way"].startswith("layersurgery") and row["fault"]]
    if wrong := [fault for fault in faults if not fault.startswith("it is for ")]:
        raise SystemExit(f"layersurgery: {wrong[0]}")


def _is_selected(name: str, only: str, methods: Sequence[Method]) -> bool:
    """Return whether `only` selects a method.

    An item of `only` that is the full name of a method selects that method alone. Any other item selects the methods
    whose names contain it.
    """
    full_names = {method.name for method in methods}
    return any(name == item or (item not in full_names and item in name) for item in only.split(","))


def _prepare_inputs(setting: Setting, work: Path) -> _Inputs:
    """Write the token ids to a file: real text for a real model, random ids for a geometry."""
    path = work / "tokens.npy"
    if setting.model in GEOMETRIES:
        _, depth, _, vocabulary = GEOMETRIES[setting.model]
        np.save(path, np.random.default_rng(0).integers(0, vocabulary, (setting.sequences, setting.context)))
        return _Inputs(setting.model, depth, path)
    from layersurgery.checkpoints.loading import tokenizer_of
    from layersurgery.runs.text import read_text
    from layersurgery.runs.text_request import PYDOC, TextRequest

    source = find_source(setting.model)
    text = read_text(TextRequest(PYDOC, setting.sequences * setting.context, setting.context), tokenizer_of(source))
    np.save(path, text.ids[: setting.sequences].numpy())
    depth = json.loads((source.directory / "config.json").read_text("utf-8"))["num_hidden_layers"]
    return _Inputs(str(source.directory), depth, path)


def _find_reference(
    runs_by_method: dict[Method, MethodRuns],
    key: tuple[str, int | None],
    setting: Setting,
    inputs: _Inputs,
    out: Path,
) -> MethodRuns:
    """Return the runs of the loop by hand for a dtype and a number of sequences; run it if it has not been run."""
    dtype, sequences = key
    reference = next(
        (
            runs
            for method, runs in runs_by_method.items()
            if method.script == "with_transformers" and (method.dtype, method.sequences) == key
        ),
        MethodRuns(),
    )
    if not reference.results:
        _run(Method("reference", "with_transformers", dtype, sequences=sequences), reference, setting, inputs, out)
    return reference


def _run(method: Method, runs: MethodRuns, setting: Setting, inputs: _Inputs, out: Path) -> None:
    """Run a method once in a process, and add its result or its error to `runs`."""
    out.unlink(missing_ok=True)
    limit = setting.limit_seconds
    if setting.deadline is not None:
        limit = min(limit, setting.deadline - time.monotonic())
        if limit < _LEAST_SECONDS:
            runs.error = NO_TIME
            return
    python = [sys.executable]
    if method.packages:
        version_number = f"{sys.version_info[0]}.{sys.version_info[1]}"
        python = ["uv", "run", "-q", "--no-project", "--isolated", "--python", version_number]
        python += [word for package in (*method.packages, "numpy") for word in ("--with", package)] + ["python"]
    command = [
        *python, "-m", f"benchmarks.peers.{method.script}", inputs.model, str(inputs.tokens), str(out),
        "--depth", str(inputs.depth), "--edits", method.edits,
        "--sequences", str(method.sequences or setting.sequences), "--at-once", str(setting.batch_size),
        "--dtype", method.dtype, "--device", setting.device, "--repeats", str(setting.repeats),
        *(word for option in method.options for word in ("--option", option)),
    ]  # fmt: skip
    env = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(_ROOT)}
    run = run_timed(command, env=env, limit=limit)
    if run.exit_code and run.seconds >= limit:
        runs.error = f"stopped after {limit:.0f} s"
        return
    if run.exit_code or not out.exists():
        runs.error = next(
            (line for line in reversed(run.output.splitlines()) if line.strip()), f"exit code {run.exit_code}"
        ).strip()
        return
    result = json.loads(out.read_text(encoding="utf-8"))
    runs.results.append(result)
    runs.bytes_peak = max(runs.bytes_peak, result["bytes_peak_device"] or result["bytes_peak"])


def _check_metrics(
    runs_by_method: dict[Method, MethodRuns], references: dict[tuple[str, int | None], MethodRuns]
) -> None:
    """Set the error of methods whose metrics differ from those of the loop by hand on the same tokens."""
    for method, runs in runs_by_method.items():
        if method.name == LIMIT or not runs.results:
            continue
        tolerance = 1e-3 if method.dtype == "float32" else 5e-2
        reference = references[method.dtype, method.sequences]
        if not reference.results:
            runs.error = f"not checked, because the loop by hand failed: {reference.error}"
        elif difference := _find_difference(runs.results[-1], reference.results[-1], tolerance):
            runs.error = f"wrong result: {difference}"


def _find_difference(result: dict[str, Any], reference: dict[str, Any], tolerance: float) -> str:
    """Describe the first metric that differs from the reference; return "" if none does."""
    expected = {row["plan"]: row for row in reference["rows"]}
    for row in result["rows"]:
        for metric in METRICS:
            a, b = row[metric], expected[row["plan"]][metric]
            if not abs(a - b) <= tolerance * max(1, abs(b)):
                return f"{metric} of {row['plan']} is {a:.6g}, by hand {b:.6g}"
    return ""


def _make_rows(runs_by_method: dict[Method, MethodRuns], setting: Setting) -> list[dict[str, Any]]:
    speeds = {
        method: median(runs.tokens_per_second())
        for method, runs in runs_by_method.items()
        if runs.results and not runs.error
    }

    def find_speed(script: str, dtype: str) -> float | None:
        return next((speed for m, speed in speeds.items() if m.script == script and m.dtype == dtype), None)

    rows = []
    for method, runs in runs_by_method.items():
        limit = find_speed("roofline", method.dtype)
        by_hand = find_speed("with_transformers", method.dtype)
        has_speed = method in speeds
        low, middle, high = quartiles(runs.tokens_per_second()) if has_speed else (None, None, None)
        does_all_edits = has_speed and method.edits == "swap,drop"
        rows.append({
            "model": setting.model, "device": setting.device, "way": method.name, "dtype": method.dtype,
            "edits": method.edits, "tokens": runs.results[-1]["tokens"] if has_speed else 0,
            "context": setting.context, "at_once": setting.batch_size,
            "runs": len(runs.tokens_per_second()),
            "tokens_per_second": middle, "tokens_per_second_low": low, "tokens_per_second_high": high,
            "of_limit": middle / limit if does_all_edits and middle and limit else None,
            "times_by_hand": middle / by_hand if does_all_edits and middle and by_hand else None,
            "bytes_peak": runs.bytes_peak, "version": runs.results[-1]["version"] if has_speed else "",
            "fault": runs.error,
            **{name: runs.results[-1][name] for name in _DETAILS if has_speed and name in runs.results[-1]},
        })  # fmt: skip
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


# Fields that only the limit's script writes to its results file.
_DETAILS = (
    "block_calls",
    "readouts",
    "seconds_linear",
    "seconds_attention",
    "seconds_readout",
    "gigaflops_linear",
    "gigaflops_readout",
)


def _make_table(rows: list[dict[str, Any]], setting: Setting) -> Table:
    table = make_table(
        f"{setting.model}: swap and drop of every block",
        "way",
        "dtype",
        "tokens/s",
        "quartiles",
        "of limit",
        "x by hand",
        "peak MB",
    )
    for row in rows:
        if row["fault"]:
            table.add_row(f"{row['way']}: {row['fault']}", _SHORT[row["dtype"]])
            continue
        ratios = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("of_limit", "times_by_hand")]
        spread = f"{row['tokens_per_second_low']:.1f}-{row['tokens_per_second_high']:.1f}"
        table.add_row(
            row["way"],
            _SHORT[row["dtype"]],
            f"{row['tokens_per_second']:.1f}",
            spread,
            *ratios,
            f"{row['bytes_peak'] / 1e6:.0f}",
        )
    return table
