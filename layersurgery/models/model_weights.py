"""Find which weights to change in the blocks of a loaded model; each kind of block is examined once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..plans.visit import Branch, Visit
from .anatomy import Anatomy
from .anatomy import anatomy as find_anatomy
from .block_probe import BlockProbe, record_block
from .block_weights import BlockWeights
from .call_tracing import eval_no_grad
from .skipped_branch import SkipSpec
from .weight_change import WeightChange


class ModelWeights:
    """Find the weights to change in the blocks of a loaded model; each kind of block is examined once.

    Args:
        model: a model that runs each of its blocks once and in order.
        blocks: its blocks.
        anatomy: its anatomy.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, anatomy: Anatomy) -> None:
        self._model, self._blocks, self._anatomy = model, blocks, anatomy
        self._originals = tuple(blocks)  # in the list, others may take their places while the model runs
        self._of_kind: dict[object, BlockWeights] = {}

    def changes(self, visit: Visit) -> tuple[WeightChange, ...]:
        """Return the changes of a visit's weights, in the order in which to make them.

        Raises:
            UnsupportedEditError: the block cannot be changed in this way; gives the reason.
            PlanError: the block does not have a head or neuron of a number.
        """
        if visit.skips_only:
            return ()
        with self._examining(visit.block) as weights:
            return weights.changes(visit)

    def with_biases(self, block: int, specs: tuple[SkipSpec, ...]) -> tuple[SkipSpec, ...]:
        """Return specs of a block, those that add means with the biases that can hold them in a saved model."""
        if all(spec.mean is None for spec in specs):
            return specs
        with self._examining(block) as weights:
            return weights.with_biases(specs)

    def count_units(self, block: int, branch: Branch) -> int:
        """Return the number of heads, or of neurons, of a block that can be turned off one by one.

        Raises:
            UnsupportedEditError: they cannot; gives the reason.
        """
        with self._examining(block) as weights:
            return weights.count_units(branch)

    @contextmanager
    def _examining(self, number: int) -> Iterator[BlockWeights]:
        """Give the weights of a block's kind while the block may be run."""
        # Blocks of one kind may divide matrices of one shape into other numbers of heads.
        kind = self._anatomy.kind_of[number], _head_numbers(self._originals[number])
        with eval_no_grad(self._model), torch.compiler.set_stance("force_eager"):
            if kind not in self._of_kind:
                probe = BlockProbe(self._originals[number], record_block(self._model, self._blocks, number), seed=1)
                name = f"block {number} ({type(self._originals[number]).__name__})"
                self._of_kind[kind] = BlockWeights(probe, self._anatomy.parts(number), name)
            yield self._of_kind[kind]


def count_heads(model: nn.Module, *, blocks: str | None = None) -> Callable[[int], int]:
    """Return a function that returns how many heads of a block's attention can be turned off one by one.

    It raises `UnsupportedEditError` for a block whose heads cannot be.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        blocks: path of the list of blocks, if it cannot be found automatically.
    """
    anatomy = find_anatomy(model, blocks=blocks)
    weights = ModelWeights(model, model.get_submodule(anatomy.blocks), anatomy)  # type: ignore[arg-type]
    return lambda block: weights.count_units(block, "attention")


def _head_numbers(block: nn.Module) -> tuple[tuple[str, int], ...]:
    """Return the settings of a block's modules that may say how many heads it has."""
    return tuple(
        (f"{path}.{name}", value)
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if "head" in name and isinstance(value, int)
    )
