"""Watching a model run without forward hooks: modules stand in for others, run them, and keep what was given and returned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

TOKENS = 7
Where = int | str
"""A positional argument's number, or a keyword argument's name."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module; tensors of the call that the module may overwrite are copies.

    Attributes:
        name: the module watched.
        args: positional arguments.
        kwargs: keyword arguments.
        output: what it returned.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    def tensors(self) -> Iterator[tuple[Where, torch.Tensor]]:
        """Floating-point tensors among the arguments that have a row for each token: (..., TOKENS, width)."""
        places: list[Where] = [*range(len(self.args)), *self.kwargs]
        for where in places:
            if is_per_token(self[where]):
                yield where, self[where]

    def hidden_states_argument(self) -> Where | None:
        """Where the hidden states are: the first such argument, or the one named so."""
        if is_per_token(self.kwargs.get("hidden_states")):
            return "hidden_states"
        return next((where for where, _ in self.tensors()), None)

    def __getitem__(self, where: Where) -> Any:
        return self.args[where] if isinstance(where, int) else self.kwargs[where]

    def with_argument(self, where: Where, value: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments but for one, which is copied, for some modules add in place."""
        value = value.clone()
        if isinstance(where, int):
            return (*self.args[:where], value, *self.args[where + 1 :]), self.kwargs
        return self.args, {**self.kwargs, where: value}


def is_per_token(value: object) -> bool:
    """Whether this is a tensor of hidden values with one row for each token."""
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and 2 <= value.dim() <= 3
        and value.shape[-2] == TOKENS
        and (value.dim() == 2 or value.shape[0] == 1)
    )


def first_tensor(output: Any) -> torch.Tensor | None:
    """The tensor that a module hands on: what it returned, or the first of the tuple it returned."""
    value = output[0] if isinstance(output, tuple | list) and output else output
    return value if isinstance(value, torch.Tensor) else None


@dataclass(slots=True)
class CallLog:
    """Calls in the order in which they began."""

    calls: list[Call] = field(default_factory=list)

    def of_module(self, name: str) -> list[Call]:
        """Calls of one module."""
        return [call for call in self.calls if call.name == name]


class ModuleWrapper(nn.Module):
    """Stands in a module's place; what others read off the module, they still find."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class RecordingWrapper(ModuleWrapper):
    """Runs a module in its place and keeps what was given and what came out."""

    def __init__(self, name: str, module: nn.Module, log: CallLog) -> None:
        super().__init__(module)
        self.name, self.log = name, log

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - torch's own
        place = len(self.log.calls)
        before = Call(self.name, _kept(args), _kept(kwargs))
        self.log.calls.append(before)
        output = self.module(*args, **kwargs)
        self.log.calls[place] = Call(self.name, before.args, before.kwargs, _kept(output))
        return output


def _kept(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(map(_kept, value))
    if type(value) is dict:
        return {key: _kept(item) for key, item in value.items()}
    return value


@contextmanager
def record_calls(modules: list[tuple[nn.Module, str, str]]) -> Iterator[CallLog]:
    """Put a witness in each place (parent module, its child's key, the name to log under), and take it out again."""
    log = CallLog()
    stand_ins = [RecordingWrapper(name, _child(parent, key), log) for parent, key, name in modules]
    with replace_modules([(parent, key) for parent, key, _ in modules], stand_ins):
        yield log


def _child(parent: nn.Module, key: str) -> nn.Module:
    module = parent._modules[key]
    assert module is not None
    return module


@contextmanager
def replace_modules(places: Sequence[tuple[nn.Module, str]], wrappers: Sequence[nn.Module]) -> Iterator[None]:
    """Put modules into places (parent module, its child's key) while the `with` block lasts."""
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
    """Evaluation mode and no gradients, each module's own mode restored at the end."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def random_like(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Random numbers of the size of the values of `like`, from a generator of our own."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    scale = like.float().std().item() or 1.0
    return (drawn * min(max(scale, 1e-3), 1e3)).to(like.device, like.dtype)
