"""Nothing inside a batch asks for a value on the device, which would make the CPU wait for a GPU.

This runs on a CPU, where such operations can be seen but copies between devices cannot; `tests/runtime/test_cuda.py`
lets a GPU's driver find both.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layersurgery.metrics import dispatch
from layersurgery.plans.variants import variants
from layersurgery.sweeps.batch_metrics import BatchMetrics
from layersurgery.sweeps.executor import ScheduleExecutor
from layersurgery.sweeps.measurer import Measurer
from layersurgery.sweeps.quantities import SIGNALS, Observed
from tests.support.zoo import DEPTH, tiny_model, tokens

pytest.importorskip("triton", reason="needs Triton")

WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.unique_consecutive.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.repeat_interleave.Tensor,
}


class FindWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that refuses operations that would make the CPU wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        assert func not in WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("signals", [(), SIGNALS], ids=["sweep", "signals"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_nothing_waits_inside_a_batch(name: str, signals: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("layersurgery.metrics.triton_kernel")
    monkeypatch.setattr(dispatch, "_kernel_for", lambda _: kernel)
    model, ids = tiny_model(name).bfloat16(), tokens(3)
    observe = Observed(signals) if signals else None
    measurer = Measurer(model, variants("swap,drop", DEPTH), observe=observe)
    run_steps, readouts = ScheduleExecutor.run_steps, 0

    def run_without_waiting(self: ScheduleExecutor, *args: Any) -> None:
        with FindWaiting():  # type: ignore[no-untyped-call]
            run_steps(self, *args)

    read = BatchMetrics.read

    def count_readouts(self: BatchMetrics, *args: Any) -> None:
        nonlocal readouts
        readouts += 1
        read(self, *args)

    monkeypatch.setattr(ScheduleExecutor, "run_steps", run_without_waiting)
    monkeypatch.setattr(BatchMetrics, "read", count_readouts)
    measurer.measure(ids, torch.ones_like(ids))
    assert readouts == len(measurer.routes)
    monkeypatch.setattr(BatchMetrics, "read", lambda self, *_: self.sums[0].sum().item())
    with pytest.raises(AssertionError, match="_local_scalar_dense.default waits"):
        measurer.measure(ids, torch.ones_like(ids))
