"""Refuse to zero weights of quantized formats in which zero bytes are not zero weights."""

from __future__ import annotations

import re
from collections.abc import Set
from typing import TYPE_CHECKING

from ..errors import UnsupportedEditError
from ..plans.route import Route
from .checkpoint import Checkpoint
from .quantization import QUANTIZATION_KEYS

if TYPE_CHECKING:
    from ..models.block_list import BlockList
    from .tensor_names import TensorNames

# Quantized formats in which zero bytes mean zero weights.
_ZERO_BYTES_ARE_ZERO = frozenset(("fp8", "fbgemm_fp8", "mxfp4"))
# Names of tensors, next to a weight, from which a quantized format computes the weight's values.
_OFFSET = re.compile(r"biases$|zero|offset|shift")
_SCALE_OR_OFFSET = re.compile(rf"scale|absmax|quant|codebook|{_OFFSET.pattern}")


def refuse_packed_zeros(checkpoint: Checkpoint, route: Route) -> None:
    """Refuse to skip a branch in a quantized format in which zero bytes are not known to be zero weights."""
    if other := sorted(quantization_methods(checkpoint) - _ZERO_BYTES_ARE_ZERO):
        if not all(visit.of_own_block.whole for visit in route):
            raise _not_zero(f"the checkpoint is quantized ({', '.join(other)})")


def quantization_methods(checkpoint: Checkpoint) -> set[str]:
    """Return the names of the quantized formats that config.json states."""
    settings = {
        key: fields[key]
        for fields in (checkpoint.config, checkpoint.fields)
        for key in sorted(QUANTIZATION_KEYS & fields.keys())
        if fields[key]
    }
    return {
        str((value.get("quant_method") if isinstance(value, dict) else None) or f"{key} in config.json")
        for key, value in settings.items()
    }


def check_zeros_mean_zero(
    checkpoint: Checkpoint, block: int, zeroed: Set[str], blocks: tuple[BlockList, TensorNames], *, packed: bool
) -> None:
    """Refuse tensors of a block whose zeros other tensors of their module would turn into other weights.

    Args:
        checkpoint: the source.
        block: the block.
        zeroed: the names, within the block, of the tensors to zero.
        blocks: the blocks of the model, and the tensors of each of their parameters.
        packed: whether the format is one in which integers and scales are known to be harmless.

    Raises:
        UnsupportedEditError: a tensor holds integers, or has scales or offsets; gives its name.
    """
    block_list, tensor_names = blocks
    parameters = block_list.blocks[block].state_dict().keys()
    own = {rest for name, rests in tensor_names.tensors[block].items() if name in parameters for rest in rests}
    modules = {rest.rpartition(".")[0] for rest in zeroed}
    infos = {
        split[1]: info
        for name, info in checkpoint.tensors.tensors()
        if (split := checkpoint.block_prefix.split(name)) and split[0] == block
    }
    for rest in sorted(zeroed):
        if infos[rest].dtype.startswith(("I", "U")) and not packed:
            raise _not_zero(f"{checkpoint.block_prefix.join(block, rest)} holds integers ({infos[rest].dtype})")
    for rest in sorted(infos.keys() - own):  # the model's own parameters have been probed
        module, _, last = rest.rpartition(".")
        if module in modules and (_OFFSET if packed else _SCALE_OR_OFFSET).search(last):
            raise _not_zero(f"{checkpoint.block_prefix.join(block, rest)} scales or shifts a weight to zero")


def _not_zero(why: str) -> UnsupportedEditError:
    return UnsupportedEditError(
        f"{why}, and zero bytes do not mean zero weights in this format, so a branch of it cannot be zeroed; skip the "
        "branch in the unquantized checkpoint"
    )
