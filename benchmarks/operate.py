"""What operating on a live model and undoing it costs, beside copying the model and editing the copy by hand."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import layersurgery as ls
from layersurgery.models.anatomy import Anatomy

from .timing import quartiles, record, table_of, wide_console

_PLANS = ["swap 12 13", "drop 20", "repeat 8:16", "reverse 8:16", "skip-attention 20", "skip-mlp 20"]


class _Allocated(TorchDispatchMode):
    """Bytes of the tensors that operations make; views of what they were given do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.bytes = 0
        self.held: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.held |= {_memory(value) for value in args if isinstance(value, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else [found]:
            if isinstance(value, torch.Tensor) and _memory(value) not in self.held:
                self.held.add(_memory(value))
                self.bytes += value.numel() * value.element_size()
        return found


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def measure(runs: int, *, width: int, as_json: bool = False, name: str = "operate") -> list[dict[str, Any]]:
    """Time each plan `runs` times, in turn with the others; one row for each way and plan."""
    torch.manual_seed(0)
    shape: dict[str, int] = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": 8,
        "num_hidden_layers": 32,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, **shape)).eval()
    anatomy = ls.anatomy(model)
    _gate(model, anatomy)
    ways: dict[tuple[str, str], Callable[[], Any]] = {
        ("operate + undo", plan): partial(ls.operate, model, plan, anatomy=anatomy) for plan in _PLANS
    }
    ways["copy.deepcopy + editing the list", "swap 12 13"] = partial(_by_hand, model)
    times: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, editing in ways.items():
            started = time.perf_counter()
            with editing():
                pass
            times[way].append(time.perf_counter() - started)
    rows = []
    table = table_of(f"32 layers of width {width}", "way", "plan", "ms", "quartiles", "MB allocated")
    for way, editing in ways.items():
        with _Allocated() as allocated, editing():
            pass
        low, middle, high = quartiles(times[way])
        row = {
            "way": way[0],
            "plan": way[1],
            "layers": 32,
            "width": width,
            "runs": runs,
            "milliseconds": 1e3 * middle,
        }
        row |= {"milliseconds_low": 1e3 * low, "milliseconds_high": 1e3 * high, "bytes_allocated": allocated.bytes}
        rows.append(row)
        spread = f"{row['milliseconds_low']:.2f}-{row['milliseconds_high']:.2f}"
        table.add_row(way[0], way[1], f"{row['milliseconds']:.2f}", spread, f"{allocated.bytes / 1e6:.1f}")
    console = wide_console(stderr=as_json)
    console.print(table)
    console.print(f"Appended to {record(name, rows)}")
    return rows


def _gate(model: nn.Module, anatomy: Anatomy) -> None:
    """Nothing is timed that is not right."""
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        before = model(ids).logits
        with ls.operate(model, "swap 12 13", anatomy=anatomy):
            edited = model(ids).logits
        with _by_hand(model) as other:
            assert torch.equal(other(ids).logits, edited)
        assert torch.equal(model(ids).logits, before)
        assert not torch.equal(edited, before)


@contextmanager
def _by_hand(model: Any) -> Iterator[Any]:
    edited = copy.deepcopy(model)
    layers = edited.model.layers
    layers[12], layers[13] = layers[13], layers[12]
    for number in (12, 13):
        layers[number].self_attn.layer_idx = number
    yield edited
