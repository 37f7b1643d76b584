"""Record the attention weights of tokens on the tokens before them while the model runs.

The kernel that scaled_dot_product_attention chooses takes queries, keys and a mask, and returns for each query the
log-sum-exp of its scores over all keys. A few attention weights can therefore be computed from queries and keys alone:
a tokens x tokens matrix is never in memory, and the model's own output does not change, because its own kernel computes
it. If a model computes the matrix of weights itself (eager attention), the weights are read from that matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from .float32_matmul import float32_products

REACH = 5
_CHUNK = 32
_aten = torch.ops.aten
# For each kernel, the positions of two arguments: the mask, and the flag that requests log-sum-exp. None: not
# positional.
_KERNELS: dict[Any, tuple[int | None, int | None]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default: (None, None),
    _aten._scaled_dot_product_flash_attention.default: (None, None),
    _aten._scaled_dot_product_efficient_attention.default: (3, 4),
    _aten._scaled_dot_product_cudnn_attention.default: (3, 4),
}
_SOFTMAX = {_aten._softmax.default, _aten._safe_softmax.default}


class PreviousTokenAttention(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own
    """Context that sums, over heads, the attention of each token on the `reach` tokens before it.

    Attention kernels run unchanged inside the context.

    Args:
        tokens: length of a sequence; a softmax of another size is ignored.
        reach: number of previous tokens.

    Attributes:
        weights_BTK: attention weights summed over heads, (batch, tokens, reach), float32. Index k - 1 holds the weight
            of the token k positions before. None until a kernel has run.
        heads: number of heads in the sum.
        unreadable_kernels: names of kernels from which attention weights cannot be computed.
    """

    def __init__(self, tokens: int, reach: int = REACH) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens, self.reach = tokens, reach
        self.weights_BTK: torch.Tensor | None = None
        self.heads = 0
        self.unreadable_kernels: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KERNELS:
            return self._run_kernel(func, args, kwargs)
        if func in _SOFTMAX:
            output = func(*args, **kwargs)
            self._record_softmax(output)
            return output
        with self:  # in inference mode, composite functions arrive here before they are decomposed
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        if any(word in func.__name__ for word in ("attention", "attn")):
            self.unreadable_kernels.add(func.__name__.partition(".")[0])
        return func(*args, **kwargs)

    def _run_kernel(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask_index, lse_flag_index = _KERNELS[func]
        if lse_flag_index is not None:
            args = (*args[:lse_flag_index], True, *args[lse_flag_index + 1 :])
        output = func(*args, **kwargs)
        query, key = args[:2]
        if query.shape[-2] == key.shape[-2] == self.tokens:
            mask = kwargs.get("attn_mask") if mask_index is None else args[mask_index]
            lse_BHT = output[1].flatten(2)[..., : self.tokens]
            scale = kwargs.get("scale")
            self._add_from_kernel(query, key, lse_BHT, mask, query.shape[-1] ** -0.5 if scale is None else scale)
        return output

    def _record_softmax(self, weights: torch.Tensor) -> None:
        """Record a softmax over (batch, heads, queries, keys); some models add a column for a sink (not a token)."""
        if (
            weights.dim() < 3
            or weights.shape[-2] != self.tokens
            or weights.shape[-1] not in (self.tokens, self.tokens + 1)
        ):
            return
        self._add_from_weights(weights if weights.dim() > 3 else weights[:, None])

    def _add_from_kernel(
        self,
        query_BHTC: torch.Tensor,
        key_BHTC: torch.Tensor,
        lse_BHT: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> None:
        self._add(banded_attention(query_BHTC, key_BHTC, lse_BHT, mask, scale, self.reach).sum(1), query_BHTC.shape[1])

    def _add_from_weights(self, weights: torch.Tensor) -> None:
        band = [
            functional.pad(
                weights.diagonal(-distance, -2, -1)[..., : max(0, self.tokens - distance)],
                (min(distance, self.tokens), 0),
            )
            for distance in range(1, self.reach + 1)
        ]
        self._add(torch.stack(band, -1).float().sum(1), weights.shape[1])

    def _add(self, weights_BTK: torch.Tensor, heads: int) -> None:
        total = self.weights_BTK
        if total is not None and total.shape != weights_BTK.shape:
            # (batch * heads, tokens, tokens) as well as (batch, heads, ...) in one block: not known to occur
            self.unreadable_kernels.add("kernels of several shapes")
            return
        self.weights_BTK = weights_BTK if total is None else total + weights_BTK
        self.heads += heads


class LastTokenAttention(PreviousTokenAttention):  # type: ignore[no-untyped-call] # torch's own
    """Context that keeps, for each head, the attention weights of the last token on every token.

    Attributes:
        last_token_BHT: one float32 tensor for each kernel call, (batch, heads, tokens), or (batch * heads, 1, tokens)
            if the kernel merges batch and heads.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.last_token_BHT: list[torch.Tensor] = []

    def _add_from_kernel(
        self,
        query_BHTC: torch.Tensor,
        key_BHTC: torch.Tensor,
        lse_BHT: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> None:
        key_BHTC = _repeat_keys(key_BHTC, query_BHTC)
        with float32_products("highest"), torch.autocast(query_BHTC.device.type, enabled=False):
            score = torch.matmul(query_BHTC[:, :, -1:].float(), key_BHTC.float().mT)[:, :, 0] * scale
        if mask is not None:
            mask_row = mask[..., -1, :]
            score = score.masked_fill(~mask_row, -torch.inf) if mask.dtype == torch.bool else score + mask_row
        self.last_token_BHT.append((score - lse_BHT[..., -1:]).exp())

    def _add_from_weights(self, weights: torch.Tensor) -> None:
        self.last_token_BHT.append(weights[:, :, -1, : self.tokens].float())


def _repeat_keys(key_BHTC: torch.Tensor, query_BHTC: torch.Tensor) -> torch.Tensor:
    """Repeat the keys so that each query head has its own."""
    heads = query_BHTC.shape[1]
    return key_BHTC if key_BHTC.shape[1] == heads else key_BHTC.repeat_interleave(heads // key_BHTC.shape[1], 1)


def banded_attention(
    query_BHTC: torch.Tensor,
    key_BHTC: torch.Tensor,
    lse_BHT: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    reach: int,
) -> torch.Tensor:
    """Compute the attention weights of each query on the `reach` keys before its own position.

    Args:
        query_BHTC: queries, (batch, heads, tokens, channels).
        key_BHTC: keys, with as many heads as the queries, or with fewer heads that several query heads share.
        lse_BHT: log-sum-exp of each query's scores over all keys.
        mask: the kernel's mask, (batch or 1, heads or 1, tokens, tokens): bool, or numbers that are added to the
            scores. None means causal attention.
        scale: factor of the scores.
        reach: number of keys before the query's own.

    Returns:
        Weights, float32, (batch, heads, tokens, reach).
    """
    batch, heads, tokens, _ = query_BHTC.shape
    key_BHTC = _repeat_keys(key_BHTC, query_BHTC)
    with float32_products("highest"), torch.autocast(query_BHTC.device.type, enabled=False):
        scores = _chunked_scores(query_BHTC, key_BHTC, reach)
    band = []
    for distance in range(1, reach + 1):
        score = scores.diagonal(reach - distance, -2, -1).reshape(batch, heads, -1)[..., :tokens] * scale
        if mask is not None:
            mask_band = functional.pad(mask.diagonal(-distance, -2, -1), (min(distance, tokens), 0))
            score = score.masked_fill(~mask_band, -torch.inf) if mask.dtype == torch.bool else score + mask_band
        weight = (score - lse_BHT).exp()
        weight[..., : min(distance, tokens)] = 0
        band.append(weight)
    return torch.stack(band, -1)


def _chunked_scores(query_BHTC: torch.Tensor, key_BHTC: torch.Tensor, reach: int) -> torch.Tensor:
    """Multiply chunks of queries with the keys near them.

    Returns:
        Scores, float32, (batch, heads, chunks, queries of a chunk, keys that start `reach` before the chunk's first
        query).
    """
    batch, heads, tokens, channels = query_BHTC.shape
    chunks = -(-tokens // _CHUNK)
    padding_length = chunks * _CHUNK - tokens
    # Each chunk needs only the keys from `reach` before its first query to its last query: a few small products.
    query = functional.pad(query_BHTC.float(), (0, 0, 0, padding_length)).view(batch, heads, chunks, _CHUNK, channels)
    keys = functional.pad(key_BHTC.float(), (0, 0, reach, padding_length)).unfold(2, _CHUNK + reach, _CHUNK)
    return torch.matmul(query, keys)
