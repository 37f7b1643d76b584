"""Replace a module of a branch by one that computes nothing and adds zero, or a constant, to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from .block_view import position_name
from .call_tracing import ArgumentKey


@dataclass(frozen=True, slots=True)
class SkipSpec:
    """How to replace one module of a branch.

    Attributes:
        path: path of the module, relative to the block.
        hidden: the argument that holds the hidden states.
        width: width of the returned tensor; its other dimensions are those of the hidden states.
        length: length of the returned tuple, which has that tensor first; None if the module returns the tensor
            itself.
        residual: the argument that the module adds to its output, if it adds the residual stream itself.
        passthrough: whether it only prepares input for a later module of the branch, and may return its own input.
        updates_cache: whether it must update the block's row of the key-value cache.
        outputs: parameters, relative to the block, with which the branch writes the stream. They are saved as zeros, so
            that any program skips the branch.
        savable: whether those parameters are known, if they are needed, and can be zero (they are not quantized).
        mean: what the module returns for every token (or adds to `residual`) instead of zeros, float32.
        bias: the one of `outputs` that is saved as the mean; empty if the model has none.
    """

    path: str
    hidden: ArgumentKey
    width: int
    length: int | None = None
    residual: ArgumentKey | None = None
    passthrough: bool = False
    updates_cache: bool = False
    outputs: tuple[str, ...] = ()
    savable: bool = True
    mean: torch.Tensor | None = field(default=None, compare=False)
    bias: str = ""


class SkippedBranch(nn.Module):
    """Replacement of a module, with the module's parameters under their original names.

    In a state dict, the branch's output projection is zero.
    """

    _original: nn.Module
    _spec: SkipSpec
    _position_owner: tuple[nn.Module | None, str]
    _constant: torch.Tensor | None

    def __init__(self, original: nn.Module, spec: SkipSpec) -> None:
        super().__init__()
        # Other modules read the public attributes (layer_idx, config), and edits renumber them, as in any module.
        vars(self).update(
            {name: value for name, value in vars(original).items() if name[0] != "_" and name != "forward"}
        )
        self._modules, self._parameters, self._buffers = original._modules, original._parameters, original._buffers
        self._non_persistent_buffers_set = original._non_persistent_buffers_set
        self._state_dict_hooks = original._state_dict_hooks
        owner = next((module for module in self.modules() if position_name(module)), None)
        # Bypass nn.Module.__setattr__: these modules must not become children of this one.
        vars(self).update(
            _original=original,
            _spec=spec,
            _position_owner=(owner, "" if owner is None else position_name(owner)),
            _constant=None,
        )

    @property
    def original_class(self) -> type[nn.Module]:
        """Return the class of the module that this one replaces."""
        return type(self._original)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names, relative to the block, of the parameters with which the module writes the stream."""
        return self._spec.outputs

    @property
    def saves_as_zeros(self) -> bool:
        """Return whether the saved model skips this branch, too."""
        return self._spec.savable

    @property
    def adds_mean(self) -> bool:
        """Return whether the module adds a mean."""
        return self._spec.mean is not None

    def extra_repr(self) -> str:  # noqa: D102 - documented in torch
        return f"in the place of {self.original_class.__name__}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - documented in torch
        skip = self._spec
        hidden = _argument(args, kwargs, skip.hidden)
        if skip.updates_cache:
            owner, name = self._position_owner
            _update_cache(args, kwargs, hidden, None if owner is None else getattr(owner, name))
        if skip.passthrough:
            return hidden
        if skip.residual is not None:
            output = _argument(args, kwargs, skip.residual)
        else:
            output = hidden.new_zeros((*hidden.shape[:-1], skip.width))
        if skip.mean is not None:
            output = output + self._mean_like(output)
        return output if skip.length is None else (output, *[None] * (skip.length - 1))

    def _mean_like(self, output: torch.Tensor) -> torch.Tensor:
        """Return the mean on the device and in the data type of the stream; both are looked up once."""
        constant = self._constant
        if constant is None or (constant.device, constant.dtype) != (output.device, output.dtype):
            assert self._spec.mean is not None
            constant = self._spec.mean.to(output.device, output.dtype)
            vars(self)["_constant"] = constant
        return constant

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - documented in torch
        if self._spec.mean is not None and not self._spec.bias and not kwargs.get("keep_vars", False):
            raise UnsupportedEditError(
                f"a {self.original_class.__name__} is replaced by its mean, which no weight of the model can hold, so "
                "the model cannot be saved; skip the branch (without mean), or use the model in memory only"
            )
        state = super().state_dict(*args, **kwargs)
        if not kwargs.get("keep_vars", False):
            for name, parameter in self._zeroed_parameters().items():
                # An offloaded tensor is a placeholder here; if its zeros were one, too, the weight would be fetched
                # instead.
                device = torch.device("cpu") if parameter.is_meta else parameter.device
                saved = torch.zeros_like(parameter, device=device, requires_grad=False)
                if self._spec.bias and name == self._spec.bias.removeprefix(f"{self._spec.path}."):
                    assert self._spec.mean is not None
                    saved.copy_(self._spec.mean)
                state[f"{kwargs.get('prefix', '')}{name}"] = saved
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Do not load the saved zeros: another visit of the block may use the same weights.
        parameters = self._zeroed_parameters()
        state_dict.update(
            {f"{prefix}{name}": parameters[name].detach() for name in parameters if f"{prefix}{name}" in state_dict}
        )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _zeroed_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters that are saved as zeros, by their names in this module.

        Raises:
            UnsupportedEditError: a parameter has been renamed, so its zeros would not be saved.
        """
        if not self._spec.savable:
            return {}
        parameters = dict(self.named_parameters(remove_duplicate=False))
        zeroed: dict[str, torch.Tensor] = {}
        for output in self._spec.outputs:
            name = output.removeprefix(f"{self._spec.path}.")
            owner, _, parameter_name = name.rpartition(".")
            name = name if name in parameters else f"{owner}.base_layer.{parameter_name}"  # PEFT moves it there
            if name not in parameters:
                raise UnsupportedEditError(
                    f"{output} of a skipped {self.original_class.__name__} does not exist any more (renamed by a "
                    "parametrization?) and would not be saved as zeros; undo that before saving"
                )
            zeroed[name] = parameters[name]
        return zeroed


def install_skips(block: nn.Module, skips: Sequence[SkipSpec]) -> None:
    """Replace modules of `block` in place. `block` must be a view, so that the original is not changed."""
    for skip in skips:
        parent, _, name = skip.path.rpartition(".")
        owner = block.get_submodule(parent)
        original = owner._modules[name]
        assert original is not None
        owner._modules[name] = SkippedBranch(original, skip)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], where: ArgumentKey) -> torch.Tensor:
    """Return one argument of a call, which must be a tensor."""
    value = args[where] if isinstance(where, int) else kwargs[where]
    assert isinstance(value, torch.Tensor)
    return value


def _update_cache(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor, row: int | None) -> None:
    """Tell the cache how many tokens passed.

    Models read lengths, masks and positions from the first or the last row. They would treat an empty row as the start
    of a new text, without an error. The row that is written is one number wide.
    """
    caches = [value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")]
    if not caches or row is None:
        return
    cache = getattr(caches[0], "self_attention_cache", caches[0])
    layers = cache.layers
    layer = layers[row] if row < len(layers) else None
    batch, length = hidden.shape[0], hidden.shape[-2]
    if layer is not None and hasattr(layer, "update_conv_state"):
        for state in range(getattr(layer, "number_of_states", 1)):
            keywords = {"state_idx": state} if state else {}
            cache.update_conv_state(hidden.new_zeros((batch, 1, length)), row, **keywords)
    if layer is None or hasattr(layer, "get_seq_length"):
        zeros = hidden.new_zeros((batch, 1, length, 1))
        cache.update(zeros, zeros, row)
