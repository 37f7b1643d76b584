"""Time the swap of two layers of a checkpoint on disk, with layersurgery and with its alternatives.

Every method makes the same checkpoint: blocks 12 and 13 of Pythia-6.9b's geometry exchanged. Before anything is timed,
the tensors that layersurgery wrote are compared with those that transformers wrote after the loaded model was
reordered.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open

from .random_checkpoint import DEPTH, NAME, WIDTH, write_random_checkpoint
from .timing import Run, append_results, make_table, run_timed, summarize, wide_console

MERGEKIT = "mergekit==0.1.5"
_TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
source, out, first, second = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
layers = model.gpt_neox.layers
layers[first], layers[second] = layers[second], layers[first]
model.save_pretrained(out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
"""


def list_commands(source: Path, out: Path, work: Path, first: int, depth: int) -> dict[str, list[str]]:
    """Return the command of each method."""
    swap = [sys.executable, "-m", "layersurgery_cli", "swap", NAME, "--layer", str(first), "-o", str(out), "--quiet"]
    slices = [(0, first), (first + 1, first + 2), (first, first + 1), (first + 2, depth)]
    recipe = work / "mergekit.yaml"
    recipe.write_text(
        "merge_method: passthrough\ndtype: float16\nslices:\n"
        + "".join(f"  - sources: [{{model: {source}, layer_range: [{a}, {b}]}}]\n" for a, b in slices),
        encoding="utf-8",
    )
    return {
        "cp -r": ["cp", "-rL", str(source), str(out)],
        "layersurgery, without the reload check": [*swap, "--no-verify"],
        "layersurgery": swap,
        "layersurgery --link": [*swap, "--no-verify", "--link"],
        "transformers: load, reorder, save": [
            sys.executable, "-c", _TRANSFORMERS, str(source), str(out), str(first), str(first + 1)
        ],
        f"{MERGEKIT} passthrough": [
            "uv", "tool", "run", "--from", MERGEKIT, "mergekit-yaml", str(recipe), str(out), "--copy-tokenizer"
        ],
    }  # fmt: skip


def measure(
    runs: int, hub: Path | None, work: Path, *, only: str = "", quick: bool, as_json: bool
) -> list[dict[str, Any]]:
    """Write the checkpoint, check that layersurgery and transformers agree, time all methods, and print a table.

    Args:
        runs: runs of each method that count.
        hub: hub cache that holds, or will hold, the checkpoint; None for one in `work`.
        work: directory for outputs.
        only: methods to time besides `cp -r`, as names or parts of names with commas; all if empty.
        quick: use a small checkpoint.
        as_json: print progress on stderr, since stdout is for JSON.

    Returns:
        The rows of the table, which are appended to the results.
    """
    console = wide_console(stderr=as_json)
    work.mkdir(parents=True, exist_ok=True)
    hf_home = hub.parent if hub else work / "hf"
    width, depth = (WIDTH // 4, 8) if quick else (WIDTH, DEPTH)
    first = depth * 12 // 32
    console.print(f"Checkpoint: {NAME}'s geometry" + (f", shrunk to width {width} and {depth} blocks" if quick else ""))
    source = write_random_checkpoint(
        hf_home / "hub", width=width, depth=depth, shard_bytes=5_000_000_000 if not quick else 60_000_000
    )
    env = {"HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1"}
    out = work / "out"
    commands = list_commands(source, out, work, first, depth)
    console.print("Correctness check: layersurgery against transformers, tensor by tensor")
    check_same_weights(commands, env, out, work)
    wanted = [*filter(None, only.split(","))]
    commands = {
        name: command
        for name, command in commands.items()
        if not wanted or name == "cp -r" or any(part in name for part in wanted)
    }
    results: dict[str, list[Run]] = {name: [] for name in commands}
    failed: dict[str, str] = {}
    for number in range(runs + 1):  # the first run does not count: it warms up the caches
        for name, command in commands.items():
            if name in failed:
                continue
            with empty_output(out):
                run = run_timed(command, env=env)
            if run.exit_code:
                last_line = next((line for line in reversed(run.output.splitlines()) if line.strip()), None)
                failed[name] = last_line or f"exit {run.exit_code}"
            elif number:
                results[name].append(run)
            console.print(f"  {'warm-up' if not number else f'run {number}'}: {name}: {run.seconds:.1f} s")
    rows = print_report(results, failed, console)
    console.print(f"Appended to {append_results('checkpoint' + ('-quick' if quick else ''), rows)}")
    return rows


@contextmanager
def empty_output(out: Path) -> Iterator[None]:
    """Remove the output before and after a run, and first wait until the last run's files are on disk."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    time.sleep(1)
    yield
    shutil.rmtree(out, ignore_errors=True)


def check_same_weights(commands: dict[str, list[str]], env: dict[str, str], out: Path, work: Path) -> None:
    """Check that layersurgery and transformers write the same weights.

    Raises:
        SystemExit: a command failed, or the weights differ.
    """
    by_transformers = work / "theirs"
    shutil.rmtree(by_transformers, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    for name in ("transformers: load, reorder, save", "layersurgery"):
        run = run_timed(commands[name], env=env)
        if run.exit_code:
            raise SystemExit(f"nothing was timed, because a command failed: {name}\n{run.output[-2000:]}")
        if name != "layersurgery":
            out.rename(by_transformers)
    actual, expected = find_tensors(out), find_tensors(by_transformers)
    if missing := expected.keys() - actual.keys():
        raise SystemExit(f"wrong result: layersurgery did not write {sorted(missing)[:3]}")
    for tensor, path in expected.items():
        with safe_open(path, "pt") as a, safe_open(actual[tensor], "pt") as b:
            if not torch.equal(a.get_tensor(tensor), b.get_tensor(tensor)):
                raise SystemExit(f"wrong result: {tensor} differs from what transformers wrote")
    shutil.rmtree(by_transformers)
    shutil.rmtree(out)


def find_tensors(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor in a directory."""
    files: dict[str, Path] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def print_report(results: dict[str, list[Run]], failed: dict[str, str], console: Console) -> list[dict[str, Any]]:
    """Print the table, and return its rows.

    The ratio is the median of the rounds' ratios, since what else the machine does changes from round to round.
    """
    table = make_table("two layers of a checkpoint swapped", "way", "seconds", "quartiles", "x cp -r", "peak MB")
    rows: list[dict[str, Any]] = []
    for name, runs in results.items():
        if name in failed:
            table.add_row(f"{name}: {failed[name][:60]}")
            continue
        summary = summarize(name, runs)
        ratio = median(run.seconds / copy.seconds for run, copy in zip(runs, results["cp -r"], strict=True))
        quartiles = f"{summary.seconds_low:.1f} to {summary.seconds_high:.1f}"
        table.add_row(name, f"{summary.seconds:.1f}", quartiles, f"{ratio:.2f}", f"{summary.bytes_peak / 1e6:.0f}")
        rows.append(dataclasses.asdict(summary) | {"ratio_to_cp": round(ratio, 3)})
    console.print(table)
    return rows
