"""The fused kernel against the dense definition in float64: on a GPU where there is one, else in Triton's interpreter.

What one pass keeps may be off by what the ordinary way in float32 is off, and a little.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layersurgery.metrics import dispatch, reference, tiled
from layersurgery.metrics.reference import METRICS
from layersurgery.runtime.unembedding import Unembedding
from tests.metrics.test_tiled import drawn

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
pytest.importorskip("triton", reason="needs Triton")
triton_kernel: Any = importlib.import_module("layersurgery.metrics.triton_kernel")
ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = triton_kernel.Tiling(16, 32, 16, 4, 2)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Case:
    """Numbers for a readout, and what the dense way makes of them."""

    x: torch.Tensor
    w: torch.Tensor
    target: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, dtype: torch.dtype, x: torch.Tensor | None = None) -> torch.Tensor:
        z = (self.x if x is None else x).to(dtype) @ self.w.to(dtype).T
        z = self.scale * (z if self.bias is None else z + self.bias.to(dtype))
        return z if self.cap is None else self.cap * (z / self.cap).tanh()

    @property
    def options(self) -> dict[str, Any]:
        return {"bias_V": self.bias, "scale": self.scale, "cap": self.cap}


def case(tokens: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    if options.pop("bias", False):
        options["bias"] = drawn(vocabulary, seed=5, scale=2).to(DEVICE, dtype)
    target = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(4))
    x, w = drawn(tokens, width, seed=1), drawn(vocabulary, width, seed=2, scale=3 / math.sqrt(width))
    return Case(x.to(DEVICE, dtype), w.to(DEVICE, dtype), target.to(DEVICE), **options)


def read(z: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """What follows from one pass, densely."""
    log = z.log_softmax(-1)
    return {
        "lse": z.logsumexp(-1),
        "entropy": -(log.exp() * log).sum(-1),
        "loss": -log.gather(-1, target[:, None])[:, 0],
    }


def found(sums: Any) -> dict[str, torch.Tensor]:
    lse = sums.m + sums.S.log()
    return {"lse": lse, "entropy": sums.S.log() - sums.A / sums.S, "loss": lse - sums.wanted}


def check(given: Case, tiling: Any = SMALL, tolerance: float = 2e-6) -> None:
    if DEVICE == "cuda":  # tensor cores truncate their float32 sums after each step
        tolerance += given.x.shape[1] / 16 * 2**-24
    sums = triton_kernel.logit_sums(given.x, given.w, given.target, tiling=tiling, **given.options)
    exact, ordinary = (read(given.logits(dtype), given.target) for dtype in (torch.float64, torch.float32))
    size = float(given.logits(torch.float64).abs().max())
    for name, value in found(sums).items():
        assert value.dtype == torch.float64
        allowed = (ordinary[name].double() - exact[name]).abs().max() + tolerance * max(1.0, size)
        assert (value - exact[name]).abs().max() <= allowed, name
    z = given.logits(torch.float64)
    # The most likely token, or one that rounding cannot tell from it.
    assert (z.amax(-1) - z.gather(-1, sums.top[:, None])[:, 0]).max() <= 2e-6 * max(1.0, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "width"), [(1, 2, 3), (1, 613, 16), (33, 97, 40), (16, 32, 16), (50, 1009, 7)]
)
def test_awkward_shapes(tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> None:
    check(case(tokens, vocabulary, width, dtype))


@pytest.mark.parametrize("vocabulary", [50257, 50304, 151936, 256000])
def test_vocabularies_of_real_models(vocabulary: int) -> None:
    tiling = triton_kernel.Tiling(16, 4096, 32, 4, 2) if DEVICE == "cpu" else None
    check(case(3, vocabulary, 24, torch.bfloat16), tiling=tiling)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{"bias": True}, {"scale": 0.0625}, {"cap": 5.0}, {"bias": True, "scale": 0.3, "cap": 30.0}], ids=str
)
def test_bias_scale_and_soft_cap(options: dict[str, Any], dtype: torch.dtype) -> None:
    check(case(19, 301, 33, dtype, **options))


def test_rows_that_do_not_lie_together() -> None:
    given = case(20, 130, 32)
    wide, deep = torch.zeros(20, 50, device=DEVICE), torch.zeros(260, 32, device=DEVICE)
    wide[:, :32], deep[::2] = given.x, given.w
    given.x, given.w = wide[:, :32], deep[::2]
    check(given)
    given.x = given.x.T.contiguous().T
    check(given)


def test_the_first_of_equal_logits_wins() -> None:
    w = torch.zeros(200, 16, device=DEVICE)
    w[[45, 46, 77, 199]] = 1.0
    x = torch.ones(2, 16, device=DEVICE)
    sums = triton_kernel.logit_sums(x, w, torch.tensor([0, 45], device=DEVICE), tiling=SMALL)
    assert sums.top.tolist() == [45, 45]
    assert sums.wanted.tolist() == [0, 16]


def test_padding_is_never_read_and_every_number_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the kernel is given holds no numbers; nor does what lies behind its input."""

    def filled(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = torch.zeros(*args, device=self.device, dtype=kwargs.get("dtype", self.dtype))
        return fresh.fill_(math.nan if fresh.is_floating_point() else -7)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    given = case(21, 75, 20)
    x, w = torch.full((64, 20), math.nan, device=DEVICE), torch.full((128, 20), math.nan, device=DEVICE)
    x[:21], w[:75] = given.x, given.w
    given.x, given.w = x[:21], w[:75]
    check(given)


def test_the_same_input_gives_the_same_digits() -> None:
    given = case(40, 700, 48, torch.bfloat16)
    one, other = (triton_kernel.logit_sums(given.x, given.w, given.target) for _ in range(2))
    for name in ("m", "S", "A", "top", "wanted"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_shows(bad: float) -> None:
    given = case(20, 75, 16)
    given.x[3, 5] = bad
    lse = found(triton_kernel.logit_sums(given.x, given.w, given.target, tiling=SMALL))["lse"]
    assert not lse[3].isfinite()
    assert lse[[0, 1, 2, 4, 19]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"cap": 4.0}, {"cap": 30.0, "bias": True, "scale": 2.0}], ids=str)
def test_divergence_side_by_side(options: dict[str, Any], dtype: torch.dtype) -> None:
    given = case(35, 211, 30, dtype, **options)
    other = (given.x + drawn(35, 30, seed=9, scale=0.3).to(DEVICE)).to(dtype)
    p, q = given.logits(torch.float64), given.logits(torch.float64, other)
    meant = (p.softmax(-1) * (p - q)).sum(-1)
    moved = triton_kernel.kl_terms(given.x, other, given.w, p.logsumexp(-1), tiling=SMALL, **given.options)
    torch.testing.assert_close(moved, meant, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_metrics_are_the_definitions(
    cap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = case(30, 401, 24, dtype, bias=True, cap=cap, scale=0.5)
    runner: Any = None
    readout = Unembedding(runner, None, SimpleNamespace(weight=given.w, bias=given.bias), given.scale, given.cap)
    monkeypatch.setattr(dispatch, "can_fuse", lambda *_: True)
    monkeypatch.setattr(tiled, "logit_stats", None)
    other = drawn(30, 24, seed=8).to(DEVICE, dtype)
    base = dispatch.baseline(readout, given.x, given.target)
    values = dispatch.measure(readout, other, base)
    meant = reference.measure(given.logits(torch.float64), given.logits(torch.float64, other), given.target)
    torch.testing.assert_close(values, meant, rtol=1e-5, atol=2e-5)
    assert dispatch.measure(readout, given.x.clone(), base)[METRICS.index("kl_nats")].eq(0).all()
    monkeypatch.undo()  # with tails, which the fused kernel does not have, tiles are read
    monkeypatch.setattr(dispatch, "can_fuse", lambda *_: True)
    monkeypatch.setattr(triton_kernel, "logit_sums", None)
    monkeypatch.setattr(triton_kernel, "kl_terms", None)
    tails = dispatch.measure(readout, other, dispatch.baseline(readout, given.x, given.target, tails=True))
    torch.testing.assert_close(tails[: len(METRICS)], meant, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("width", [2048, 4096])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_errors_stay_small_at_the_widths_of_large_models(width: int, cap: float | None) -> None:
    given = case(5, 300, width, torch.bfloat16, cap=cap)
    check(given, triton_kernel.Tiling(16, 128, 512, 4, 2), tolerance=1e-6)


def test_a_scale_or_a_large_logit_costs_no_digits() -> None:
    """Powers of two need logits times log2(e), which is rounded: the same factor leads back."""
    given = case(5, 300, 64, torch.bfloat16, scale=0.3)
    given.x *= 512
    sums = triton_kernel.logit_sums(given.x, given.w, given.target, tiling=SMALL, **given.options)
    exact = read(given.logits(torch.float64), given.target)
    size = float(given.logits(torch.float64).abs().max())
    assert size > 100
    truncated = given.x.shape[1] / 16 * 2**-24 if DEVICE == "cuda" else 0
    assert (found(sums)["lse"] - exact["lse"]).abs().max() < (1e-7 + truncated) * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 3), (33, 40), (9, 1500)])
def test_the_scalar_product_of_the_divergence(tokens: int, width: int, dtype: torch.dtype) -> None:
    wide = drawn(tokens, 2 * width, seed=1).to(DEVICE, dtype)
    x, p_x = wide[:, :width], drawn(tokens, width, seed=2).to(DEVICE, dtype)
    mean = drawn(tokens, width, seed=3).to(DEVICE)
    terms = triton_kernel.cross_term(x, p_x, mean)
    assert terms.dtype == torch.float64
    torch.testing.assert_close(terms, ((x.double() - p_x.double()) * mean.double()).sum(-1), rtol=1e-13, atol=1e-13)
    assert triton_kernel.cross_term(p_x, p_x.clone(), mean).eq(0).all()


@pytest.mark.parametrize("tokens", [1, 100, 2047, 4094, 8192, 16376, 32768])
@pytest.mark.parametrize(("width", "vocabulary"), [(768, 50257), (2048, 50304), (4096, 50432), (2304, 262144)])
def test_the_grid_keeps_an_h100_busy(tokens: int, width: int, vocabulary: int) -> None:
    blocks, tiles, at_once, cache = math.ceil(tokens / 128), math.ceil(vocabulary / 256), 132, 50 << 20
    parts = triton_kernel.choose_parts(
        blocks, tiles, block_bytes=256 * width, at_once=at_once, cache_bytes=cache, most=max(1, (1 << 18) // tokens)
    )
    tiles_per_part = math.ceil(tiles / parts)
    assert math.ceil(tiles / tiles_per_part) == parts, "no part is empty"
    assert parts * tokens <= 1 << 18
    slowest = math.ceil(blocks * parts / at_once) * tiles_per_part
    assert blocks * tiles / (at_once * slowest) >= 0.9 or slowest <= 2
    # The blocks of tokens that are read at once fit into half of the cache.
    assert min(blocks, math.ceil(at_once / parts) + 1) * 256 * width <= cache / 2


def test_a_kernel_is_launched_on_the_device_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_kernel._current(torch.device("cuda:1")).idx == 1
    current: list[torch.device] = []
    launched: list[str] = []

    @contextmanager
    def record_device(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    class Launched:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            def launch(*_args: Any, **_options: Any) -> None:
                assert [device.type for device in current] == [DEVICE]
                launched.append(self.name)

            return launch

    monkeypatch.setattr(triton_kernel, "_current", record_device)
    kernels = ("_summing", "_diverging", "_crossing")
    for name in kernels:
        monkeypatch.setattr(triton_kernel, name, Launched(name))
    given = case(3, 40, 16)
    triton_kernel.logit_sums(given.x, given.w, given.target)
    triton_kernel.kl_terms(given.x, given.x, given.w, torch.zeros(3, device=DEVICE), cap=2.0)
    triton_kernel.cross_term(given.x, given.x, given.x)
    assert launched == list(kernels)


@pytest.mark.parametrize(
    ("capability", "dtype", "scale", "used"),
    [
        ((7, 5), torch.float16, 1.0, False),  # T4
        ((8, 0), torch.float16, 1.0, True),
        ((12, 0), torch.bfloat16, 0.5, True),
        ((9, 0), torch.bfloat16, -1.0, False),
        ((9, 0), torch.float32, 1.0, False),
    ],
)
def test_the_fused_kernel_is_used_where_it_is_fast(
    capability: tuple[int, int], dtype: torch.dtype, scale: float, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    on_cuda: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=dtype)
    runner: Any = None
    readout = Unembedding(runner, None, SimpleNamespace(weight=torch.zeros(2, 2, dtype=dtype)), scale)
    assert dispatch.can_fuse(readout, on_cuda) is used
    assert not dispatch.can_fuse(readout, torch.zeros(2, 2, dtype=dtype))


def compile_all(capability: int, *options: str, **env: str) -> list[dict[str, Any]]:
    """Compile the kernels in an interpreter of its own, since this one may only interpret them."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.compile_kernels", str(capability), *options]
    ran = subprocess.run(command, env=inherited | env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "UserWarning" not in ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def check_compiled(kernels: list[dict[str, Any]], instruction: str, most_stack: int) -> None:
    assert {kernel["kernel"] for kernel in kernels} == {"_summing", "_diverging", "_crossing"}
    for kernel in kernels:
        assert kernel["stack"] <= most_stack, kernel
        if kernel["kernel"] != "_crossing":
            assert kernel["instruction"] == instruction, kernel


# Triton 3.9 keeps up to 24 registers of a thread on the stack while it works on a tile's logits; 3.6 keeps none there.
STACK = 96


@pytest.mark.parametrize(
    ("capability", "instruction", "options"),
    [
        (90, "wgmma", ["--first"]),
        *(
            pytest.param(capability, instruction, [], marks=pytest.mark.slow)
            for capability, instruction in ((80, "mma.sync"), (90, "wgmma"), (100, "tcgen05"), (120, "mma.sync"))
        ),
    ],
)
def test_they_compile_for_real_devices(capability: int, instruction: str, options: list[str]) -> None:
    check_compiled(compile_all(capability, *options), instruction, STACK)


@pytest.mark.weekly
def test_they_compile_with_the_triton_of_an_older_torch(tmp_path: Path) -> None:
    target = ["uv", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "triton==3.6.0"]
    subprocess.run(target, check=True)
    for capability, instruction in ((80, "mma.sync"), (90, "wgmma")):
        kernels = compile_all(capability, PYTHONPATH=str(tmp_path))
        assert {kernel["triton"] for kernel in kernels} == {"3.6.0"}
        check_compiled(kernels, instruction, 0)
