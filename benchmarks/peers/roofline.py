"""Compute the least time that the sweep's matrix products can take, at the device's own rate for their shapes.

For swap and drop of every block of a model of L blocks these are L^2 block calls, since shared prefixes run once, and
2L readouts, including the unedited model's. A linear map is one `torch.mm` into memory that is already allocated.
Attention is PyTorch's own fused kernel, the fastest in PyTorch at these shapes. A readout is `torch.mm` over slices of
the vocabulary. Each time is the median of several warm runs. Nothing else is computed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from layersurgery.plans.variants import variants
from layersurgery.runtime.cpu_memory import reuse_cpu_memory
from layersurgery.sweeps.schedule import schedule

from . import common

_VOCAB_SLICE = 8192


def median_seconds(work: Callable[[], Any], device: str, runs: int) -> float:
    """Return the median time of `runs` runs, after two runs that do not count."""
    seconds = []
    for run in range(runs + 2):
        common.synchronize(device)
        started = time.perf_counter()
        work()
        common.synchronize(device)
        if run >= 2:
            seconds.append(time.perf_counter() - started)
    return median(seconds)


def count_linear_maps(model: Any) -> Counter[tuple[int, int]]:
    """Count the linear maps of a block by (inputs, outputs)."""
    return Counter(
        (m.in_features, m.out_features) for m in model.base_model.layers[0].modules() if isinstance(m, nn.Linear)
    )


def main() -> None:
    args = common.argument_parser().parse_args()
    device, dtype = args.device, getattr(torch, args.dtype)
    tokens = np.load(args.tokens)[: args.sequences]
    task = common.Task(args.model, dtype, device, torch.from_numpy(tokens), args.at_once, [])
    model = common.load_with_transformers(task)
    config, depth = model.config, args.depth
    linear_maps, unembedding = count_linear_maps(model), model.get_output_embeddings().weight.shape
    del model
    sequences, length = min(args.at_once, len(tokens)), tokens.shape[1]
    count, positions = sequences * length, sequences * (length - 1)
    runs = 5 if device == "cpu" else 20

    def random_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    with torch.inference_mode(), reuse_cpu_memory() if device == "cpu" else nullcontext():
        linear = 0.0
        for (inputs, outputs), number in linear_maps.items():
            x, weight, out = random_tensor(count, inputs), random_tensor(outputs, inputs), random_tensor(count, outputs)
            linear += number * median_seconds(lambda x=x, w=weight, out=out: torch.mm(x, w.T, out=out), device, runs)  # type: ignore[misc]
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        q, k, v = (random_tensor(sequences, length, heads, head_dim).transpose(1, 2) for _ in range(3))
        attention = median_seconds(
            lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True), device, runs
        )
        x, weight = random_tensor(positions, unembedding[1]), random_tensor(*unembedding)
        out = random_tensor(positions, _VOCAB_SLICE)

        def read() -> None:
            for start in range(0, len(weight), _VOCAB_SLICE):
                rows = weight[start : start + _VOCAB_SLICE]
                torch.mm(x, rows.T, out=out[:, : len(rows)] if len(rows) == _VOCAB_SLICE else None)

        readout = median_seconds(read, device, runs)
    routes = [variant.route for variant in variants(args.edits, depth)]
    sweep_schedule = schedule(list(dict.fromkeys(routes)), depth)
    readouts = len(set(routes)) + 1
    batches = -(-len(tokens) // args.at_once)
    total = batches * (sweep_schedule.calls * (linear + attention) + readouts * readout)
    flops = 2 * count * sum(number * a * b for (a, b), number in linear_maps.items())
    more = {
        "block_calls": sweep_schedule.calls, "readouts": readouts,
        "seconds_linear": linear, "seconds_attention": attention, "seconds_readout": readout,
        "gigaflops_linear": flops / linear / 1e9,
        "gigaflops_readout": 2 * positions * unembedding[0] * unembedding[1] / readout / 1e9,
    }  # fmt: skip
    common.write(args.out, "torch", [], [total], tokens.size, device, **more)


if __name__ == "__main__":
    main()
