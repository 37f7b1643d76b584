"""Record the calls of modules without forward hooks.

Wrappers replace the modules, run them, and keep the arguments and the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..library_logs import quiet_casts

TOKENS = 7
ArgumentKey = int | str
"""The index of a positional argument, or the name of a keyword argument."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module; tensors are copies, since the module may overwrite them.

    Attributes:
        name: name under which the module is recorded.
        args: positional arguments.
        kwargs: keyword arguments.
        output: the module's return value.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    def tensors(self) -> Iterator[tuple[ArgumentKey, torch.Tensor]]:
        """List the floating-point arguments that have one row for each token, of shape (..., TOKENS, width)."""
        arguments: list[ArgumentKey] = [*range(len(self.args)), *self.kwargs]
        for where in arguments:
            if is_per_token(self[where]):
                yield where, self[where]

    def hidden_states_argument(self) -> ArgumentKey | None:
        """Return the argument with the hidden states: the one of that name, or the first with a row per token."""
        if is_per_token(self.kwargs.get("hidden_states")):
            return "hidden_states"
        return next((where for where, _ in self.tensors()), None)

    def __getitem__(self, where: ArgumentKey) -> Any:
        return self.args[where] if isinstance(where, int) else self.kwargs[where]

    def with_argument(self, where: ArgumentKey, value: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with one replaced by a copy of `value`; some modules add to their input in place."""
        value = value.clone()
        if isinstance(where, int):
            return (*self.args[:where], value, *self.args[where + 1 :]), self.kwargs
        return self.args, {**self.kwargs, where: value}


def is_per_token(value: object) -> bool:
    """Check whether a value is a tensor of hidden values with one row for each token."""
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and 2 <= value.dim() <= 3
        and value.shape[-2] == TOKENS
        and (value.dim() == 2 or value.shape[0] == 1)
    )


def first_tensor(output: Any) -> torch.Tensor | None:
    """Return the tensor that a module returned, alone or first in a tuple; None if there is none."""
    value = output[0] if isinstance(output, tuple | list) and output else output
    return value if isinstance(value, torch.Tensor) else None


class ModuleWrapper(nn.Module):
    """Replaces a module in its parent; attributes that the wrapper lacks are read from the module.

    Args:
        module: the module that is replaced.
        attributes: attributes of the wrapper.
    """

    def __init__(self, module: nn.Module, **attributes: Any) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        # Bypass nn.Module's attribute handling: a module among the attributes must not become a child of the wrapper.
        vars(self).update(attributes)

    @property  # type: ignore[misc]
    def __class__(self) -> type[nn.Module]:  # type: ignore[override]
        """Return the class of the module, by which a block may choose how to call it (`isinstance`)."""
        modules = vars(self).get("_modules", {})
        return type(modules["module"]) if "module" in modules else type(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class RecordingWrapper(ModuleWrapper):
    """Runs the module that it replaces, and records its arguments and its output."""

    _name: str
    _calls: list[Call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - documented in torch
        index = len(self._calls)
        started = Call(self._name, _copy(args), _copy(kwargs))
        self._calls.append(started)
        output = self.module(*args, **kwargs)
        self._calls[index] = replace(started, output=_copy(output))
        return output


def _copy(value: Any) -> Any:
    """Copy the tensors in a value and its containers."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(map(_copy, value))
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    return value


@contextmanager
def record_calls(modules: list[tuple[nn.Module, str, str]]) -> Iterator[list[Call]]:
    """Record the calls of modules, each given as (parent module, its child's key, the name to record).

    The list holds the calls in the order in which they started.
    """
    calls: list[Call] = []
    wrappers = [RecordingWrapper(_child(parent, key), _name=name, _calls=calls) for parent, key, name in modules]
    with replace_modules([(parent, key) for parent, key, _ in modules], wrappers):
        yield calls


def _child(parent: nn.Module, key: str) -> nn.Module:
    """Return a child module by its key."""
    module = parent._modules[key]
    assert module is not None
    return module


@contextmanager
def replace_modules(places: Sequence[tuple[nn.Module, str]], wrappers: Sequence[nn.Module]) -> Iterator[None]:
    """Replace modules, each given as (parent module, its child's key), by wrappers inside a `with` block."""
    originals = [(parent, key, parent._modules[key]) for parent, key in places]
    try:
        for (parent, key), module in zip(places, wrappers, strict=True):
            parent._modules[key] = module
        yield
    finally:
        for parent, key, original in originals:
            parent._modules[key] = original


@contextmanager
def eval_no_grad(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode and disable gradients; restore each module's mode at the end."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), quiet_casts():
            yield
    finally:
        for module in training:
            module.training = True


def random_like(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw random numbers on the scale of the values of `like`, with a separate generator."""
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    scale = like.float().std().item() or 1.0
    return (noise * min(max(scale, 1e-3), 1e3)).to(like.device, like.dtype)
