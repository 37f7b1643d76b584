"""Swapping two layers of a checkpoint on disk, beside what a user would do instead.

Every way makes the same checkpoint: blocks 12 and 13 of Pythia-6.9b's geometry exchanged. Before anything is timed, what ours
wrote is compared, tensor by tensor, with what transformers wrote after reordering the loaded model.
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
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open

from .random_checkpoint import DEPTH, NAME, WIDTH, make
from .timing import Run, record, summary, table_of, timed, wide_console

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


def ways(source: Path, out: Path, work: Path, first: int, depth: int) -> dict[str, list[str]]:
    """The command of each way."""
    ours = [sys.executable, "-m", "layersurgery_cli", "swap", NAME, "--layer", str(first), "-o", str(out), "--quiet"]
    slices = [(0, first), (first + 1, first + 2), (first, first + 1), (first + 2, depth)]
    recipe = work / "mergekit.yaml"
    recipe.write_text(
        "merge_method: passthrough\ndtype: float16\nslices:\n"
        + "".join(f"  - sources: [{{model: {source}, layer_range: [{a}, {b}]}}]\n" for a, b in slices)
    )
    return {
        "cp -r": ["cp", "-rL", str(source), str(out)],
        "layersurgery, without the reload check": [*ours, "--no-verify"],
        "layersurgery": ours,
        "layersurgery --link": [*ours, "--no-verify", "--link"],
        "transformers: load, reorder, save": [
            sys.executable, "-c", _TRANSFORMERS, str(source), str(out), str(first), str(first + 1)
        ],
        f"{MERGEKIT} passthrough": [
            "uv", "tool", "run", "--from", MERGEKIT, "mergekit-yaml", str(recipe), str(out), "--copy-tokenizer"
        ],
    }  # fmt: skip


def measure(runs: int, hub: Path | None, work: Path, *, quick: bool, as_json: bool) -> list[dict[str, Any]]:
    """Make the checkpoint, check that the ways agree, time them in turn, and print a table."""
    console = wide_console(stderr=as_json)
    work.mkdir(parents=True, exist_ok=True)
    home = hub.parent if hub else work / "hf"
    width, depth = (WIDTH // 4, 8) if quick else (WIDTH, DEPTH)
    first = depth * 12 // 32
    console.print(f"Checkpoint: {NAME}'s geometry" + (f", shrunk to width {width} and {depth} blocks" if quick else ""))
    source = make(home / "hub", width=width, depth=depth, shard_bytes=5_000_000_000 if not quick else 60_000_000)
    env = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    out = work / "out"
    commands = ways(source, out, work, first, depth)
    console.print("Correctness gate: ours against transformers, tensor by tensor")
    gate(commands, env, out, work)
    results: dict[str, list[Run]] = {name: [] for name in commands}
    failed: dict[str, str] = {}
    for number in range(runs + 1):  # the first, not counted, warms the page cache and the peers' own caches
        for name, command in commands.items():
            if name in failed:
                continue
            with emptied(out):
                run = timed(command, env=env)
            if run.code:
                failed[name] = next(
                    (line for line in reversed(run.said.splitlines()) if line.strip()), f"exit {run.code}"
                )
            elif number:
                results[name].append(run)
            console.print(f"  {'warm-up' if not number else f'run {number}'}: {name}: {run.seconds:.1f} s")
    rows = report(results, failed, console)
    console.print(f"Appended to {record('checkpoint' + ('-quick' if quick else ''), rows)}")
    return rows


@contextmanager
def emptied(out: Path) -> Iterator[None]:
    """Each run begins with nothing at the output and no writing of the last one still under way."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    time.sleep(1)
    yield
    shutil.rmtree(out, ignore_errors=True)


def gate(commands: dict[str, list[str]], env: dict[str, str], out: Path, work: Path) -> None:
    """Stop unless ours and transformers wrote the same weights."""
    theirs = work / "theirs"
    shutil.rmtree(theirs, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    for name in ("transformers: load, reorder, save", "layersurgery"):
        run = timed(commands[name], env=env)
        if run.code:
            raise SystemExit(f"the gate is red: {name} failed\n{run.said[-2000:]}")
        if name != "layersurgery":
            out.rename(theirs)
    ours, reference = tensors(out), tensors(theirs)
    if missing := reference.keys() - ours.keys():
        raise SystemExit(f"the gate is red: ours lacks {sorted(missing)[:3]}")
    for tensor, path in reference.items():
        with safe_open(path, "pt") as a, safe_open(ours[tensor], "pt") as b:
            if not torch.equal(a.get_tensor(tensor), b.get_tensor(tensor)):
                raise SystemExit(f"the gate is red: {tensor} differs")
    shutil.rmtree(theirs)
    shutil.rmtree(out)


def tensors(directory: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def report(results: dict[str, list[Run]], failed: dict[str, str], console: Console) -> list[dict[str, Any]]:
    """Print the table; returns its rows."""
    base = summary("cp -r", results["cp -r"]).seconds
    table = table_of("two layers of a checkpoint swapped", "way", "seconds", "quartiles", "x cp -r", "peak MB")
    rows: list[dict[str, Any]] = []
    for name, runs in results.items():
        if name in failed:
            table.add_row(f"{name}: {failed[name][:60]}")
            continue
        found = summary(name, runs)
        ratio = found.seconds / base
        quartiles = f"{found.seconds_low:.1f} to {found.seconds_high:.1f}"
        table.add_row(name, f"{found.seconds:.1f}", quartiles, f"{ratio:.2f}", f"{found.bytes_peak / 1e6:.0f}")
        rows.append(dataclasses.asdict(found) | {"ratio_to_cp": round(ratio, 3)})
    console.print(table)
    return rows
