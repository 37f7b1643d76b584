"""What only a GPU can show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layersurgery.metrics import dispatch, reference
from layersurgery.plans.variants import variants
from layersurgery.runtime.unembedding import Unembedding
from layersurgery.sweeps.batch_metrics import BatchMetrics
from layersurgery.sweeps.executor import ScheduleExecutor
from layersurgery.sweeps.measurer import Measurer
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


def test_nothing_waits_for_the_device_inside_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama").to("cuda"), tokens(3)
    measurer = Measurer(model, variants("swap,drop", DEPTH))
    measurer.measure(ids, torch.ones_like(ids))
    run_steps = ScheduleExecutor.run_steps

    def run_without_waiting(self: ScheduleExecutor, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run_steps(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(ScheduleExecutor, "run_steps", run_without_waiting)
    measurer.measure(ids, torch.ones_like(ids))
    read = BatchMetrics.read
    monkeypatch.setattr(BatchMetrics, "read", lambda self, *args: (read(self, *args), self.sums[0].sum().item()))
    with pytest.raises(RuntimeError, match="synchroniz"):
        measurer.measure(ids, torch.ones_like(ids))


@pytest.mark.parametrize(("width", "vocabulary"), [(2048, 50304), (4096, 50432)])
def test_the_readout_makes_no_logits_and_is_exact(width: int, vocabulary: int) -> None:
    count = 16376
    generator = torch.Generator("cuda").manual_seed(0)
    w = (torch.randn(vocabulary, width, generator=generator, device="cuda") * 3 * width**-0.5).bfloat16()
    x, p_x = (torch.randn(count, width, generator=generator, device="cuda").bfloat16() for _ in range(2))
    target = torch.randint(0, vocabulary, (count,), generator=generator, device="cuda")
    readout = Unembedding(None, None, SimpleNamespace(weight=w))  # type: ignore[arg-type] # it is not asked for its stack
    base = dispatch.baseline(readout, p_x, target)
    dispatch.measure(readout, x, base)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values = dispatch.measure(readout, x, base)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
    rows = torch.cat([torch.arange(32), torch.arange(count - 32, count)]).to("cuda")
    p, q = (hidden[rows].double() @ w.double().T for hidden in (p_x, x))
    exact = reference.measure(p, q, target[rows])
    torch.testing.assert_close(values[:, rows], exact, rtol=1e-4, atol=1e-4)
