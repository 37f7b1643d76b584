"""From the residual stream to logits: final norm, unembedding, and what a model does to logits afterwards (scale, soft-cap).

Two ways. The model's own tail, run on any stream, works for every model. The fast one takes the unembedding's weight, so that the
vocabulary can be worked through in tiles; it is used where it was first shown equal to the model's own tail.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from ..errors import UnsupportedEditError
from ..models.block_list import text_config, transformers_part
from ..models.call_tracing import TOKENS, StandIn, noise, replaced
from .block_runner import Stack
from .float32_matmul import product, weighted
from .inputs import model_inputs

_OWN_ROWS = 64
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Readout(Protocol):
    """How streams become logits."""

    @property
    def vocabulary(self) -> int:
        """Number of logits."""

    @property
    def affine(self) -> bool:
        """Whether logits are an affine function of what `final` returns, with the slope `weight`."""

    @property
    def rows(self) -> int | None:
        """Tokens to read at once, with all of the vocabulary; None where the vocabulary is read in tiles."""

    @property
    def about(self) -> str:
        """How it reads, in words."""

    def final(self, stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """What is read, (tokens, width), of a stream (batch, length, width): `chosen` are numbers of positions in the flattened batch."""

    def tile(self, x_TD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Logits of a slice of the vocabulary: float32, (tokens, stop - start)."""

    def expected(self, p_TC: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """For affine readouts: sum_v p_v (d logit_v / d x) over a slice of the vocabulary, float32, (tokens, width)."""


@dataclass(frozen=True, slots=True)
class OwnTail:
    """The model's own forward, its blocks standing aside; all of the vocabulary at once, a few tokens at a time."""

    stack: Stack
    vocabulary: int
    rows: int
    affine: bool = False
    about: str = "by the model's own forward, a few tokens at a time"

    def final(self, stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The stream itself."""
        return _at(stream, chosen)

    def tile(self, x_TD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """All logits."""
        assert (start, stop) == (0, self.vocabulary)
        return own_logits(self.stack, x_TD[None])[0].float()

    def expected(self, p_TC: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """There is none."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Unembedding:
    """A linear map of the normed stream, summed in float32, then a scale and a soft-cap: cap * tanh(logit / cap).

    The map's `weight` and `bias` are looked up each time: weights that are kept elsewhere are there only for a while.
    """

    stack: Stack
    norm: nn.Module | None
    linear: Any
    scale: float = 1.0
    cap: float | None = None
    own_norm: bool = False
    rows: int | None = None

    @property
    def matrix(self) -> torch.Tensor:
        """(vocabulary, width)."""
        weight: torch.Tensor = self.linear.weight
        return weight.detach()

    @property
    def bias(self) -> torch.Tensor | None:
        """(vocabulary,)."""
        bias: torch.Tensor | None = self.linear.bias if hasattr(self.linear, "bias") else None
        return None if bias is None else bias.detach()

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.matrix.shape[0]

    @property
    def affine(self) -> bool:
        """Whether there is no soft-cap."""
        return self.cap is None

    @property
    def about(self) -> str:
        """In words."""
        parts = [
            "unembedding with float32 sums",
            f"scale {self.scale:g}" if self.scale != 1 else "",
            f"soft-cap {self.cap:g}" if self.cap else "",
        ]
        return ", ".join(filter(None, parts)) + ", in tiles"

    def final(self, stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The normed stream, in the model's own dtype."""
        if self.own_norm:
            x = _at(_unembedded(self.stack, stream), chosen)
        else:
            x = _at(stream, chosen)
            x = x if self.norm is None else self.norm(x)
        return x.to(self.matrix.device)

    def tile(self, x_TD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Logits of a slice of the vocabulary."""
        logits = product(x_TD, self.matrix[start:stop], None if self.bias is None else self.bias[start:stop], self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def expected(self, p_TC: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The mean row of a slice of the unembedding, scaled."""
        sums = weighted(p_TC, self.matrix[start:stop])
        return sums if self.scale == 1 else sums.mul_(self.scale)


def _at(stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return stream.flatten(0, 1).index_select(0, chosen.to(stream.device))


class _Aside(StandIn):
    """Stands for the unembedding: keeps what it was given, and returns something else."""

    def __init__(self, module: nn.Module, answer: torch.Tensor | None = None) -> None:
        super().__init__(module)
        self.answer = answer
        self.given: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given = x
        return x[..., :1] if self.answer is None else self.answer.to(x.device, x.dtype)


def find_readout(stack: Stack, *, own: bool = False) -> Readout:
    """The fast readout where it is shown equal to the model's own tail on seven random tokens, else that tail itself.

    Args:
        stack: the model's blocks.
        own: take the model's own tail in any case.
    """
    with stack.at_rest():
        probe = _probe(stack)
        logits = _checked(stack, probe)
        fast = None if own else _unembedding(stack, probe, logits)
    if fast is not None:
        return fast
    longest = getattr(text_config(stack.model), "max_position_embeddings", None)
    return OwnTail(stack, logits.shape[-1], min(_OWN_ROWS, longest) if isinstance(longest, int) else _OWN_ROWS)


def _checked(stack: Stack, probe: torch.Tensor) -> torch.Tensor:
    """The model's own logits.

    Raises:
        InexpressibleError: it gives none for each token.
    """
    name = type(transformers_part(stack.model)).__name__
    try:
        logits = own_logits(stack, probe)
    except AttributeError:  # an output without logits
        logits = None
    except RuntimeError as error:
        raise UnsupportedEditError(f"{name} cannot be run behind its blocks: {str(error).partition(chr(10))[0]}") from error
    if logits is None or logits.dim() != 3 or logits.shape[:2] != probe.shape[:2]:
        found = "none" if logits is None else f"a tensor of shape {tuple(logits.shape)} for {probe.shape[1]} tokens"
        raise UnsupportedEditError(
            f"{name} predicts no next tokens: as logits it gives {found}. Load the model as a causal language model (AutoModelForCausalLM)"
        )
    # Weights may be no numbers; that is found where the model itself is measured.
    some, same = (values.nan_to_num(0, 0, 0) for values in (own_logits(stack, probe[:, ::2]), logits[:, ::2]))
    if not _close(some, same, TOLERANCE.get(probe.dtype, 3e-2)):
        raise UnsupportedEditError(
            f"{name}: behind its blocks, what it predicts at one position depends on others, so it cannot be read token by token"
        )
    return logits


def own_logits(stack: Stack, stream: torch.Tensor) -> torch.Tensor:
    """What the model makes of a residual stream (batch, length, width) behind its last block: (batch, length, vocabulary)."""
    ids = torch.full(stream.shape[:2], 1)  # any token: its embedding goes nowhere
    with stack.ending(stream):
        logits: torch.Tensor = stack.model(**model_inputs(stack.model, ids, torch.ones_like(ids))).logits
    return logits


def _probe(stack: Stack) -> torch.Tensor:
    ids = torch.arange(TOKENS)[None] % 2
    last = stack.record(model_inputs(stack.model, ids, torch.ones_like(ids)), ()).states[stack.depth]
    return noise(last, 5)


@contextmanager
def _aside(stack: Stack, answer: torch.Tensor | None = None) -> Iterator[_Aside]:
    path = stack.anatomy.unembedding
    assert path is not None
    parent, _, name = path.rpartition(".")
    stand_in = _Aside(stack.model.get_submodule(path), answer)
    with replaced([(stack.model.get_submodule(parent), name)], [stand_in]):
        yield stand_in


def _unembedded(stack: Stack, stream: torch.Tensor) -> torch.Tensor:
    """What the model would give its unembedding."""
    with _aside(stack) as stand_in:
        own_logits(stack, stream)
    assert stand_in.given is not None
    return stand_in.given


def _unembedding(stack: Stack, probe: torch.Tensor, logits: torch.Tensor) -> Unembedding | None:
    """The fast readout, if the model's own logits can be had by it."""
    path = stack.anatomy.unembedding
    if path is None:
        return None
    module: Any = stack.model.get_submodule(path)
    matrix, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(matrix, torch.Tensor) or matrix.is_meta or matrix.dim() != 2 or matrix.shape[0] != logits.shape[-1]:
        return None
    if not matrix.is_floating_point() or not (bias is None or isinstance(bias, torch.Tensor)):
        return None
    tolerance = TOLERANCE.get(matrix.dtype, 3e-2)
    with _aside(stack) as stand_in:
        try:
            own_logits(stack, probe)
        except (RuntimeError, IndexError, ValueError):  # it needs all the vocabulary
            return None
    x = stand_in.given
    if x is None or x.shape[:2] != probe.shape[:2] or x.shape[-1] != matrix.shape[1]:
        return None
    # The same operation on the same numbers: equal to the last bit, or there is an adapter or something else in it.
    if not torch.equal(module(x), functional.linear(x, matrix, bias)):
        return None
    shape = _afterwards(stack, probe, matrix.shape[0], tolerance)
    if shape is None:
        return None
    norm = stack.model.get_submodule(stack.anatomy.final_norm) if stack.anatomy.final_norm else None
    plain = torch.equal(x, probe) or (norm is not None and torch.equal(x, norm(probe)))
    found = Unembedding(
        stack, None if torch.equal(x, probe) else norm if plain else None, module, *shape, own_norm=not plain
    )  # fmt: skip
    everything = torch.arange(probe.shape[1])
    return found if _close(found.tile(found.final(probe, everything), 0, found.vocabulary), logits[0], tolerance) else None


def _afterwards(stack: Stack, probe: torch.Tensor, vocabulary: int, tolerance: float) -> tuple[float, float | None] | None:
    """Scale and soft-cap that the model applies behind its unembedding, tried on numbers of all sizes; None if it is another function."""
    sizes = 10.0 ** torch.arange(-3, TOKENS - 3)
    given = (torch.linspace(-1, 1, vocabulary)[None] * sizes[:, None])[None]
    with _aside(stack, given) as stand_in:
        after = own_logits(stack, torch.zeros_like(probe))
    if stand_in.given is None or after.shape != given.shape:
        return None
    given = given.to(stand_in.given.dtype).double()  # as the model got it
    after = after.double().cpu()
    if not after.isfinite().all():
        return None
    # Least squares over the smallest numbers, where no soft-cap bends yet.
    x, y = given[0, 0], after[0, 0]
    scale = float(x @ y / (x @ x))
    if scale == 0:
        return None
    if _close(after, scale * given, tolerance):
        return scale, None
    cap = float(after.abs().max())
    return (scale, cap) if _close(after, cap * torch.tanh(scale * given / cap), tolerance) else None


def _close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Equal up to rounding, judged row by row by each row's largest value."""
    one, other = one.double().cpu(), other.double().cpu()
    if one.shape != other.shape:
        return False
    scale = other.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return bool(((one - other).abs() <= tolerance * scale).all())
