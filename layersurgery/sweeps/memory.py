"""Predict the memory that a sweep needs, for a loaded model or for a model built from its config only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from ..metrics import tiled
from ..models.block_list import text_config
from ..models.quantized import is_quantized, quantized_shape
from ..runtime.offload import distinct_tensors
from .schedule import Schedule

_TOKENS_PER_BATCH = 2048
_SHARE_OF_MEMORY = 0.5


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory that one batch needs, in bytes.

    Attributes:
        weights: parameters and buffers, on any device.
        streams: the residual streams that are in memory together, at their largest number.
        block: activations inside the largest block while it runs.
        readout: the inputs of the readout for both models, and one tile of logits.
    """

    weights: int
    streams: int
    block: int
    readout: int

    @property
    def working(self) -> int:
        """Return all bytes except the weights. A block and a readout never run at the same time."""
        return self.streams + max(self.block, self.readout)

    @property
    def total(self) -> int:
        """Return all bytes, the weights included."""
        return self.weights + self.working


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Sizes of a model from which its memory use is predicted.

    Attributes:
        weights: bytes of all parameters and buffers.
        blocks: bytes of each block's parameters and buffers.
        width: width of the residual stream.
        widest: numbers that the widest block computes for each token, without the stream itself.
        vocabulary: number of logits.
        heads: number of attention heads if attention stores its full matrix (eager attention), else 0.
        itemsize: bytes of one number.
        head_rows: number of tokens that the model's own head reads at once; None if logits are read in tiles.
        tile_elements: number of logits in a tile.
        observed: bytes of activations that an observer keeps for each token.
    """

    weights: int
    blocks: tuple[int, ...]
    width: int
    widest: int
    vocabulary: int
    heads: int
    itemsize: int
    head_rows: int | None = None
    tile_elements: int = tiled.TILE_ELEMENTS
    observed: int = 0

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        width: int,
        vocabulary: int,
        head_rows: int | None = None,
        tile_elements: int = tiled.TILE_ELEMENTS,
        observed: int = 0,
    ) -> MemoryModel:
        """Read the sizes of a model, which may be on the meta device (without memory for its weights)."""
        config = text_config(model)
        eager = getattr(config, "_attn_implementation", "") == "eager"
        active_experts = getattr(config, "num_experts_per_tok", None) or 1
        return cls(
            weights=tensor_bytes(model),
            blocks=tuple(map(tensor_bytes, blocks)),
            width=width,
            widest=max(_count_widest_matrices(block, active_experts) for block in blocks),
            vocabulary=vocabulary,
            heads=getattr(config, "num_attention_heads", 0) if eager else 0,
            itemsize=next(model.parameters()).element_size(),
            head_rows=head_rows,
            tile_elements=tile_elements,
            observed=observed,
        )

    def predict(self, plan: Schedule, sequences: int, length: int) -> MemoryUse:
        """Predict the memory for a batch of `sequences` sequences of `length` tokens."""
        tokens = sequences * length
        rows = self.head_rows or min(tokens, tiled.ROWS)
        tile = rows * self.vocabulary
        if self.head_rows is None:
            tile = min(self.tile_elements, tile)
        return MemoryUse(
            weights=self.weights,
            streams=tokens * (plan.states_at_peak * self.width * self.itemsize + self.observed),
            block=tokens * (6 * self.width + self.widest + 2 * self.heads * length) * self.itemsize,
            readout=tokens * self.width * 4 * 4 + tile * 4 * 3,
        )


def suggest_batch_size(needs: MemoryModel, plan: Schedule, length: int, device: torch.device) -> int:
    """Suggest how many sequences of `length` tokens to measure in one batch.

    A batch holds a few thousand tokens, or fewer if they would not fit into half of the free memory.

    Args:
        needs: the model's sizes.
        plan: the schedule.
        length: tokens of one sequence.
        device: the device to compute on.
    """
    one_sequence, two_sequences = (needs.predict(plan, count, length).total for count in (1, 2))
    fitting = int(_SHARE_OF_MEMORY * free_memory(device) / max(1, two_sequences - one_sequence))
    useful = _TOKENS_PER_BATCH * (16 if device.type == "cuda" else 1) // length
    return max(1, min(fitting, useful))


def free_memory(device: torch.device) -> int:
    """Return the bytes of free memory on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in distinct_tensors(module))


def _count_widest_matrices(block: nn.Module, experts: int) -> int:
    """Return how many numbers per token the three widest matrices of a block read or write.

    A gated MLP has that many in memory at the same time.

    If the matrices of all experts are one tensor, (experts, outputs, inputs), each token uses `experts` of them.
    """
    widths = [
        max(quantized_shape(module) if is_quantized(module) else matrix.shape[-2:])
        * (experts if matrix.dim() == 3 else 1)
        for module in block.modules()
        for matrix in module._parameters.values()
        if matrix is not None and matrix.dim() in (2, 3)
    ]
    return sum(sorted(widths, reverse=True)[:3])
