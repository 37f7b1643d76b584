"""Check and time one variant of the readout on all shapes, and print a line of JSON for each shape and tiling.

`python -m benchmarks.readout_variants fused` is one of the processes that `python -m benchmarks gpu` starts. If a fault
leaves the device unusable, the process ends after that row, and the other variants go on. With `--dry` it runs on a
CPU, in Triton's interpreter, at tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from layersurgery.metrics import dispatch, reference, tiled
from layersurgery.metrics.reference import METRICS
from layersurgery.metrics.tiled import LogitStats
from layersurgery.runtime.unembedding import Unembedding

from .readout import cut_cross_entropy, liger, product_alone

if TYPE_CHECKING:
    from layersurgery.metrics.triton_kernel import Tiling

# Tokens, width, vocabulary. 16,376 tokens are a batch of the sweep: 8 sequences of 2048, each without its last token.
SHAPES = (
    (8192, 2048, 50304), (8192, 4096, 50432), (16376, 2048, 50304), (16376, 4096, 50432), (8184, 768, 50257),
    (8192, 576, 49152),
)  # fmt: skip
DRY_SHAPES = ((40, 64, 1003), (33, 128, 520))
LIMIT, FUSED, MEASURE = "product alone", "fused", "whole measure"
SOFT_CAP = "whole measure, soft-cap"
VARIANTS = (
    LIMIT, FUSED, MEASURE, SOFT_CAP, "tensor descriptors", "cuBLAS slices", "tiles", "tiles, compiled",
    "cut-cross-entropy", "Liger",
)  # fmt: skip
# Tokens, vocabulary, width, warps, stages. The tiling that the package chooses is tried first, under its own name.
_TILINGS = ((128, 256, 64, 8, 4), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (256, 128, 64, 8, 3), (64, 256, 64, 4, 2))
_TMA_TILINGS = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 4, 3), (256, 128, 64, 8, 3))
_DRY_TILING = (16, 64, 32, 4, 2)
_TOLERANCE = 3e-4  # nats or bits; tensor cores truncate their float32 sums, more often at larger widths
_HALF_TOLERANCE = 0.1  # of libraries that keep logits in half precision
_JUDGED_ROWS = 96


@dataclass(frozen=True, slots=True)
class Inputs:
    """Random inputs of one shape: readout inputs of two models, (tokens, width), unembedding and targets."""

    x: torch.Tensor
    p_x: torch.Tensor
    w: torch.Tensor
    target: torch.Tensor

    @classmethod
    def random(cls, shape: tuple[int, int, int], device: str) -> Inputs:
        """Return inputs with logits of standard deviation 3."""
        tokens, width, vocabulary = shape
        generator = torch.Generator(device=device).manual_seed(0)

        def draw(rows: int, scale: float) -> torch.Tensor:
            values: torch.Tensor = scale * torch.randn(rows, width, generator=generator, device=device)
            return values.to(torch.bfloat16)

        target = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
        return cls(draw(tokens, 1), draw(tokens, 1), draw(vocabulary, 3 * width**-0.5), target)

    @property
    def rows(self) -> torch.Tensor:
        """Return the rows that are judged: some at both ends."""
        count = len(self.x)
        ends = torch.cat([torch.arange(min(_JUDGED_ROWS, count)), torch.arange(max(0, count - _JUDGED_ROWS), count)])
        unique: torch.Tensor = torch.unique(ends)
        return unique.to(self.x.device)


Work = Callable[[], Any]


def list_work(variant: str, inputs: Inputs, *, dry: bool) -> list[tuple[str, Work]]:
    """Return the tilings of a variant, as text, and what to run for each.

    Raises:
        ImportError: the variant's library is not installed.
    """
    x, w, target = inputs.x, inputs.w, inputs.target
    if variant == LIMIT:
        return [("", product_alone(x, w))]
    if variant == "cut-cross-entropy":
        return [("", cut_cross_entropy(x, w, target))]
    if variant == "Liger":
        return [("", liger(x, w, target))]
    if variant.startswith("tiles"):
        readout = _readout(w)
        return [("", lambda: tiled.logit_stats(readout, x, target, compiled=variant == "tiles, compiled"))]
    from layersurgery.metrics import triton_kernel

    if variant in (MEASURE, SOFT_CAP):
        readout = _readout(w, 30.0 if variant == SOFT_CAP else None)
        if dry:  # the fused way of a GPU, interpreted
            dispatch._kernel_for = lambda _: triton_kernel  # type: ignore[assignment]
        base = dispatch.baseline(readout, inputs.p_x, target)
        return [("", lambda: dispatch.measure(readout, x, base))]
    from . import kernel_variants

    def tilings(choices: tuple[tuple[int, ...], ...]) -> list[Tiling]:
        return [triton_kernel.Tiling(*sizes) for sizes in ((_DRY_TILING,) if dry else choices)]

    if variant == "tensor descriptors":
        return [
            (describe(tiling), partial(kernel_variants.logit_sums_tma, x, w, target, tiling))
            for tiling in tilings(_TMA_TILINGS)
        ]
    if variant == "cuBLAS slices":
        return [("", lambda: kernel_variants.logit_sums_slices(x, w, target))]
    assert variant == FUSED
    chosen = triton_kernel.tiling_for(x)
    return [
        (describe(tiling), partial(triton_kernel.logit_sums, x, w, target, tiling=tiling))
        for tiling in dict.fromkeys([chosen, *tilings(_TILINGS)])
    ]


def describe(tiling: Tiling) -> str:
    """Write a tiling as text."""
    return "x".join(map(str, (tiling.tokens, tiling.vocabulary, tiling.width, tiling.warps, tiling.stages)))


def _readout(w: torch.Tensor, cap: float | None = None) -> Unembedding:
    runner: Any = None  # not used
    return Unembedding(runner, None, SimpleNamespace(weight=w), 1.0, cap)


def judge(variant: str, result: Any, again: Any, inputs: Inputs) -> dict[str, Any]:
    """Return the greatest errors against float64, and whether a second run gave the same digits.

    The key `fault` says what is wrong, if anything is.
    """
    if result is None:
        return {}
    rows, target = inputs.rows, inputs.target[inputs.rows]
    q = _logits(inputs.x[rows], inputs.w)
    if variant in (MEASURE, SOFT_CAP):
        p = _logits(inputs.p_x[rows], inputs.w)
        if variant == SOFT_CAP:
            p, q = (30 * (logits / 30).tanh() for logits in (p, q))
        expected = reference.measure(p, q, target)
        errors = {
            f"error_{name}": float((result[row, rows] - expected[row]).abs().max())
            for row, name in enumerate(METRICS)
            if name in ("kl_nats", "entropy_bits", "loss_nats")
        }
        same = bool(torch.equal(result, again))
    else:
        log = q.log_softmax(-1)
        exact = {"loss_nats": -log.gather(-1, target[:, None])[:, 0]}
        if isinstance(result, torch.Tensor):
            found, same = {"loss_nats": result}, bool(torch.equal(result, again))
        else:
            stats, stats_again = (_stats(sums) for sums in (result, again))
            exact |= {"lse_nats": q.logsumexp(-1), "entropy_nats": -(log.exp() * log).sum(-1)}
            found = {"loss_nats": stats.loss, "lse_nats": stats.lse, "entropy_nats": stats.entropy}
            fields = ("lse", "entropy", "loss", "top")
            same = all(bool(torch.equal(getattr(stats, name), getattr(stats_again, name))) for name in fields)
            # Of tokens that rounding cannot tell from each other, any may be the most likely one.
            best = q.gather(-1, stats.top[rows, None].to(q.device))[:, 0]
            exact["top_logit"], found["top_logit"] = q.amax(-1), torch.empty(0)
        errors = {}
        for name, value in exact.items():
            computed = best if name == "top_logit" else found[name][rows]
            errors[f"error_{name}"] = float((computed.double().to(value.device) - value).abs().max())
    tolerance = _HALF_TOLERANCE if variant in ("cut-cross-entropy", "Liger") else _TOLERANCE
    wrong = [f"{name} is {value:.2g}" for name, value in errors.items() if not value <= tolerance]
    return errors | {"same_digits": same} | ({"fault": f"wrong result: {wrong[0]}"} if wrong else {})


def _logits(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.double() @ part.double().T for part in torch.split(w, 8192)], 1)


def _stats(sums: Any) -> LogitStats:
    return sums if isinstance(sums, LogitStats) else LogitStats.of(sums.m, sums.S, sums.A, sums.wanted, sums.top)


def measure(variant: str, shape: tuple[int, int, int], *, dry: bool) -> Iterator[dict[str, Any]]:
    """Check and time a variant on one shape; yield a row for each tiling. Faults are part of the rows."""
    device = "cpu" if dry else "cuda"
    tokens, width, vocabulary = shape
    fields: dict[str, Any] = {"variant": variant, "tokens": tokens, "width": width, "vocabulary": vocabulary}
    try:
        inputs = Inputs.random(shape, device)
        works = list_work(variant, inputs, dry=dry)
    except Exception as error:
        yield fields | {"fault": _first_line(error)}
        return
    for tiling, work in works:
        row = fields | {"tiling": tiling}
        try:
            started = time.perf_counter()
            result = work()
            _wait(device)
            row["seconds_first"] = time.perf_counter() - started
            again = work()
            row |= judge(variant, result, again, inputs)
            del result, again
            row["bytes_extra"] = _extra_memory(work) if device == "cuda" else None
            times = _time(work, device)
            row |= {"milliseconds": median(times), "milliseconds_low": min(times), "milliseconds_high": max(times)}
            # With a soft-cap, KL needs the logits of both models, in addition to those of the other metrics.
            products = 3 if variant == SOFT_CAP else 1
            row["teraflops"] = products * 2 * tokens * width * vocabulary / median(times) / 1e9
        except Exception as error:
            row["fault"] = _first_line(error)
        yield row


def _extra_memory(work: Work) -> int:
    """Return the bytes that a run needs beside its inputs, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _time(work: Work, device: str) -> list[float]:
    """Return milliseconds of several runs.

    Three runs in a row are timed by the device, so that a launch waits for the work before it, as in a sweep.
    """
    times = []
    if device == "cpu":
        for _ in range(2):
            started = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - started))
        return times
    for run in range(18):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(3):
            work()
        end.record()
        torch.cuda.synchronize()
        if run >= 3:  # the first runs warm up
            times.append(begin.elapsed_time(end) / 3)
    return times


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    if given.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    with torch.inference_mode():
        for shape in DRY_SHAPES if given.dry else SHAPES:
            for row in measure(given.variant, shape, dry=given.dry):
                print(json.dumps(row), flush=True)
                if row.get("fault"):
                    _wait("cpu" if given.dry else "cuda")  # raises if the fault has left the device unusable


if __name__ == "__main__":
    main()
