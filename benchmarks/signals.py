"""Time the measurement of signals during a pass over text, and the search for a checkpoint's neurons.

The reference is a plain forward. The checkpoint of the neurons has Pythia-6.9b's geometry.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import layersurgery as ls
from layersurgery.analyses.signal_tables import make_measurer
from layersurgery.runs.text import read_text
from layersurgery.runs.text_request import TextRequest
from layersurgery.runtime.inputs import model_inputs

from .timing import append_results, make_table, quartiles, run_timed, wide_console

_SIGNALS = ("attention", "norms", "lens", "similarity")


def measure(
    context: int, runs: int, *, device: str = "cpu", as_json: bool = False, name: str = "signals"
) -> list[dict[str, Any]]:
    """Time each signal, and attention and norms together, in turn with a plain forward.

    The plain forward ends after the final norm: it computes no logits. A lens computes logits after every block.

    Args:
        context: tokens of the one sequence.
        runs: runs of each method that count.
        device: cpu or cuda.
        as_json: print progress on stderr, since stdout is for JSON.
        name: name of the results file.

    Returns:
        The rows of the table, which are appended to the results.
    """
    model, tokenizer = ls.load("smollm2-135m")
    model = model.to(device)
    text = read_text(TextRequest("pydoc", context, context), tokenizer)
    depth = model.config.num_hidden_layers

    @torch.no_grad()
    def run_plain_forward() -> None:
        model.model(**model_inputs(model, text.ids, text.mask))

    methods: dict[str, Callable[[], object]] = {"plain forward, no logits": run_plain_forward}
    for signals in (*((signal,) for signal in _SIGNALS), ("attention", "norms")):
        measurer = make_measurer(model, signals, depth)
        methods[" + ".join(signals)] = lambda measurer=measurer: measurer.measure(text.ids, text.mask)  # type: ignore[misc]
    times: dict[str, list[float]] = {method: [] for method in methods}
    for run in range(runs + 1):
        for method, execute in methods.items():
            started = time.perf_counter()
            execute()
            if device != "cpu":
                torch.cuda.synchronize()
            if run:  # the first run warms up
                times[method].append(time.perf_counter() - started)
    base = quartiles(times["plain forward, no logits"])[1]
    table = make_table(
        f"SmolLM2-135M, float32, one sequence of {context} tokens", "way", "s", "quartiles", "x a plain forward"
    )
    rows = []
    for method, seconds in times.items():
        low, middle, high = quartiles(seconds)
        rows.append(
            {
                "way": method,
                "context": context,
                "runs": runs,
                "seconds": middle,
                "seconds_low": low,
                "seconds_high": high,
                "ratio": middle / base,
            }
        )
        table.add_row(method, f"{middle:.2f}", f"{low:.2f}-{high:.2f}", f"{middle / base:.2f}")
    console = wide_console(stderr=as_json)
    console.print(table)
    console.print(f"Appended to {append_results(name, rows)}")
    return rows


_NEURONS = """
import sys
from transformers import AutoConfig
from transformers.utils import logging
logging.disable_progress_bar()
import layersurgery as ls
from layersurgery.sweeps.weight_placement import blocks_on_disk
device_map = blocks_on_disk(AutoConfig.from_pretrained(sys.argv[1]))
model = ls.load(sys.argv[1], dtype="auto", device_map=device_map, offload_folder=sys.argv[2]).model
print(int(ls.analyses.neurons(model).neurons.sum()))
"""


def neurons(layers: int, *, as_json: bool = False) -> list[dict[str, Any]]:
    """Time the analysis of the neurons of a checkpoint with Pythia-6.9b's geometry.

    Args:
        layers: layers of the checkpoint.
        as_json: print progress on stderr, since stdout is for JSON.

    Returns:
        One row with time and peak memory, which is appended to the results.
    """
    from .random_checkpoint import write_random_checkpoint

    with tempfile.TemporaryDirectory(prefix="layersurgery-benchmark-") as work:
        path = write_random_checkpoint(Path(work), depth=layers)
        run = run_timed([sys.executable, "-c", _NEURONS, str(path), work], env={"HF_HUB_OFFLINE": "1"}, limit=3600)
    if run.exit_code:
        raise SystemExit(run.output)
    row = {
        "way": "neurons",
        "geometry": "pythia-6.9b",
        "layers": layers,
        "neurons": int(run.output.split()[-1]),
        "seconds": run.seconds,
        "bytes_peak": run.bytes_peak,
    }
    table = make_table(
        f"Neurons of Pythia-6.9b's geometry, {layers} of its 32 layers, float16", "layers", "neurons", "s", "peak GiB"
    )
    table.add_row(str(layers), f"{row['neurons']:,}", f"{run.seconds:.0f}", f"{run.bytes_peak / 2**30:.2f}")
    console = wide_console(stderr=as_json)
    console.print(table)
    console.print(f"Appended to {append_results('neurons', [row])}")
    return [row]
