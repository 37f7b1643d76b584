"""Swap and drop of every block, measured: layersurgery beside what else one would run, and beside the limit of the machine.

Every way is a process of its own, in its own environment where its packages need one; the ways take turns. Times begin when the
model is loaded and has been used once. No speed is given of a way whose metrics are not ours.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from layersurgery.checkpoints.sources import find_source

from .peers.common import GEOMETRIES, METRICS
from .timing import quartiles, record, table_of, timed, wide_console

_ROOT = Path(__file__).parent.parent
LIMIT = "limit"
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to do it.

    Attributes:
        name: for the table.
        script: in the folder of peers.
        dtype: of the model.
        packages: of its own environment; none for ours.
        sequences: it is given, at most.
        options: of the script.
        edits: it can do.
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
        return f"{self.name}, {self.dtype}"


@dataclass(slots=True)
class Found:
    """What the runs of a way gave."""

    seconds: list[float] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    bytes_peak: int = 0
    fault: str = ""

    def per_second(self) -> list[float]:
        return [result["tokens"] / result["seconds"] for result in self.results]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured, and on what."""

    model: str
    sequences: int
    context: int
    at_once: int
    device: str
    runs: int
    limit_seconds: float = 3600


def ways(dtypes: Sequence[str], *, peers: bool, whole: int, alone: int) -> list[Way]:
    """All of them; slow ones get `alone` sequences and not `whole`, since they take one at a time, or batches one after another."""
    torch = f"torch=={version('torch').partition('+')[0]}"
    found: list[Way] = []
    for dtype in dtypes:
        found += [
            Way(LIMIT, "roofline", dtype, sequences=whole),
            Way("layersurgery", "with_layersurgery", dtype, sequences=whole),
            Way("layersurgery --compile", "with_layersurgery", dtype, sequences=whole, options=("compiled",)),
            Way("loop by hand", "with_transformers", dtype, sequences=whole),
        ]
    if peers:
        found += [
            Way("TransformerLens 3", "with_transformer_lens", "float32", (torch, "transformer-lens<4"), alone),
            Way("nnsight 0.8", "with_nnsight", "float32", (torch, "nnsight==0.8.1"), whole),
            Way(
                "nnterp 1.3, drops",
                "with_nnterp",
                "float32",
                (torch, "nnterp==1.3.0", "nnsight<0.8"),
                whole,
                edits="drop",
            ),
        ]
    return found


def ways_of_offloading(sequences: int) -> list[Way]:
    """A model in memory, and one whose weights are all on disk, in the two ways to go."""
    return [
        Way("layersurgery", "with_layersurgery", "float32", sequences=sequences),
        Way("on disk, layer by layer", "with_layersurgery", "float32", sequences=sequences, options=("disk",)),
        Way(
            "on disk, route by route",
            "with_layersurgery",
            "float32",
            sequences=sequences,
            options=("disk", "depth-first"),
        ),
    ]


def measure(
    setting: Setting,
    dtypes: Sequence[str],
    *,
    peers: bool = True,
    known: Sequence[Way] | None = None,
    only: str = "",
    as_json: bool = False,
    name: str = "sweep",
) -> list[dict[str, Any]]:
    """Run all ways in turn, check them, and print a table; returns its rows, which are appended to the results."""
    console = wide_console(stderr=as_json)
    if known is None:
        known = ways(dtypes, peers=peers, whole=setting.sequences, alone=max(1, setting.sequences // 4))
    found = {way: Found() for way in known if _asked(way.name, only, known)}
    with tempfile.TemporaryDirectory(prefix="layersurgery-benchmark-") as work:
        model, depth, tokens = _material(setting, Path(work))
        console.print(
            f"{setting.model}: {depth} blocks, {setting.sequences} x {setting.context} tokens, {setting.device}"
        )
        for number in range(setting.runs):
            for way, so_far in found.items():
                if so_far.fault:
                    continue
                _run(way, so_far, setting, (model, depth, tokens), Path(work) / "out.json")
                said = so_far.fault or f"{so_far.results[-1]['seconds']:.1f} s"
                console.print(f"  run {number + 1}: {way.label}: {said}")
        yards: dict[tuple[str, int | None], dict[str, Any]] = {}
        for way, so_far in found.items():
            key = way.dtype, way.sequences
            if key not in yards and so_far.results and way.name != LIMIT:
                console.print(f"  gate: by hand, {way.dtype}, {way.sequences} sequences")
                yards[key] = _yard(found, key, setting, (model, depth, tokens), Path(work) / "out.json")
    _gate(found, yards)
    rows = _rows(found, setting)
    console.print(_table(rows, setting))
    console.print(f"Appended to {record(name, rows)}")
    if red := [row["fault"] for row in rows if row["fault"] and row["way"].startswith("layersurgery")]:
        raise SystemExit(f"layersurgery: {red[0]}")
    return rows


def _asked(name: str, only: str, known: Sequence[Way]) -> bool:
    """Whether a way is one of those asked for: by its whole name, or by a part of names that no way has as its whole."""
    whole = {way.name for way in known}
    return any(name == part or (part not in whole and part in name) for part in only.split(","))


def _material(setting: Setting, work: Path) -> tuple[str, int, Path]:
    """Model, depth and a file of tokens: real text for a real model, any for a geometry."""
    path = work / "tokens.npy"
    if setting.model in GEOMETRIES:
        _, depth, _, vocabulary = GEOMETRIES[setting.model]
        np.save(path, np.random.default_rng(0).integers(0, vocabulary, (setting.sequences, setting.context)))
        return setting.model, depth, path
    from layersurgery.checkpoints.loading import tokenizer_of
    from layersurgery.runs.text import PYDOC, TextRequest, read_text

    source = find_source(setting.model)
    text = read_text(TextRequest(PYDOC, setting.sequences * setting.context, setting.context), tokenizer_of(source))
    np.save(path, text.ids[: setting.sequences].numpy())
    depth = json.loads((source.directory / "config.json").read_text("utf-8"))["num_hidden_layers"]
    return str(source.directory), depth, path


def _yard(
    found: dict[Way, Found], key: tuple[str, int | None], setting: Setting, material: tuple[str, int, Path], out: Path
) -> dict[str, Any]:
    """What the loop by hand gave for a dtype and so many sequences; run for this alone if need be."""
    dtype, sequences = key
    known = next(
        (
            so_far
            for way, so_far in found.items()
            if way.script == "with_transformers" and (way.dtype, way.sequences) == key
        ),
        Found(),
    )
    if not known.results:
        _run(Way("gate", "with_transformers", dtype, sequences=sequences), known, setting, material, out)
    if not known.results:
        raise SystemExit(f"the gate cannot be run: {known.fault}")
    return known.results[-1]


def _run(way: Way, found: Found, setting: Setting, material: tuple[str, int, Path], out: Path) -> None:
    model, depth, tokens = material
    out.unlink(missing_ok=True)
    python = [sys.executable]
    if way.packages:
        python = [
            "uv",
            "run",
            "-q",
            "--no-project",
            "--isolated",
            "--python",
            f"{sys.version_info[0]}.{sys.version_info[1]}",
        ]
        python += [part for package in (*way.packages, "numpy") for part in ("--with", package)] + ["python"]
    command = [
        *python, "-m", f"benchmarks.peers.{way.script}", model, str(tokens), str(out), "--depth", str(depth), "--edits", way.edits,
        "--sequences", str(way.sequences or setting.sequences), "--at-once", str(setting.at_once), "--dtype", way.dtype,
        "--device", setting.device, *(part for option in way.options for part in ("--option", option)),
    ]  # fmt: skip
    env = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(_ROOT)}
    run = timed(command, env=env, limit=setting.limit_seconds)
    if run.code or not out.exists():
        found.fault = next(
            (line for line in reversed(run.said.splitlines()) if line.strip()), f"exit code {run.code}"
        ).strip()
        return
    result = json.loads(out.read_text())
    found.results.append(result)
    found.seconds.append(result["seconds"])
    found.bytes_peak = max(found.bytes_peak, result["bytes_peak_device"] or result["bytes_peak"])


def _gate(found: dict[Way, Found], yards: dict[tuple[str, int | None], dict[str, Any]]) -> None:
    """A way whose metrics are not those of the loop by hand, on the same tokens, has no speed."""
    for way, so_far in found.items():
        if way.name == LIMIT or not so_far.results:
            continue
        tolerance = 1e-3 if way.dtype == "float32" else 5e-2
        if fault := _differs(so_far.results[-1], yards[way.dtype, way.sequences], tolerance):
            so_far.fault = f"the gate is red: {fault}"


def _differs(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> str:
    meant = {row["plan"]: row for row in other["rows"]}
    for row in one["rows"]:
        for metric in METRICS:
            a, b = row[metric], meant[row["plan"]][metric]
            if not abs(a - b) <= tolerance * max(1, abs(b)):
                return f"{metric} of {row['plan']} is {a:.6g}, by hand {b:.6g}"
    return ""


def _rows(found: dict[Way, Found], setting: Setting) -> list[dict[str, Any]]:
    speeds = {way: median(so_far.per_second()) for way, so_far in found.items() if so_far.results and not so_far.fault}

    def speed(test: Callable[[Way], bool]) -> float | None:
        return next((value for way, value in speeds.items() if test(way)), None)

    rows = []
    for way, so_far in found.items():
        limit = speed(lambda w, dtype=way.dtype: w.name == LIMIT and w.dtype == dtype)  # type: ignore[misc]
        by_hand = speed(lambda w, dtype=way.dtype: w.script == "with_transformers" and w.dtype == dtype)  # type: ignore[misc]
        known = way in speeds
        low, middle, high = quartiles(so_far.per_second()) if known else (None, None, None)
        whole = known and way.edits == "swap,drop"
        rows.append({
            "model": setting.model, "device": setting.device, "way": way.name, "dtype": way.dtype, "edits": way.edits,
            "tokens": so_far.results[-1]["tokens"] if known else 0, "context": setting.context, "at_once": setting.at_once,
            "runs": len(so_far.results), "tokens_per_second": middle, "tokens_per_second_low": low, "tokens_per_second_high": high,
            "of_limit": middle / limit if whole and middle and limit else None,
            "times_by_hand": middle / by_hand if whole and middle and by_hand else None,
            "bytes_peak": so_far.bytes_peak, "version": so_far.results[-1]["version"] if known else "", "fault": so_far.fault,
            **{name: so_far.results[-1][name] for name in _DETAILS if known and name in so_far.results[-1]},
        })  # fmt: skip
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


_DETAILS = (
    "block_calls",
    "readouts",
    "seconds_linear",
    "seconds_attention",
    "seconds_readout",
    "gigaflops_linear",
    "gigaflops_readout",
)


def _table(rows: list[dict[str, Any]], setting: Setting) -> Table:
    table = table_of(
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
