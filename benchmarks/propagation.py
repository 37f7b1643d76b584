"""Time a sweep with and without propagation, or tails, on a model with random weights; prints a line of JSON.

Both ways run in one process and in turn, on the same schedule, and what the option adds is measured as a ratio. On a
CPU it is a ratio of CPU times, which other programs change less than wall times.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import numpy as np
import torch

from layersurgery.plans.variants import variants
from layersurgery.sweeps.measurer import Measurer

from .peers import common


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=common.GEOMETRIES)
    parser.add_argument("--of", choices=("propagation", "tails"), default="propagation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--edits", default="drop")
    parser.add_argument("--layers", help="blocks to edit, for example 20:24; by default all")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    vocabulary = common.GEOMETRIES[given.model][3]
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (given.sequences, given.context)))
    mask = torch.ones_like(ids)
    task = common.Task(given.model, getattr(torch, given.dtype), given.device, ids, given.sequences, [])
    model = common.load_with_transformers(task)
    chosen = variants(given.edits, model.config.num_hidden_layers, given.layers)
    measured = Measurer(model, chosen, propagation=given.of == "propagation", tails=given.of == "tails")
    plain = Measurer(model, chosen, order=measured.schedule.name)
    clock = time.process_time if given.device == "cpu" else time.perf_counter
    seconds: dict[Measurer, list[float]] = {measured: [], plain: []}
    for _ in range(given.pairs + 1):
        for measurer, times in seconds.items():
            common.synchronize(given.device)
            started = clock()
            measurer.measure(ids, mask)
            common.synchronize(given.device)
            times.append(clock() - started)
    pairs = list(zip(*(times[1:] for times in seconds.values()), strict=True))  # the first pair warms up
    ratios = [with_it / without for with_it, without in pairs]
    row = {
        "model": given.model,
        "of": given.of,
        "device": given.device,
        "dtype": given.dtype,
        "tokens": ids.numel(),
        "context": given.context,
        "edits": given.edits,
        "order": measured.schedule.name,
        "block_calls": measured.schedule.calls,
        "seconds": median(with_it for with_it, _ in pairs),
        "seconds_without": median(without for _, without in pairs),
        "ratio": median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
