"""Run a model on a few tokens, and its blocks one by one on random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError, is_out_of_memory
from .block_list import unwrap_transformers
from .block_view import share_parameters
from .call_tracing import TOKENS, Call, eval_no_grad, first_tensor, random_like, record_calls
from .skipped_branch import SkipSpec, install_skips


def probe_forward(model: nn.Module, tokens: int = TOKENS, *, use_cache: bool = False) -> Any:
    """Run one forward pass on one short sequence, and return what the model returns.

    Raises:
        UnsupportedEditError: the model raised an exception other than that memory ran out.
    """
    try:
        model = unwrap_transformers(model)
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        ids = torch.arange(1, tokens + 1) % max(2, min(weight.shape[0], 64))
        return model(input_ids=ids[None].to("cpu" if weight.is_meta else weight.device), use_cache=use_cache)
    except Exception as error:  # a model's forward may raise anything
        if is_out_of_memory(error):
            raise
        raise UnsupportedEditError(
            f"{type(model).__name__} could not be run on {tokens} tokens "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}), so its parts cannot be found"
        ) from error


def unpack_weights(model: nn.Module) -> None:
    """Run a model once if its weights are unpacked before its first forward (compressed-tensors).

    A block that is not in the model at that time would stay without weights, and the view of a block would have no
    others than the packed ones.

    Raises:
        UnsupportedEditError: the model raised an exception.
    """
    if any("ct_decompress_hook" in vars(module) for module in model.modules()):
        with eval_no_grad(model):
            probe_forward(model)


def record_block(model: nn.Module, blocks: nn.ModuleList, position: int) -> Call:
    """Return the call of one block in one small forward pass of its model.

    Raises:
        UnsupportedEditError: the model raised an exception, or did not run the block.
    """
    with record_calls([(blocks, str(position), "block")]) as calls:
        probe_forward(model)
    if not calls:
        raise UnsupportedEditError(f"{type(model).__name__} did not run its block {position}")
    return calls[0]


class BlockProbe:
    """A block, a recorded call of it, and random numbers to pass to it as the residual stream.

    Args:
        block: the block, in evaluation mode; it is not changed.
        call: a recorded call of the block in its model, with a batch of one sequence of `call_tracing.TOKENS` tokens.
        seed: seed of the random numbers.

    Raises:
        UnsupportedEditError: the block is not given a residual stream.
    """

    def __init__(self, block: nn.Module, call: Call, seed: int) -> None:
        argument = call.hidden_states_argument()
        if argument is None:
            raise UnsupportedEditError("it does not take a residual stream of shape (1, tokens, width)")
        self.block, self.call, self.argument = block, call, argument
        self.stream = random_like(call[argument], seed)

    def run(self, block: nn.Module | None = None, stream: torch.Tensor | None = None) -> torch.Tensor:
        """Return the residual stream after the probed block, or after `block` in its place."""
        args, kwargs = self.call.with_argument(self.argument, self.stream if stream is None else stream)
        output = first_tensor((self.block if block is None else block)(*args, **kwargs))
        if output is None or output.shape != self.stream.shape:
            raise UnsupportedEditError("it does not return the residual stream")
        return output.clone()

    def added(self) -> torch.Tensor:
        """Return what the probed block adds to the residual stream."""
        return self.run() - self.stream

    def without(self, skips: Iterable[SkipSpec], stream: torch.Tensor | None = None) -> torch.Tensor:
        """Return the residual stream after the probed block with some modules replaced."""
        edited = share_parameters(self.block)
        install_skips(edited, list(skips))
        return self.run(edited, stream)

    def calls(self, paths: Sequence[str], block: nn.Module | None = None) -> list[Call]:
        """Return the calls of the modules at `paths` during one run of the probed block, or of `block` in its place."""
        block = share_parameters(self.block) if block is None else block
        modules = [(block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], path) for path in paths]
        with record_calls(modules) as calls:
            self.run(block)
        return calls


def probe_blocks(model: nn.Module, blocks: nn.ModuleList, seed: int) -> list[BlockProbe]:
    """Return a probe of each block, with its call in one small forward pass of the model.

    Args:
        model: a model that runs each of its blocks once and in order.
        blocks: its blocks.
        seed: seed of the random numbers.
    """
    with record_calls([(blocks, str(number), str(number)) for number in range(len(blocks))]) as calls:
        probe_forward(model)
    return [BlockProbe(block, call, seed) for block, call in zip(blocks, calls, strict=True)]
