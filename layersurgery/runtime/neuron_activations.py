"""Capture the activations of MLP neurons: the input of the MLP's output projection. No forward hooks are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..models.block_probe import probe_forward
from ..models.call_tracing import ModuleWrapper, replace_modules
from ..models.quantized import is_quantized, quantized_shape
from ..models.weight_conventions import output_dim
from .block_runner import BlockRunner

# Enough tokens that no expert of a mixture receives all of them by chance.
_TOKENS = 25
OnActivations = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Projection:
    """An MLP's output projection; its input holds one number for each neuron and token.

    Attributes:
        layer: number of the block.
        weight: name of the projection's weight within the block.
        neurons: number of neurons.
    """

    layer: int
    weight: str
    neurons: int


def projections(runner: BlockRunner) -> tuple[list[Projection], dict[str, str]]:
    """Find the output projections whose inputs can be captured, by running the model once on 25 tokens.

    Returns:
        The projections, and for everything that cannot be captured its name with the reason.
    """
    skipped: dict[str, str] = {}
    found: list[Projection] = []
    for layer, block in enumerate(runner.blocks):
        parts = runner.anatomy.parts(layer)
        names = [name for name in parts.outputs("mlp") if not name.endswith("bias")]
        if not names:
            skipped[f"activations of block {layer}"] = parts.skip_error or (
                "the output weights of its MLP cannot be identified" if parts.mlp else "the block has no mlp"
            )
        for name in names:
            weight = block.get_parameter(name)
            if weight.dim() != 2:
                skipped[f"activations of block {layer} ({name})"] = (
                    "its experts' weights are one tensor, and no module receives their input"
                )
                continue
            owner, _, key = name.rpartition(".")
            module = block.get_submodule(owner)
            if is_quantized(module):
                neurons, _ = quantized_shape(module)
            else:
                neurons = weight.shape[1 - output_dim(module, key, runner.width)]
            found.append(Projection(layer, name, neurons))
    shapes_by_projection: dict[Projection, list[tuple[int, ...]]] = {projection: [] for projection in found}

    def record_shape(projection: Projection) -> OnActivations:
        return lambda value: shapes_by_projection[projection].append(tuple(value.shape))

    with (
        runner.inference_mode(),
        capture_neurons(runner, {projection: record_shape(projection) for projection in found}),
    ):
        probe_forward(runner.model, _TOKENS)
    readable = []
    for projection, shapes in shapes_by_projection.items():
        if (
            len(shapes) == 1
            and shapes[0][-1] == projection.neurons
            and torch.Size(shapes[0]).numel() == _TOKENS * projection.neurons
        ):
            readable.append(projection)
        else:
            reason = "it receives only some of the tokens, like an expert" if shapes else "it is not run as a module"
            skipped[f"activations of block {projection.layer} ({projection.weight})"] = reason
    return readable, skipped


@contextmanager
def capture_neurons(runner: BlockRunner, wanted: Mapping[Projection, OnActivations]) -> Iterator[None]:
    """Call functions with the inputs of projections each time these run inside the context.

    Args:
        runner: the model's blocks.
        wanted: the projections, each with the function that is called with its input: (..., neurons), in the model's
            dtype, one row for each token.
    """
    slots, wrappers = [], []
    for projection, on_activations in wanted.items():
        parent, _, key = projection.weight.rpartition(".")[0].rpartition(".")
        owner = runner.blocks[projection.layer].get_submodule(parent)
        slots.append((owner, key))
        wrappers.append(_Capturing(owner.get_submodule(key), _on_activations=on_activations))
    with replace_modules(slots, wrappers):
        yield


class _Capturing(ModuleWrapper):
    """Wrapper that reports the input of a module and runs it."""

    _on_activations: OnActivations

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._on_activations(args[0] if args else next(iter(kwargs.values())))
        return self.module(*args, **kwargs)
