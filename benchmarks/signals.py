"""What observing costs: signals read off a pass over text, beside a plain forward; and neurons of Pythia-6.9b's geometry, in memory."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import layersurgery as ls
from layersurgery.analyses.signal_tables import measurer_of
from layersurgery.runs.text import TextRequest, read_text
from layersurgery.runtime.inputs import model_inputs

from .timing import quartiles, record, table_of, timed, wide_console

_WAYS = ("attention", "norms", "lens", "similarity")


def measure(
    context: int, runs: int, *, device: str = "cpu", as_json: bool = False, name: str = "signals"
) -> list[dict[str, Any]]:
    """Time each signal, and those that need nothing but the pass together, in turn with a plain forward.

    The plain forward ends behind the last block and the final norm: it reads no logits. A lens reads one after each block.
    """
    model, tokenizer = ls.load("smollm2-135m")
    model = model.to(device)
    text = read_text(TextRequest("pydoc", context, context), tokenizer)
    depth = model.config.num_hidden_layers

    @torch.no_grad()
    def plain() -> None:
        model.model(**model_inputs(model, text.ids, text.mask))

    ways: dict[str, Callable[[], object]] = {"plain forward, no logits": plain}
    for signals in (*((way,) for way in _WAYS), ("attention", "norms")):
        measurer = measurer_of(model, signals, depth)
        ways[" + ".join(signals)] = lambda measurer=measurer: measurer.measure(text.ids, text.mask)  # type: ignore[misc]
    times: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(runs + 1):
        for way, go in ways.items():
            started = time.perf_counter()
            go()
            if device != "cpu":
                torch.cuda.synchronize()
            if run:  # the first warms up
                times[way].append(time.perf_counter() - started)
    base = quartiles(times["plain forward, no logits"])[1]
    table = table_of(
        f"SmolLM2-135M, float32, one sequence of {context} tokens", "way", "s", "quartiles", "x a plain forward"
    )
    rows = []
    for way, each in times.items():
        low, middle, high = quartiles(each)
        rows.append(
            {
                "way": way,
                "context": context,
                "runs": runs,
                "seconds": middle,
                "seconds_low": low,
                "seconds_high": high,
                "ratio": middle / base,
            }
        )
        table.add_row(way, f"{middle:.2f}", f"{low:.2f}-{high:.2f}", f"{middle / base:.2f}")
    console = wide_console(stderr=as_json)
    console.print(table)
    console.print(f"Appended to {record(name, rows)}")
    return rows


_NEURONS = """
import sys
from transformers import AutoConfig
from transformers.utils import logging
logging.disable_progress_bar()
import layersurgery as ls
from layersurgery.sweeps.estimate import blocks_on_disk
spread = blocks_on_disk(AutoConfig.from_pretrained(sys.argv[1]))
model = ls.load(sys.argv[1], dtype="auto", device_map=spread, offload_folder=sys.argv[2]).model
print(int(ls.analyses.neurons(model).neurons.sum()))
"""


def neurons(layers: int, *, as_json: bool = False) -> list[dict[str, Any]]:
    """Look at the neurons of a checkpoint of Pythia-6.9b's geometry with few layers: what it takes for each, and the peak of memory."""
    from .random_checkpoint import make

    with tempfile.TemporaryDirectory(prefix="layersurgery-benchmark-") as work:
        path = make(Path(work), depth=layers)
        run = timed([sys.executable, "-c", _NEURONS, str(path), work], env={"HF_HUB_OFFLINE": "1"}, limit=3600)
    if run.code:
        raise SystemExit(run.said)
    row = {
        "way": "neurons",
        "geometry": "pythia-6.9b",
        "layers": layers,
        "neurons": int(run.said.split()[-1]),
        "seconds": run.seconds,
        "bytes_peak": run.bytes_peak,
    }
    table = table_of(
        f"Neurons of Pythia-6.9b's geometry, {layers} of its 32 layers, float16", "layers", "neurons", "s", "peak GiB"
    )
    table.add_row(str(layers), f"{row['neurons']:,}", f"{run.seconds:.0f}", f"{run.bytes_peak / 2**30:.2f}")
    console = wide_console(stderr=as_json)
    console.print(table)
    console.print(f"Appended to {record('neurons', [row])}")
    return [row]
