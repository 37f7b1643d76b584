"""What the neurons of an MLP do: the input of its output projection, read where the projection is given it. No forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.anatomy import probe_forward
from ..models.call_tracing import ModuleWrapper, replace_modules
from ..models.weight_conventions import output_dim
from .block_runner import BlockRunner

# So many that no expert of a mixture is given all of them by chance.
_TOKENS = 25
OnActivations = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Projection:
    """An MLP's output projection, which is given a number for each neuron and token.

    Attributes:
        layer: the block.
        weight: its weight, within the block.
        neurons: how many.
    """

    layer: int
    weight: str
    neurons: int


def projections(runner: BlockRunner) -> tuple[list[Projection], dict[str, str]]:
    """Those that can be read, found by running the model once on 25 tokens; and of others why not, by their names."""
    skipped: dict[str, str] = {}
    found: list[Projection] = []
    for layer, block in enumerate(runner.blocks):
        parts = runner.anatomy.parts(layer)
        names = [name for name in parts.outputs("mlp") if not name.endswith("bias")]
        if not names:
            skipped[f"activations of block {layer}"] = parts.fault or (
                "the weights with which its MLP writes cannot be told" if parts.mlp else "the block has no mlp"
            )
        for name in names:
            weight = block.get_parameter(name)
            if weight.dim() != 2:
                skipped[f"activations of block {layer} ({name})"] = (
                    "its experts' weights are one tensor, and no module is given their input"
                )
                continue
            owner, _, key = name.rpartition(".")
            written = output_dim(block.get_submodule(owner), key, runner.width)
            found.append(Projection(layer, name, weight.shape[1 - written]))
    seen: dict[Projection, list[tuple[int, ...]]] = {one: [] for one in found}

    def note(one: Projection) -> OnActivations:
        return lambda value: seen[one].append(tuple(value.shape))

    with runner.inference_mode(), capture_neurons(runner, {one: note(one) for one in found}):
        probe_forward(runner.model, _TOKENS)
    whole = []
    for one, shapes in seen.items():
        if len(shapes) == 1 and shapes[0][-1] == one.neurons and torch.Size(shapes[0]).numel() == _TOKENS * one.neurons:
            whole.append(one)
        else:
            why = "it is given some of the tokens only, as an expert is" if shapes else "it is not run as a module"
            skipped[f"activations of block {one.layer} ({one.weight})"] = why
    return whole, skipped


@contextmanager
def capture_neurons(runner: BlockRunner, wanted: Mapping[Projection, OnActivations]) -> Iterator[None]:
    """Inside, projections tell what they are given: (..., neurons), of the model's dtype, a row for each token."""
    places, stand_ins = [], []
    for one, tell in wanted.items():
        parent, _, key = one.weight.rpartition(".")[0].rpartition(".")
        owner = runner.blocks[one.layer].get_submodule(parent)
        places.append((owner, key))
        stand_ins.append(_Capturing(owner.get_submodule(key), tell))
    with replace_modules(places, stand_ins):
        yield


class _Capturing(ModuleWrapper):
    """Runs a module, and tells what it is given."""

    def __init__(self, module: nn.Module, tell: OnActivations) -> None:
        super().__init__(module)
        vars(self).update(_tell=tell)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._tell(args[0] if args else next(iter(kwargs.values())))
        return self.module(*args, **kwargs)
