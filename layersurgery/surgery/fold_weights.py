"""Change the weights of single modules: fold a norm's scale and shift into them, and subtract means.

A log keeps the weights from before, so that a change that alters the function of the model can be undone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..models.weight_conventions import input_dim


class WeightUndo:
    """A log of changes of parameters that can undo them."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def keep(self, module: nn.Module, name: str) -> nn.Parameter:
        """Return a parameter that will be overwritten, after saving a copy of it."""
        parameter = module._parameters[name]
        assert parameter is not None
        copy = parameter.detach().clone()
        self._steps.append(lambda: parameter.copy_(copy))
        return parameter

    def set_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Set a new parameter of a module."""
        before = module._parameters.get(name)
        self._steps.append(lambda: module._parameters.__setitem__(name, before))
        module._parameters[name] = parameter

    def add_step(self, step: Callable[[], object]) -> None:
        """Add another step of the undo."""
        self._steps.append(step)

    def run(self) -> None:
        """Undo all changes, the last one first."""
        for step in reversed(self._steps):
            step()


def fold_into(
    module: nn.Module, scale: torch.Tensor, shift: torch.Tensor, width: int, undo: WeightUndo, *, center: bool
) -> None:
    """Fold a norm's scale and shift into the weights of a module that reads it.

    If the norm subtracts the mean, the mean of the weights over the inputs has no effect, and is subtracted too
    (`center`).

    Args:
        module: a module that reads the norm.
        scale: the norm's scale, float64, (width,).
        shift: the norm's shift, float64, (width,).
        width: width of the residual stream.
        undo: log of the changes.
        center: subtract the mean.

    Raises:
        UnsupportedEditError: the module cannot absorb them; `undo` holds what was changed before.
    """
    shifted = bool(shift.abs().max() > 0)
    for name in _find_input_weights(module, width):
        weight = undo.keep(module, name)
        dim = input_dim(module, name, width)
        weight64 = weight.detach().double().movedim(dim, -1)
        bias_change = weight64 @ shift.to(weight.device)
        weight64 = weight64 * scale.to(weight.device)
        weight64 = weight64 - weight64.mean(-1, keepdim=True) if center else weight64
        weight.copy_(weight64.movedim(-1, dim))
        if shifted:
            if name != "weight" or weight.dim() != 2 or not hasattr(module, "bias"):
                raise UnsupportedEditError(
                    f"{type(module).__name__}, which reads it, has no bias that can absorb its shift"
                )
            if isinstance(module.bias, torch.Tensor):
                bias = undo.keep(module, "bias")
                bias.copy_(bias.double() + bias_change)
            else:
                undo.set_parameter(
                    module, "bias", nn.Parameter(bias_change.to(weight.dtype), requires_grad=weight.requires_grad)
                )


def _find_input_weights(module: nn.Module, width: int) -> list[str]:
    """Return the weights of a module that read the stream: its only matrix, or all of an expert but its output."""
    names = [
        name
        for name, value in module._parameters.items()
        if value is not None and value.dim() > 1 and not name.endswith("bias")
    ]
    if len(names) == 1:
        return names
    outputs = ("down_proj", "w2", "output_linear", "wo", "fc2")
    input_names = [name for name in names if name not in outputs and width in module._parameters[name].shape[-2:]]  # type: ignore[union-attr]
    if not input_names:
        raise UnsupportedEditError(f"{type(module).__name__}, which reads it, has no weight that is known to read it")
    return input_names


def reset_norm(norm: nn.Module, scale: torch.Tensor, undo: WeightUndo) -> None:
    """Set the scale of a norm to 1 and its shift to 0, also where the scale is 1 + weight (Gemma).

    Args:
        norm: the norm.
        scale: its scale, float64, (width,).
        undo: log of the changes.

    Raises:
        UnsupportedEditError: how the scale is computed from the weight is unknown.
    """
    weight = norm._parameters.get("weight")
    if weight is not None:
        offset = scale - weight.detach().double().cpu()
        nearest = offset.mean().round()
        if bool((offset - nearest).abs().max() > 0.02 * scale.abs().max()):
            raise UnsupportedEditError(f"how {type(norm).__name__} computes its scale from its weight is unknown")
        undo.keep(norm, "weight").fill_(1 - float(nearest))
    if norm._parameters.get("bias") is not None:
        undo.keep(norm, "bias").zero_()


def subtract_mean(module: nn.Module, name: str, dim: int) -> None:
    """Subtract the mean of a parameter over one dimension."""
    weight = module._parameters[name]
    assert weight is not None
    weight64 = weight.detach().double()
    weight.copy_(weight64 - weight64.mean(dim, keepdim=True))
