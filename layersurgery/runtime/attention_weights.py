"""How much of its attention a token pays to those before it, read off the attention kernel while the model runs.

The kernel that scaled_dot_product_attention chooses is given queries, keys and a mask, and tells the logarithm of each query's sum over all
keys. So the few weights that are wanted are worked out from queries and keys alone: tokens x tokens is never in memory, and what the
model computes stays what it was, for its own kernel computes it. Where a model makes its matrix of weights itself (eager attention), they
are read off that.
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
# Kernels, and where among their positional arguments the mask and the wish for the logarithm of sums are.
_KERNELS: dict[Any, tuple[int | None, int | None]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default: (None, None),
    _aten._scaled_dot_product_flash_attention.default: (None, None),
    _aten._scaled_dot_product_efficient_attention.default: (3, 4),
    _aten._scaled_dot_product_cudnn_attention.default: (3, 4),
}
_SOFTMAX = {_aten._softmax.default, _aten._safe_softmax.default}


class PreviousTokenAttention(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own
    """Inside, attention kernels are run as always, and what their queries give to the last `reach` keys is added up over heads.

    Args:
        tokens: of a sequence; a softmax over anything else is passed by.
        reach: how many tokens to look back.

    Attributes:
        weights_BTK: summed over heads, (batch, tokens, reach), float32: place k - 1 is the weight of the token k before; None before a
            kernel has run.
        heads: how many were added up.
        unknown: kernels that do not tell.
    """

    def __init__(self, tokens: int, reach: int = REACH) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens, self.reach = tokens, reach
        self.weights_BTK: torch.Tensor | None = None
        self.heads = 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KERNELS:
            return self._kernel(func, args, kwargs)
        if func in _SOFTMAX:
            output = func(*args, **kwargs)
            self._matrix(output)
            return output
        with self:  # in inference mode, functions come here before they are taken apart
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        if any(word in func.__name__ for word in ("attention", "attn")):
            self.unknown.add(func.__name__.partition(".")[0])
        return func(*args, **kwargs)

    def _kernel(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask_at, wish_at = _KERNELS[func]
        if wish_at is not None:
            args = (*args[:wish_at], True, *args[wish_at + 1 :])
        output = func(*args, **kwargs)
        query, key = args[:2]
        if query.shape[-2] == key.shape[-2] == self.tokens:
            mask = kwargs.get("attn_mask") if mask_at is None else args[mask_at]
            lse_BHT = output[1].flatten(2)[..., : self.tokens]
            scale = kwargs.get("scale")
            self._of_kernel(query, key, lse_BHT, mask, query.shape[-1] ** -0.5 if scale is None else scale)
        return output

    def _matrix(self, weights: torch.Tensor) -> None:
        """A softmax over (batch, heads, queries, keys); some have a column more, which takes up what no token gets."""
        if (
            weights.dim() < 3
            or weights.shape[-2] != self.tokens
            or weights.shape[-1] not in (self.tokens, self.tokens + 1)
        ):
            return
        self._of_matrix(weights if weights.dim() > 3 else weights[:, None])

    def _of_kernel(
        self,
        query_BHTC: torch.Tensor,
        key_BHTC: torch.Tensor,
        lse_BHT: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> None:
        self._add(banded_attention(query_BHTC, key_BHTC, lse_BHT, mask, scale, self.reach).sum(1), query_BHTC.shape[1])

    def _of_matrix(self, weights: torch.Tensor) -> None:
        band = [
            functional.pad(
                weights.diagonal(-back, -2, -1)[..., : max(0, self.tokens - back)], (min(back, self.tokens), 0)
            )
            for back in range(1, self.reach + 1)
        ]
        self._add(torch.stack(band, -1).float().sum(1), weights.shape[1])

    def _add(self, weights_BTK: torch.Tensor, heads: int) -> None:
        held = self.weights_BTK
        if held is not None and held.shape != weights_BTK.shape:
            # (batch * heads, tokens, tokens) beside (batch, heads, ...): not known to occur
            self.unknown.add("kernels of several shapes")
            return
        self.weights_BTK = weights_BTK if held is None else held + weights_BTK
        self.heads += heads


class LastTokenAttention(PreviousTokenAttention):  # type: ignore[no-untyped-call] # torch's own
    """The same, and it keeps what each head's last query gives to every key.

    Attributes:
        last_BHT: one after another, (batch, heads, tokens) or, where a kernel has them so, (batch * heads, 1, tokens); float32.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.last_BHT: list[torch.Tensor] = []

    def _of_kernel(
        self,
        query_BHTC: torch.Tensor,
        key_BHTC: torch.Tensor,
        lse_BHT: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> None:
        key_BHTC = _repeated(key_BHTC, query_BHTC)
        with float32_products("highest"), torch.autocast(query_BHTC.device.type, enabled=False):
            score = torch.matmul(query_BHTC[:, :, -1:].float(), key_BHTC.float().mT)[:, :, 0] * scale
        if mask is not None:
            given = mask[..., -1, :]
            score = score.masked_fill(~given, -torch.inf) if mask.dtype == torch.bool else score + given
        self.last_BHT.append((score - lse_BHT[..., -1:]).exp())

    def _of_matrix(self, weights: torch.Tensor) -> None:
        self.last_BHT.append(weights[:, :, -1, : self.tokens].float())


def _repeated(key_BHTC: torch.Tensor, query_BHTC: torch.Tensor) -> torch.Tensor:
    """Keys, one for each head of queries."""
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
    """Attention weights of each query on the `reach` keys before its own: float32, (batch, heads, tokens, reach).

    Args:
        query_BHTC: queries, (batch, heads, tokens, channels).
        key_BHTC: keys, of as many heads or of fewer that several share.
        lse_BHT: logarithm of each query's sum over all keys.
        mask: that the kernel was given, (batch or 1, heads or 1, tokens, tokens): of type bool, or added to scores. None: causal.
        scale: of scores.
        reach: how many keys.
    """
    batch, heads, tokens, _ = query_BHTC.shape
    key_BHTC = _repeated(key_BHTC, query_BHTC)
    with float32_products("highest"), torch.autocast(query_BHTC.device.type, enabled=False):
        scores = _near(query_BHTC, key_BHTC, reach)
    band = []
    for back in range(1, reach + 1):
        score = scores.diagonal(reach - back, -2, -1).reshape(batch, heads, -1)[..., :tokens] * scale
        if mask is not None:
            given = functional.pad(mask.diagonal(-back, -2, -1), (min(back, tokens), 0))
            score = score.masked_fill(~given, -torch.inf) if mask.dtype == torch.bool else score + given
        weight = (score - lse_BHT).exp()
        weight[..., : min(back, tokens)] = 0
        band.append(weight)
    return torch.stack(band, -1)


def _near(query_BHTC: torch.Tensor, key_BHTC: torch.Tensor, reach: int) -> torch.Tensor:
    """Scores of queries on keys near them: (batch, heads, chunks, queries of a chunk, keys from `reach` before its first)."""
    batch, heads, tokens, channels = query_BHTC.shape
    chunks = -(-tokens // _CHUNK)
    behind = chunks * _CHUNK - tokens
    # Chunks of queries against the keys from `reach` before their first to their last: a narrow band as a few small products.
    query = functional.pad(query_BHTC.float(), (0, 0, 0, behind)).view(batch, heads, chunks, _CHUNK, channels)
    keys = functional.pad(key_BHTC.float(), (0, 0, reach, behind)).unfold(2, _CHUNK + reach, _CHUNK)
    return torch.matmul(query, keys)
