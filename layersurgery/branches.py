"""Which parameters write a block's attention and MLP into the residual stream.

Zeroing the last projection of a branch, weight and bias, makes its contribution exactly nothing in any program that runs the
architecture. The projections are found on the model built without memory, by structure: the modules a block is made of, and
in each the last linear map onto the residual stream. Names are hints; what they do not explain is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from .edits import Part
from .errors import InexpressibleError

_MIXER = re.compile(r"attn|attention|mixer|mamba|ssm|conv|recurrent|temporal|time_mix|rwkv|linear_att|delta", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|ff\b|feed_?forward|moe|expert|channel_mix", re.IGNORECASE)
_DIRECT = re.compile(r"^(fc|dense|linear|lin)_?\d", re.IGNORECASE)
_ROUTER = re.compile(r"gate$|router", re.IGNORECASE)
_OUT = re.compile(
    r"(^|\.)(o_proj|out_proj|c_proj|dense|wo|o|output|proj_out|linear_out|down_proj|dense_4h_to_h|fc2|fc_out|w2|wdown|output_linear)$"
)
_EXPERT_OUT = re.compile(r"^(down_proj|w2|output_linear|wo|fc2)(_bias|\.weight|\.bias)?$")


def output_parameters(block: nn.Module, part: Part, width: int) -> list[str]:
    """Names, within the block, of the weights and biases that write `part` into the residual stream.

    Args:
        block: one decoder block; its parameters may be on the meta device.
        part: "attention" (whatever mixes tokens) or "mlp".
        width: the model's width, which these projections write.

    Returns:
        The names; none where the block has no such branch.

    Raises:
        InexpressibleError: the block has modules whose part is not clear.
    """
    branches = [path for path, kind in _children(block) if kind == part]
    direct = [path for path in branches if isinstance(block.get_submodule(path), nn.Linear)]
    nested = [path for path in branches if path not in direct]
    names = [name for path in nested for name in _outputs(block.get_submodule(path), path)]
    if direct:
        names += _own(block.get_submodule(direct[-1]), direct[-1])
    for name in names:
        if width not in block.get_parameter(name).shape:
            raise InexpressibleError(
                f"{type(block).__name__}: {name}, of shape {tuple(block.get_parameter(name).shape)}, was taken for the output of the "
                f"{part} and does not write the model's width {width}; skipping is not supported for this architecture"
            )
    return names


def _children(block: nn.Module) -> Iterator[tuple[str, Part]]:
    for name, child in block.named_children():
        kind = type(child).__name__
        if all(parameter.dim() < 2 for parameter in child.parameters()):
            continue
        if _DIRECT.match(name) or (_MLP.search(name) and not _MIXER.search(name)):
            yield name, "mlp"
        elif _MIXER.search(name):
            yield name, "attention"
        elif _MLP.search(kind):
            yield name, "mlp"
        elif _MIXER.search(kind):
            yield name, "attention"
        else:
            raise InexpressibleError(
                f"{type(block).__name__}.{name} ({kind}) is neither known as attention nor as MLP; skipping one of them is not "
                "supported for this architecture"
            )


def _outputs(branch: nn.Module, path: str) -> list[str]:
    """The output parameters of one branch: its last linear map, and in a mixture every expert's and the shared experts'."""
    mixtures = [name for name, module in branch.named_modules() if _holds_experts(module)]
    if not mixtures:
        linear = [name for name, module in branch.named_modules() if _linear(module)]
        if not linear:
            raise InexpressibleError(f"{path} ({type(branch).__name__}) has no linear map that could be its output")
        last = next((name for name in reversed(linear) if _OUT.search(name)), linear[-1])
        return _own(branch.get_submodule(last), _join(path, last))
    names = []
    for name, parameter in branch.named_parameters():
        owner = name.rpartition(".")[0]
        in_experts = any(_inside(owner, mixture) for mixture in mixtures)
        if (in_experts and _EXPERT_OUT.match(_tail(name))) or (
            not in_experts and parameter.dim() == 1 and "." not in name and name == "bias"
        ):
            names.append(_join(path, name))
    for name, module in branch.named_children():
        if not any(_inside(name, mixture) or _inside(mixture, name) for mixture in mixtures) and not _ROUTER.search(name):
            if any(parameter.dim() > 1 for parameter in module.parameters()):
                names += _outputs(module, _join(path, name))
    if not any(block_name.startswith(_join(path, mixture)) for mixture in mixtures for block_name in names):
        raise InexpressibleError(f"{path} ({type(branch).__name__}) has experts whose output projection is not known")
    return names


def _holds_experts(module: nn.Module) -> bool:
    stacked = any(
        parameter.dim() == 3 and parameter.shape[0] > 1 for parameter in module._parameters.values() if parameter is not None
    )
    listed = isinstance(module, nn.ModuleList) and len(module) > 1
    return (stacked and not isinstance(module, nn.modules.conv._ConvNd)) or listed


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
