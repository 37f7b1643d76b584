"""A module that stands where a branch's module stood, computes nothing, and adds exactly nothing to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from .block_view import position_name
from .call_tracing import Where


@dataclass(frozen=True, slots=True)
class SkipSpec:
    """What must stand in for one module of a branch.

    Attributes:
        path: the module, within the block.
        hidden: which of its arguments holds the hidden states.
        width: width of the tensor it returns; the other dimensions are those of the hidden states.
        length: length of the tuple it returns with that tensor first; None where it returns the tensor itself.
        residual: the argument that it adds to its output, where it adds the residual stream itself.
        hands_on: whether it only prepares input for a later module of the branch, and may return what it was given.
        keeps_row: whether it answers for the block's row of the key-value cache.
        outputs: parameters, within the block, that are saved as zeros, so that the branch is silent in any program.
        savable: whether those are known, where they are needed.
    """

    path: str
    hidden: Where
    width: int
    length: int | None = None
    residual: Where | None = None
    passthrough: bool = False
    updates_cache: bool = False
    outputs: tuple[str, ...] = ()
    savable: bool = True


class SkippedBranch(nn.Module):
    """In the place of `original`, under whose names its parameters stay; saved, the branch's output projection is zero."""

    _original: nn.Module
    _spec: SkipSpec
    _keeper: tuple[nn.Module | None, str]

    def __init__(self, original: nn.Module, spec: SkipSpec) -> None:
        super().__init__()
        # Public attributes (layer_idx, config) are read by other modules and renumbered like any module's.
        vars(self).update(
            {name: value for name, value in vars(original).items() if name[0] != "_" and name != "forward"}
        )
        self._modules, self._parameters, self._buffers = original._modules, original._parameters, original._buffers
        self._non_persistent_buffers_set = original._non_persistent_buffers_set
        self._state_dict_hooks = original._state_dict_hooks
        keeper = next((module for module in self.modules() if position_name(module)), None)
        # Past nn.Module's own bookkeeping: neither is a part of this module.
        vars(self).update(
            _original=original, _spec=spec, _keeper=(keeper, "" if keeper is None else position_name(keeper))
        )

    @property
    def stands_for(self) -> type[nn.Module]:
        """The class of the module whose place this is."""
        return type(self._original)

    @property
    def saves_as_zeros(self) -> bool:
        """Whether what is saved of it is silent, too."""
        return self._spec.savable

    def extra_repr(self) -> str:  # noqa: D102 - torch's own
        return f"in the place of {self.stands_for.__name__}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - torch's own
        skip = self._spec
        hidden = _argument(args, kwargs, skip.hidden)
        if skip.updates_cache:
            keeper, name = self._keeper
            _update_cache(args, kwargs, hidden, None if keeper is None else getattr(keeper, name))
        if skip.passthrough:
            return hidden
        if skip.residual is not None:
            nothing = _argument(args, kwargs, skip.residual)
        else:
            nothing = hidden.new_zeros((*hidden.shape[:-1], skip.width))
        return nothing if skip.length is None else (nothing, *[None] * (skip.length - 1))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - torch's own
        state = super().state_dict(*args, **kwargs)
        if not kwargs.get("keep_vars", False):
            for name, parameter in self._named().items():
                # An offloaded tensor is only a name here; its zeros have to be real, or the weight would be fetched.
                device = torch.device("cpu") if parameter.is_meta else parameter.device
                state[f"{kwargs.get('prefix', '')}{name}"] = torch.zeros_like(
                    parameter, device=device, requires_grad=False
                )
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # What was saved as zeros is not loaded as zeros: another visit of the block may use these very weights.
        own = self._named()
        state_dict.update({f"{prefix}{name}": own[name].detach() for name in own if f"{prefix}{name}" in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _named(self) -> dict[str, torch.Tensor]:
        """The parameters that are saved as zeros, by their names in this module.

        Raises:
            UnsupportedEditError: one has another name now, so that it would be saved as it is.
        """
        held = dict(self.named_parameters(remove_duplicate=False))
        found: dict[str, torch.Tensor] = {}
        for output in self._spec.outputs:
            name = output.removeprefix(f"{self._spec.path}.")
            owner, _, tail = name.rpartition(".")
            name = name if name in held else f"{owner}.base_layer.{tail}"  # where PEFT keeps it
            if name not in held:
                raise UnsupportedEditError(
                    f"{output} of a skipped {self.stands_for.__name__} is gone (renamed by a parametrisation?), and would not be saved as zeros; "
                    "undo that before saving"
                )
            found[name] = held[name]
        return found


def install_skips(block: nn.Module, skips: Sequence[SkipSpec]) -> None:
    """Put stand-ins into `block`, which must be a view: its own tree of modules is changed."""
    for skip in skips:
        parent, _, name = skip.path.rpartition(".")
        owner = block.get_submodule(parent)
        original = owner._modules[name]
        assert original is not None
        owner._modules[name] = SkippedBranch(original, skip)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], where: Where) -> torch.Tensor:
    value = args[where] if isinstance(where, int) else kwargs[where]
    assert isinstance(value, torch.Tensor)
    return value


def _update_cache(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor, row: int | None) -> None:
    """Note in the cache how many tokens passed.

    Lengths, masks and positions are read off the first row or the last; an empty one would be silently taken for a new text. The
    row that is kept is one number wide.
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
            given = {"state_idx": state} if state else {}
            cache.update_conv_state(hidden.new_zeros((batch, 1, length)), row, **given)
    if layer is None or hasattr(layer, "get_seq_length"):
        nothing = hidden.new_zeros((batch, 1, length, 1))
        cache.update(nothing, nothing, row)
