"""Compile the fused kernels to PTX for a compute capability, without a GPU.

Run `python -m tests.support.compile_fused 90 HALF`. It prints the multiply instruction that each configuration uses.
"""

from __future__ import annotations

import sys
from typing import Any

_ARGUMENT_TYPES = {
    "T": "i32",
    "V": "i32",
    "D": "i32",
    "tiles_a_part": "i32",
    "scale": "fp32",
    "cap": "fp32",
    "target": "*i64",
    "top_out": "*i32",
}


def compile_to_ptx(kernel: Any, tiling: Any, capability: int, dtype: str) -> str:
    """Return the PTX of a kernel with bias and soft-cap, for a width that is not a multiple of the tile."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

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
    types = {name: _argument_type(name, dtype) for name in names} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, types, constexprs={(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    return str(triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"])


def _argument_type(name: str, dtype: str) -> str:
    if name in _ARGUMENT_TYPES:
        return _ARGUMENT_TYPES[name]
    if name.endswith("_stride"):
        return "i32"
    return "*fp32" if name.endswith("_out") or name == "p_lse" else f"*{dtype}"


def main(capability: int, choices: str) -> None:
    from layersurgery.metrics import triton_kernel

    dtype = {"HALF": "bf16", "FULL": "fp32"}[choices]
    for tiling in getattr(triton_kernel, choices):
        for kernel in (triton_kernel._summing, triton_kernel._diverging):
            ptx = compile_to_ptx(kernel, tiling, capability, dtype)
            print(next(kind for kind in ("wgmma", "mma.sync", "fma") if kind in ptx), tiling)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
