"""Compile the Triton kernels for a compute capability as a launch would, without a GPU.

Run `python -m tests.support.compile_kernels 90`, or with --first for the largest tiles only. For each kernel and
configuration it prints a line of JSON: the multiply instruction, registers and stack of a thread, and shared memory.
Registers that are spilled to memory lie on the stack.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ARGUMENT_TYPES = {
    **dict.fromkeys(("T", "V", "D", "tiles_per_part"), "i32"),
    **dict.fromkeys(("tanh_scale", "cap", "to_base_2"), "fp32"),
    **dict.fromkeys(("p_lse", "mean"), "*fp32"),
    "target": "*i64",
    "top_out": "*i32",
    "out": "*fp64",
}
# Products: tcgen05 and wgmma read tiles from shared memory, mma.sync reads registers. Without tensor cores it is fma.
_INSTRUCTIONS = ("tcgen05", "wgmma", "mma.sync", "fma")


def configurations(capability: int, *, first: bool) -> Iterator[tuple[Any, dict[str, Any], dict[str, int]]]:
    """Yield each kernel with its compile-time constants and launch options."""
    from layersurgery.metrics import triton_kernel

    version = divmod(capability, 10)
    for kernel, tilings in (
        (triton_kernel._summing, triton_kernel.HALF),
        (triton_kernel._diverging, triton_kernel.PAIR),
    ):
        choices = tilings[max(known for known in tilings if known <= version)]
        is_pair = tilings is triton_kernel.PAIR
        for tiling in choices[: 1 if first else None]:
            sizes = {"BT": tiling.tokens, "BV": tiling.vocabulary, "BD": tiling.width}
            options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
            # Without a soft-cap two models need not be read side by side. The last one: a width of no whole tiles.
            for bias, cap, even in ((False, is_pair, True), (True, True, True), (False, is_pair, False)):
                flags = {"HAS_BIAS": bias, "HAS_CAP": cap, "EVEN": even, "WIDEN": False}
                yield kernel, flags | sizes, options
                if first:
                    break
    yield triton_kernel._crossing, {"BT": 4, "BD": 512}, {"num_warps": 4}


def compile_kernel(kernel: Any, constants: dict[str, Any], options: dict[str, int], capability: int) -> dict[str, Any]:
    """Compile a kernel for bfloat16, and return what it needs.

    As for a launch with tensors of torch, pointers and strides are multiples of 16. So is the width, if it is whole
    tiles. The arguments that the kernel is not specialized for are of unknown divisibility.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    names = kernel.arg_names
    types = {name: _argument_type(name) for name in names} | dict.fromkeys(constants, "constexpr")
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name.endswith("_stride")]
    aligned += ["D"] if constants.get("EVEN", True) else []
    source = ASTSource(
        kernel,
        types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton_compile(
        source, target=GPUTarget("cuda", capability, 32), options={**options, "enable_fp_fusion": True}
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return {
        "kernel": kernel.__name__,
        **constants,
        "instruction": next(name for name in _INSTRUCTIONS if name in compiled.asm["ptx"]),
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
    }


def _argument_type(name: str) -> str:
    if name in _ARGUMENT_TYPES:
        return _ARGUMENT_TYPES[name]
    if name.endswith("_stride"):
        return "i32"
    return "*fp32" if name.endswith("_out") else "*bf16"


def main() -> None:
    import triton

    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int)
    parser.add_argument("--first", action="store_true")
    given = parser.parse_args()
    for kernel, constants, options in configurations(given.capability, first=given.first):
        print(
            json.dumps({"triton": triton.__version__, **compile_kernel(kernel, constants, options, given.capability)})
        )


if __name__ == "__main__":
    main()
