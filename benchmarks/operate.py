"""Time an edit of a loaded model and its undo; the alternative copies the model and edits the copy by hand."""

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

from .timing import append_results, make_table, quartiles, wide_console

_PLANS = ["swap 12 13", "drop 20", "repeat 8:16", "reverse 8:16", "skip-attention 20", "skip-mlp 20"]


class _CountAllocations(TorchDispatchMode):
    """Count the bytes of tensors that operations allocate; views of their arguments do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch has no types here
        self.bytes = 0
        self.known_storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.known_storages |= {_storage_address(value) for value in args if isinstance(value, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and _storage_address(value) not in self.known_storages:
                self.known_storages.add(_storage_address(value))
                self.bytes += value.numel() * value.element_size()
        return result


def _storage_address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def measure(runs: int, *, width: int, as_json: bool = False, name: str = "operate") -> list[dict[str, Any]]:
    """Time each plan `runs` times, in turn with the others, and return one row per method and plan."""
    torch.manual_seed(0)
    shape: dict[str, int] = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": 8,
        "num_hidden_layers": 32,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, **shape)).eval()
    anatomy = ls.anatomy(model)
    _check_methods_agree(model, anatomy)
    methods: dict[tuple[str, str], Callable[[], Any]] = {
        ("operate + undo", plan): partial(ls.operate, model, plan, anatomy=anatomy) for plan in _PLANS
    }
    methods["copy.deepcopy + editing the list", "swap 12 13"] = partial(_edit_a_copy, model)
    times: dict[tuple[str, str], list[float]] = {method: [] for method in methods}
    for _ in range(runs):
        for method, edit in methods.items():
            started = time.perf_counter()
            with edit():
                pass
            times[method].append(time.perf_counter() - started)
    rows = []
    table = make_table(f"32 layers of width {width}", "way", "plan", "ms", "quartiles", "MB allocated")
    for method, edit in methods.items():
        with _CountAllocations() as allocated, edit():
            pass
        low, middle, high = quartiles(times[method])
        row = {
            "way": method[0],
            "plan": method[1],
            "layers": 32,
            "width": width,
            "runs": runs,
            "milliseconds": 1e3 * middle,
        }
        row |= {"milliseconds_low": 1e3 * low, "milliseconds_high": 1e3 * high, "bytes_allocated": allocated.bytes}
        rows.append(row)
        spread = f"{row['milliseconds_low']:.2f}-{row['milliseconds_high']:.2f}"
        table.add_row(method[0], method[1], f"{row['milliseconds']:.2f}", spread, f"{allocated.bytes / 1e6:.1f}")
    console = wide_console(stderr=as_json)
    console.print(table)
    console.print(f"Appended to {append_results(name, rows)}")
    return rows


def _check_methods_agree(model: nn.Module, anatomy: Anatomy) -> None:
    """Check that both methods give the same logits, and that undo restores the original ones."""
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        before = model(ids).logits
        with ls.operate(model, "swap 12 13", anatomy=anatomy):
            edited = model(ids).logits
        with _edit_a_copy(model) as copied_model:
            assert torch.equal(copied_model(ids).logits, edited)
        assert torch.equal(model(ids).logits, before)
        assert not torch.equal(edited, before)


@contextmanager
def _edit_a_copy(model: Any) -> Iterator[Any]:
    edited = copy.deepcopy(model)
    layers = edited.model.layers
    layers[12], layers[13] = layers[13], layers[12]
    for number in (12, 13):
        layers[number].self_attn.layer_idx = number
    yield edited
