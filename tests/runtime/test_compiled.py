"""A sweep with blocks that torch has compiled: the same numbers, or the blocks as they are and a word about it."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import layersurgery as ls
from layersurgery.metrics import tiled
from layersurgery.metrics.reference import METRICS
from layersurgery.plans.variants import variants
from layersurgery.runtime.compiled_blocks import Compiler
from layersurgery.sweeps.measurer import Measurer
from tests.metrics.test_tiled import Plain, drawn
from tests.support.zoo import DEPTH, slow, tiny_model, tokens

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


@needs_compiler
@pytest.mark.parametrize("name", [slow("llama"), "gpt_neox", slow("gemma2")])
def test_the_numbers_are_the_same(name: str) -> None:
    model, ids = tiny_model(name), tokens(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*", category=DeprecationWarning)
        compiled = ls.sweep(model, "swap,drop,skip-attention,skip-mlp", ids, compile=True)
    plain = ls.sweep(model, "swap,drop,skip-attention,skip-mlp", ids)
    for metric in METRICS:
        assert (compiled[metric] - plain[metric]).abs().max() < 1e-5
    assert not compiled[list(METRICS)].equals(plain[list(METRICS)]), "nothing was compiled"


@needs_compiler
@pytest.mark.slow
def test_the_digits_do_not_depend_on_which_batch_came_first() -> None:
    """A run that was stopped goes on with another batch first."""
    model = tiny_model("llama")
    long, short = tokens(3), tokens(2)
    mask = torch.ones_like(long)
    mask[:, 9:] = 0
    batches = [(long, torch.ones_like(long)), (short, torch.ones_like(short)), (long, mask)]
    found = []
    for order in ((0, 1, 2), (2, 1, 0)):
        torch._dynamo.reset()
        tiled._compiled.cache_clear()
        torch._dynamo.utils.counters.clear()
        measurer = Measurer(model, variants("swap,drop", DEPTH), compiled=True)
        values = {place: measurer.measure(*batches[place]).values for place in order}
        assert measurer.runner.compiler is not None
        assert measurer.runner.compiler.error is None
        # One for each shape of a batch, whichever block, and few for logits.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5
        found.append(values)
    for place in range(3):
        assert (found[0][place] == found[1][place]).all()


def sweep_with(compile: Any, monkeypatch: pytest.MonkeyPatch, match: str) -> None:
    model, ids = tiny_model("llama"), tokens(2)
    plain = ls.sweep(model, "drop", ids)
    monkeypatch.setattr(tiled, "_compiled", lambda _: tiled._loop)
    monkeypatch.setattr(torch, "compile", compile)
    with pytest.warns(UserWarning, match=match) as said:
        frame = ls.sweep(model, "drop", ids, compile=True)
    assert len([warning for warning in said if "run uncompiled" in str(warning.message)]) == 1
    for metric in METRICS:
        assert (frame[metric] - plain[metric]).abs().max() < 1e-5


def test_where_torch_cannot_compile_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(block: nn.Module, **_: Any) -> Any:
        def fails(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no C++ compiler found\nand much more")

        return fails

    sweep_with(
        compile,
        monkeypatch,
        r"torch cannot compile LlamaDecoderLayer: RuntimeError: no C\+\+ compiler found; blocks are run",
    )


def test_memory_that_runs_out_does_not_stop_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(block: nn.Module, **_: Any) -> Any:
        return lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))

    monkeypatch.setattr(torch, "compile", compile)
    compiler = Compiler()
    with pytest.raises(torch.OutOfMemoryError):
        compiler(nn.Linear(2, 2), torch.zeros(1, 3, 2), lambda stream: ((stream,), {}))
    assert compiler.error is None


def test_what_is_compiled_wrongly_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(block: nn.Module, **_: Any) -> Any:
        return lambda *args, **kwargs: block(*args, **kwargs) * 1.01

    sweep_with(compile, monkeypatch, "compiled by torch, LlamaDecoderLayer returns different values")


@needs_compiler
@pytest.mark.parametrize("vocabulary", [64 * 9, 1009])
def test_the_compiled_loop_over_logits(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 64 * 40)
    readout, x = Plain(drawn(vocabulary, 16)), drawn(20, 16, seed=1)
    target = torch.arange(20)
    one, other = (tiled.logit_stats(readout, x, target, compiled=compiled) for compiled in (True, False))
    assert torch.equal(one.top, other.top)
    for name in ("lse", "entropy", "loss"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-6, atol=1e-6)
