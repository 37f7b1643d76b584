"""What only a GPU can show."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from layersurgery.metrics import dispatch
from layersurgery.plans.variants import variants
from layersurgery.runtime.unembedding import Unembedding
from layersurgery.sweeps.measurer import Measurer
from tests.metrics.test_tiled import drawn
from tests.support.zoo import DEPTH, tiny_model, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "cohere"])
def test_the_same_numbers_as_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    model, ids = tiny_model(name).to(dtype), tokens(3)
    chosen = variants("swap,drop", DEPTH)
    here = Measurer(model, chosen).measure(ids, torch.ones_like(ids)).values
    there = Measurer(model.to("cuda"), chosen).measure(ids, torch.ones_like(ids)).values
    assert abs(here - there).max() < (1e-3 if dtype == torch.float32 else 2.0)


def test_nothing_waits_for_the_device_inside_a_batch() -> None:
    model, ids = tiny_model("llama").to("cuda"), tokens(3)
    measurer = Measurer(model, variants("swap,drop", DEPTH))
    measurer.measure(ids, torch.ones_like(ids))
    fractions: list[float] = []

    def on_fraction(fraction: float) -> None:
        # From the first step on, until the last.
        torch.cuda.set_sync_debug_mode("error" if fraction < 1 else "default")
        fractions.append(fraction)

    try:
        measurer.measure(ids, torch.ones_like(ids), on_fraction=on_fraction)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(fractions) > len(measurer.routes)


def test_the_readout_makes_no_logits() -> None:
    tokens_at_once, width, vocabulary = 4096, 512, 50304
    w = drawn(vocabulary, width, scale=0.05).to("cuda", torch.bfloat16)
    x = drawn(tokens_at_once, width).to("cuda", torch.bfloat16)
    readout = Unembedding(None, None, SimpleNamespace(weight=w))  # type: ignore[arg-type] # it is not asked for its stack
    base = dispatch.baseline(readout, x, torch.zeros(tokens_at_once, dtype=torch.long))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dispatch.measure(readout, x, base)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
