"""Compiles the fused kernels to PTX for a compute capability, without a GPU: `python -m tests.support.compile_fused 90 HALF`."""

from __future__ import annotations

import sys
from typing import Any

_NUMBERS = {
    "T": "i32",
    "V": "i32",
    "D": "i32",
    "tiles_a_part": "i32",
    "scale": "fp32",
    "cap": "fp32",
    "target": "*i64",
    "top_out": "*i32",
}


def instructions(kernel: Any, tiling: Any, capability: int, dtype: str) -> str:
    """PTX of a kernel, with bias and soft-cap, at a width that no tile divides."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as to_ptx

    names = kernel.arg_names
    constants = {
        "HAS_BIAS": True,
        "HAS_CAP": True,
        "EVEN": False,
        "WIDEN": False,
        "BT": tiling.tokens,
        "BV": tiling.vocabulary,
        "BD": tiling.width,
    }
    kinds = {name: _kind(name, dtype) for name in names} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, kinds, constexprs={(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    return str(to_ptx(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"])


def _kind(name: str, dtype: str) -> str:
    if name in _NUMBERS:
        return _NUMBERS[name]
    if name.endswith("_stride"):
        return "i32"
    return "*fp32" if name.endswith("_out") or name == "p_lse" else f"*{dtype}"


def main(capability: int, choices: str) -> None:
    from layersurgery.metrics import triton_kernel

    dtype = {"HALF": "bf16", "FULL": "fp32"}[choices]
    for tiling in getattr(triton_kernel, choices):
        for kernel in (triton_kernel._summing, triton_kernel._diverging):
            text = instructions(kernel, tiling, capability, dtype)
            print(next(kind for kind in ("wgmma", "mma.sync", "fma") if kind in text), tiling)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
