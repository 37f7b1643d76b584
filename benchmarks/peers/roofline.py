"""The least time that the sweep's multiplications take, by the device's own rate at their shapes: nothing else is computed.

For swap and drop of every block of a model of L blocks: L^2 block calls, shared prefixes once, and 2L readouts, the unedited model's
included. A linear map is one `torch.mm` into memory that is there; attention is torch's own fused kernel, since nothing of torch
multiplies faster at its shapes; a readout is `torch.mm` over slices of the vocabulary. Each is the median of several, warm.
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

_SLICE = 8192


def seconds(work: Callable[[], Any], device: str, times: int) -> float:
    found = []
    for number in range(times + 2):
        common.wait(device)
        started = time.perf_counter()
        work()
        common.wait(device)
        if number >= 2:
            found.append(time.perf_counter() - started)
    return median(found)


def products(model: Any) -> Counter[tuple[int, int]]:
    """(inputs, outputs) of the linear maps of a block."""
    return Counter(
        (m.in_features, m.out_features) for m in model.base_model.layers[0].modules() if isinstance(m, nn.Linear)
    )


def main() -> None:
    asked = common.arguments().parse_args()
    device, dtype = asked.device, getattr(torch, asked.dtype)
    tokens = np.load(asked.tokens)[: asked.sequences]
    task = common.Task(asked.model, dtype, device, torch.from_numpy(tokens), asked.at_once, [])
    model = common.load_plain(task)
    config, depth = model.config, asked.depth
    maps, unembedding = products(model), model.get_output_embeddings().weight.shape
    del model
    sequences, length = min(asked.at_once, len(tokens)), tokens.shape[1]
    count, positions = sequences * length, sequences * (length - 1)
    times = 5 if device == "cpu" else 20

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    with torch.inference_mode(), reuse_cpu_memory() if device == "cpu" else nullcontext():
        linear = 0.0
        for (inputs, outputs), number in maps.items():
            x, weight, out = drawn(count, inputs), drawn(outputs, inputs), drawn(count, outputs)
            linear += number * seconds(lambda x=x, w=weight, out=out: torch.mm(x, w.T, out=out), device, times)  # type: ignore[misc]
        heads = config.num_attention_heads
        wide = getattr(config, "head_dim", None) or config.hidden_size // heads
        q, k, v = (drawn(sequences, length, heads, wide).transpose(1, 2) for _ in range(3))
        attention = seconds(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True), device, times)
        x, weight = drawn(positions, unembedding[1]), drawn(*unembedding)
        out = drawn(positions, _SLICE)

        def read() -> None:
            for start in range(0, len(weight), _SLICE):
                part = weight[start : start + _SLICE]
                torch.mm(x, part.T, out=out[:, : len(part)] if len(part) == _SLICE else None)

        readout = seconds(read, device, times)
    routes = [variant.route for variant in variants(asked.edits, depth)]
    plan = schedule(list(dict.fromkeys(routes)), depth)
    readouts = len(set(routes)) + 1
    batches = -(-len(tokens) // asked.at_once)
    total = batches * (plan.calls * (linear + attention) + readouts * readout)
    flops = 2 * count * sum(number * a * b for (a, b), number in maps.items())
    more = {
        "block_calls": plan.calls, "readouts": readouts, "seconds_linear": linear, "seconds_attention": attention, "seconds_readout": readout,
        "gigaflops_linear": flops / linear / 1e9, "gigaflops_readout": 2 * positions * unembedding[0] * unembedding[1] / readout / 1e9,
    }  # fmt: skip
    common.write(asked.out, "torch", [], total, tokens.size, device, **more)


if __name__ == "__main__":
    main()
