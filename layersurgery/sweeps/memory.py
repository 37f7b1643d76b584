"""What a sweep will take in memory, said before it runs; for a model that is loaded as for one that is a config alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from ..metrics import tiled
from ..models.block_list import text_config
from ..runtime.offload import distinct_tensors
from .schedule import Schedule

_TOKENS_AT_ONCE = 2048
_SHARE_OF_MEMORY = 0.5


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a batch will take, in bytes.

    Attributes:
        weights: parameters and buffers, wherever they are.
        streams: residual streams alive together at the widest point.
        block: inside the largest block, while it runs.
        readout: what is read of both models, and one tile of logits.
    """

    weights: int
    streams: int
    block: int
    readout: int

    @property
    def working(self) -> int:
        """All but the weights; a block and a readout never work together."""
        return self.streams + max(self.block, self.readout)

    @property
    def total(self) -> int:
        """In all."""
        return self.weights + self.working


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """What of a model the memory depends on.

    Attributes:
        weights: bytes of parameters and buffers.
        blocks: bytes of each block's.
        width: of the residual stream.
        widest: numbers that the widest block makes for each token beside the stream.
        vocabulary: number of logits.
        heads: of attention, where it writes its matrix down (eager), else 0.
        itemsize: bytes of a number.
        head_rows: tokens that are read at once by the model's own tail; None where logits are read in tiles.
    """

    weights: int
    blocks: tuple[int, ...]
    width: int
    widest: int
    vocabulary: int
    heads: int
    itemsize: int
    head_rows: int | None = None

    @classmethod
    def of(
        cls, model: nn.Module, blocks: Sequence[nn.Module], *, width: int, vocabulary: int, head_rows: int | None = None
    ) -> MemoryModel:
        """Of a model, which may be without memory for its weights (on the device meta)."""
        config = text_config(model)
        eager = getattr(config, "_attn_implementation", "") == "eager"
        chosen = getattr(config, "num_experts_per_tok", None) or 1
        return cls(
            weights=_bytes(model),
            blocks=tuple(map(_bytes, blocks)),
            width=width,
            widest=max(_widest(block, chosen) for block in blocks),
            vocabulary=vocabulary,
            heads=getattr(config, "num_attention_heads", 0) if eager else 0,
            itemsize=next(model.parameters()).element_size(),
            head_rows=head_rows,
        )

    def predict(self, plan: Schedule, sequences: int, length: int) -> MemoryUse:
        """What a batch of `sequences` of `length` tokens will take."""
        tokens = sequences * length
        rows = self.head_rows or min(tokens, tiled.ROWS)
        tile = rows * self.vocabulary
        if self.head_rows is None:
            tile = min(tiled.TILE_ELEMENTS, tile)
        return MemoryUse(
            weights=self.weights,
            streams=plan.states_at_peak * tokens * self.width * self.itemsize,
            block=tokens * (6 * self.width + self.widest + 2 * self.heads * length) * self.itemsize,
            readout=tokens * self.width * 4 * 4 + tile * 4 * 3,
        )


def suggest_batch_size(needs: MemoryModel, plan: Schedule, length: int, device: torch.device) -> int:
    """How many sequences of `length` tokens to take at once: a few thousand tokens, or what half of the free memory holds."""
    one, two = (needs.predict(plan, count, length).total for count in (1, 2))
    fits = int(_SHARE_OF_MEMORY * free_memory(device) / max(1, two - one))
    wanted = _TOKENS_AT_ONCE * (16 if device.type == "cuda" else 1) // length
    return max(1, min(fits, wanted))


def free_memory(device: torch.device) -> int:
    """Bytes that a device has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in distinct_tensors(module))


def _widest(block: nn.Module, experts: int) -> int:
    """Numbers a token that the matrices of a block are given or give, the largest three together: what is alive in a gated MLP.

    Matrices of experts that are kept as one tensor, (experts, outputs, inputs), work for `experts` of them for each token.
    """
    matrices = [parameter for parameter in block.parameters() if parameter.dim() in (2, 3)]
    widths = sorted(
        (max(matrix.shape[-2:]) * (experts if matrix.dim() == 3 else 1) for matrix in matrices), reverse=True
    )
    return sum(widths[:3])
