"""Find the parameters that write a branch of a block into the residual stream.

If the last projection of a branch is zero, weight and bias, the branch adds exactly zero in any program that runs the
architecture. `block_parts` finds the modules of the branch by running the block. The projections within them are found
by structure, with names as hints.
"""

from __future__ import annotations

import re

from torch import nn

from ..errors import UnsupportedEditError
from .quantized import is_quantized, quantized_shape

_ROUTER = re.compile(r"gate$|router", re.IGNORECASE)
_OUT = re.compile(
    r"(^|\.)(o_proj|out_proj|c_proj|dense|wo|o|output|proj_out|linear_out|down_proj|dense_4h_to_h|fc2|fc_out|w2|wdown|output_linear)$"
)
_EXPERT_OUT = re.compile(r"^(down_proj|w2|output_linear|wo|fc2)(_bias|\.weight|\.bias)?$")


def output_parameters(block: nn.Module, path: str, width: int) -> tuple[str, ...]:
    """Return the names of the weights and biases with which a module writes the residual stream, relative to the block.

    Args:
        block: one decoder block; its parameters may be on the meta device.
        path: path of a module of one of its branches.
        width: the model's width, which these projections write.

    Raises:
        UnsupportedEditError: the parameters cannot be found.
    """
    module = block.get_submodule(path)
    names = _parameter_names(module, path) if isinstance(module, nn.Linear) else _find_outputs(module, path)
    for name in names:
        owner = block.get_submodule(name.rpartition(".")[0])
        shape = tuple(block.get_parameter(name).shape)
        if is_quantized(owner) and name.endswith("weight"):
            shape = quantized_shape(owner)
        if width not in shape:
            raise UnsupportedEditError(
                f"{type(block).__name__}: {name}, of shape {shape}, looks like an output of {path}, but does not write "
                f"the model's width {width}"
            )
    return tuple(names)


def _find_outputs(branch: nn.Module, path: str) -> list[str]:
    """Return the output parameters of one branch.

    These are the last linear map of a plain branch; in a mixture, the output of every expert and of the shared
    experts.
    """
    mixtures = [name for name, module in branch.named_modules() if _holds_experts(name, module)]
    if not mixtures:
        linear_maps = [name for name, module in branch.named_modules() if _is_linear(module)]
        if not linear_maps:
            raise UnsupportedEditError(f"{path} ({type(branch).__name__}) has no linear map that could be its output")
        last = next((name for name in reversed(linear_maps) if _OUT.search(name)), linear_maps[-1])
        bias_name = f"{last}_bias"  # a bias that the branch holds outside its projection
        return _parameter_names(branch.get_submodule(last), _join(path, last)) + [_join(path, bias_name)] * (
            bias_name in branch._parameters
        )
    names = []
    for name, parameter in branch.named_parameters():
        owner = name.rpartition(".")[0]
        in_experts = any(_is_inside(owner, mixture) for mixture in mixtures)
        encloses_experts = not in_experts and any(_is_inside(mixture, owner) for mixture in mixtures)
        if (in_experts and _EXPERT_OUT.match(_projection_name(name))) or (
            encloses_experts and parameter.dim() == 1 and name.rpartition(".")[2] == "bias"
        ):
            names.append(_join(path, name))
    for name, module in branch.named_children():
        if not any(
            _is_inside(name, mixture) or _is_inside(mixture, name) for mixture in mixtures
        ) and not _ROUTER.search(name):
            if any(map(_is_linear, module.modules())):
                names += _find_outputs(module, _join(path, name))
    if not any(block_name.startswith(_join(path, mixture)) for mixture in mixtures for block_name in names):
        raise UnsupportedEditError(
            f"{path} ({type(branch).__name__}) has experts, but their output projection cannot be found"
        )
    return names


def _holds_experts(path: str, module: nn.Module) -> bool:
    """Check whether a module holds the outputs of several experts, in a stacked parameter or a list of modules."""
    stacked = any(
        _EXPERT_OUT.match(_projection_name(_join(path, name)))
        and (parameter.dim() == 3 or (parameter.dim() == 2 and name != "weight"))
        for name, parameter in module._parameters.items()
        if parameter is not None
    )
    return stacked or (isinstance(module, nn.ModuleList) and len(module) > 1)


def _is_linear(module: nn.Module) -> bool:
    """Check whether a module has a matrix as its weight and is not an embedding."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _parameter_names(module: nn.Module, path: str) -> list[str]:
    """List the paths of a module's own parameters."""
    return [_join(path, name) for name, parameter in module._parameters.items() if parameter is not None]


def _projection_name(name: str) -> str:
    """Return the end of a parameter's name, which identifies the projection: "w2.weight", "down_proj"."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1] in ("weight", "bias") else parts[-1]


def _is_inside(path: str, outer: str) -> bool:
    """Check whether a path is the outer path or lies within it."""
    return path == outer or path.startswith(f"{outer}.") or outer == ""


def _join(path: str, name: str) -> str:
    """Join two paths, either of which may be empty."""
    return f"{path}.{name}" if path and name else path or name
