"""Which parameters write a branch of a block into the residual stream.

Zeroing the last projection of a branch, weight and bias, makes its contribution exactly nothing in any program that runs the
architecture. Which modules make up the branch is observed (`parts`); within them the projections are found by structure, with
names as hints.
"""

from __future__ import annotations

import re

from torch import nn

from ..errors import UnsupportedEditError

_ROUTER = re.compile(r"gate$|router", re.IGNORECASE)
_OUT = re.compile(
    r"(^|\.)(o_proj|out_proj|c_proj|dense|wo|o|output|proj_out|linear_out|down_proj|dense_4h_to_h|fc2|fc_out|w2|wdown|output_linear)$"
)
_EXPERT_OUT = re.compile(r"^(down_proj|w2|output_linear|wo|fc2)(_bias|\.weight|\.bias)?$")


def output_parameters(block: nn.Module, path: str, width: int) -> tuple[str, ...]:
    """Names, within the block, of the weights and biases with which the module at `path` writes the residual stream.

    Args:
        block: one decoder block; its parameters may be on the meta device.
        path: a module of one of its branches.
        width: the model's width, which these projections write.

    Raises:
        UnsupportedEditError: they cannot be told.
    """
    module = block.get_submodule(path)
    names = _own(module, path) if isinstance(module, nn.Linear) else _outputs(module, path)
    for name in names:
        shape = tuple(block.get_parameter(name).shape)
        if width not in shape:
            raise UnsupportedEditError(
                f"{type(block).__name__}: {name}, of shape {shape}, was taken for an output of {path} and does not write the model's "
                f"width {width}"
            )
    return tuple(names)


def _outputs(branch: nn.Module, path: str) -> list[str]:
    """The output parameters of one branch: its last linear map, and in a mixture every expert's and the shared experts'."""
    mixtures = [name for name, module in branch.named_modules() if _holds_experts(name, module)]
    if not mixtures:
        linear = [name for name, module in branch.named_modules() if _linear(module)]
        if not linear:
            raise UnsupportedEditError(f"{path} ({type(branch).__name__}) has no linear map that could be its output")
        last = next((name for name in reversed(linear) if _OUT.search(name)), linear[-1])
        beside = f"{last}_bias"  # a bias that the branch keeps beside its projection
        return _own(branch.get_submodule(last), _join(path, last)) + [_join(path, beside)] * (
            beside in branch._parameters
        )
    names = []
    for name, parameter in branch.named_parameters():
        owner = name.rpartition(".")[0]
        in_experts = any(_inside(owner, mixture) for mixture in mixtures)
        around = not in_experts and any(_inside(mixture, owner) for mixture in mixtures)
        if (in_experts and _EXPERT_OUT.match(_tail(name))) or (
            around and parameter.dim() == 1 and name.rpartition(".")[2] == "bias"
        ):
            names.append(_join(path, name))
    for name, module in branch.named_children():
        if not any(_inside(name, mixture) or _inside(mixture, name) for mixture in mixtures) and not _ROUTER.search(
            name
        ):
            if any(map(_linear, module.modules())):
                names += _outputs(module, _join(path, name))
    if not any(block_name.startswith(_join(path, mixture)) for mixture in mixtures for block_name in names):
        raise UnsupportedEditError(f"{path} ({type(branch).__name__}) has experts whose output projection is not known")
    return names


def _holds_experts(path: str, module: nn.Module) -> bool:
    """Whether a module holds the output projections of several experts, stacked in one parameter or as a list of modules."""
    stacked = any(
        _EXPERT_OUT.match(_tail(_join(path, name)))
        and (parameter.dim() == 3 or (parameter.dim() == 2 and name != "weight"))
        for name, parameter in module._parameters.items()
        if parameter is not None
    )
    return stacked or (isinstance(module, nn.ModuleList) and len(module) > 1)


def _linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _own(module: nn.Module, path: str) -> list[str]:
    return [_join(path, name) for name, parameter in module._parameters.items() if parameter is not None]


def _tail(name: str) -> str:
    """The last part of a parameter's name that says which projection it is: "w2.weight", "down_proj"."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1] in ("weight", "bias") else parts[-1]


def _inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.") or outer == ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
