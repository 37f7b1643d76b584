"""Time the measurement of signals on a model with random weights; prints a line of JSON for each way.

`python -m benchmarks.observe pythia-410m cuda` is one of the processes that `python -m benchmarks gpu` starts.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from layersurgery.analyses.signal_tables import make_measurer
from layersurgery.runtime.inputs import model_inputs

from .peers import common

_SIGNALS = (("attention",), ("norms",), ("similarity",), ("lens",), ("attention", "norms"))
PLAIN = "plain forward, no logits"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=common.GEOMETRIES)
    parser.add_argument("device")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    vocabulary = common.GEOMETRIES[given.model][3]
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (given.sequences, given.context)))
    mask = torch.ones_like(ids)
    task = common.Task(given.model, getattr(torch, given.dtype), given.device, ids, given.sequences, [])
    model = common.load_with_transformers(task)
    fields = {"model": given.model, "tokens": ids.numel(), "context": given.context, "runs": given.runs}

    def run_plain() -> dict[str, Any]:
        with torch.inference_mode():
            model.base_model(**model_inputs(model, ids, mask))
        return {}

    def run_signals(signals: tuple[str, ...]) -> Callable[[], dict[str, Any]]:
        measurer = make_measurer(model, signals, model.config.num_hidden_layers)

        def run() -> dict[str, Any]:
            result = measurer.measure(ids, mask)
            numbers = [array for array in (result.values, result.observed) if array.size]
            finite = all(bool(np.isfinite(array).all()) for array in numbers)
            return {} if finite else {"fault": "wrong result: it is not finite"}

        return run

    base = math.nan
    for signals in ((), *_SIGNALS):
        row = fields | {"way": " + ".join(signals) or PLAIN}
        try:
            work = run_signals(signals) if signals else run_plain
            seconds = []
            for _ in range(given.runs + 1):
                common.synchronize(given.device)
                started = time.perf_counter()
                row |= work()
                common.synchronize(given.device)
                seconds.append(time.perf_counter() - started)
            row["seconds"] = median(seconds[1:])  # the first run warms up
            base = row["seconds"] if not signals else base
            row["ratio"] = row["seconds"] / base
        except Exception as error:
            row["fault"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
