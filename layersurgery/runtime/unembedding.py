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
from ..models.block_list import text_config, unwrap_transformers
from ..models.call_tracing import TOKENS, ModuleWrapper, random_like, replace_modules
from .block_runner import BlockRunner
from .float32_matmul import matmul, probability_times_weights
from .inputs import model_inputs

_HEAD_ROWS = 64
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
    def description(self) -> str:
        """How it reads, in words."""

    def normalize(self, stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """What is read, (tokens, width), of a stream (batch, length, width): `chosen` are numbers of positions in the flattened batch."""

    def logits_tile(self, x_TD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Logits of a slice of the vocabulary: float32, (tokens, stop - start)."""

    def mean_weight_row(self, p_TC: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """For affine readouts: sum_v p_v (d logit_v / d x) over a slice of the vocabulary, float32, (tokens, width)."""


@dataclass(frozen=True, slots=True)
class ModelHead:
    """The model's own forward, its blocks standing aside; all of the vocabulary at once, a few tokens at a time."""

    runner: BlockRunner
    vocabulary: int
    rows: int
    affine: bool = False
    description: str = "by the model's own forward, a few tokens at a time"

    def normalize(self, stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The stream itself."""
        return _at(stream, chosen)

    def logits_tile(self, x_TD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """All logits."""
        assert (start, stop) == (0, self.vocabulary)
        return head_logits(self.runner, x_TD[None])[0].float()

    def mean_weight_row(self, p_TC: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """There is none."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Unembedding:
    """A linear map of the normed stream, summed in float32, then a scale and a soft-cap: cap * tanh(logit / cap).

    The map's `weight` and `bias` are looked up each time: weights that are kept elsewhere are there only for a while.
    """

    runner: BlockRunner
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
    def description(self) -> str:
        """In words."""
        parts = [
            "unembedding with float32 sums",
            f"scale {self.scale:g}" if self.scale != 1 else "",
            f"soft-cap {self.cap:g}" if self.cap else "",
        ]
        return ", ".join(filter(None, parts)) + ", in tiles"

    def normalize(self, stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The normed stream, in the model's own dtype."""
        if self.own_norm:
            x = _at(_unembedded(self.runner, stream), chosen)
        else:
            x = _at(stream, chosen)
            x = x if self.norm is None else self.norm(x)
        return x.to(self.matrix.device)

    def logits_tile(self, x_TD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Logits of a slice of the vocabulary."""
        logits = matmul(x_TD, self.matrix[start:stop], None if self.bias is None else self.bias[start:stop], self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def mean_weight_row(self, p_TC: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The mean row of a slice of the unembedding, scaled."""
        sums = probability_times_weights(p_TC, self.matrix[start:stop])
        return sums if self.scale == 1 else sums.mul_(self.scale)


def _at(stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return stream.flatten(0, 1).index_select(0, chosen.to(stream.device))


class _Intercept(ModuleWrapper):
    """Stands for the unembedding: keeps what it was given, and returns something else."""

    def __init__(self, module: nn.Module, answer: torch.Tensor | None = None) -> None:
        super().__init__(module)
        self.answer = answer
        self.given: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given = x
        return x[..., :1] if self.answer is None else self.answer.to(x.device, x.dtype)


def find_readout(runner: BlockRunner, *, use_model_head: bool = False) -> Readout:
    """The fast readout where it is shown equal to the model's own tail on seven random tokens, else that tail itself.

    Args:
        runner: the model's blocks.
        own: take the model's own tail in any case.
    """
    with runner.inference_mode():
        probe = _probe(runner)
        logits = _checked(runner, probe)
        fast = None if use_model_head else _unembedding(runner, probe, logits)
    if fast is not None:
        return fast
    longest = getattr(text_config(runner.model), "max_position_embeddings", None)
    return ModelHead(runner, logits.shape[-1], min(_HEAD_ROWS, longest) if isinstance(longest, int) else _HEAD_ROWS)


def _checked(runner: BlockRunner, probe: torch.Tensor) -> torch.Tensor:
    """The model's own logits.

    Raises:
        UnsupportedEditError: it gives none for each token.
    """
    name = type(unwrap_transformers(runner.model)).__name__
    try:
        logits = head_logits(runner, probe)
    except AttributeError:  # an output without logits
        logits = None
    except RuntimeError as error:
        raise UnsupportedEditError(
            f"{name} cannot be run behind its blocks: {str(error).partition(chr(10))[0]}"
        ) from error
    if logits is None or logits.dim() != 3 or logits.shape[:2] != probe.shape[:2]:
        found = "none" if logits is None else f"a tensor of shape {tuple(logits.shape)} for {probe.shape[1]} tokens"
        raise UnsupportedEditError(
            f"{name} predicts no next tokens: as logits it gives {found}. Load the model as a causal language model (AutoModelForCausalLM)"
        )
    # Weights may be no numbers; that is found where the model itself is measured.
    some, same = (values.nan_to_num(0, 0, 0) for values in (head_logits(runner, probe[:, ::2]), logits[:, ::2]))
    if not _close(some, same, TOLERANCE.get(probe.dtype, 3e-2)):
        raise UnsupportedEditError(
            f"{name}: behind its blocks, what it predicts at one position depends on others, so it cannot be read token by token"
        )
    return logits


def head_logits(runner: BlockRunner, stream: torch.Tensor) -> torch.Tensor:
    """What the model makes of a residual stream (batch, length, width) behind its last block: (batch, length, vocabulary)."""
    ids = torch.full(stream.shape[:2], 1)  # any token: its embedding goes nowhere
    with runner.with_final_stream(stream):
        logits: torch.Tensor = runner.model(**model_inputs(runner.model, ids, torch.ones_like(ids))).logits
    return logits


def _probe(runner: BlockRunner) -> torch.Tensor:
    ids = torch.arange(TOKENS)[None] % 2
    last = runner.record(model_inputs(runner.model, ids, torch.ones_like(ids)), ()).states[runner.depth]
    return random_like(last, 5)


@contextmanager
def _intercept(runner: BlockRunner, answer: torch.Tensor | None = None) -> Iterator[_Intercept]:
    path = runner.anatomy.unembedding
    assert path is not None
    parent, _, name = path.rpartition(".")
    stand_in = _Intercept(runner.model.get_submodule(path), answer)
    with replace_modules([(runner.model.get_submodule(parent), name)], [stand_in]):
        yield stand_in


def _unembedded(runner: BlockRunner, stream: torch.Tensor) -> torch.Tensor:
    """What the model would give its unembedding."""
    with _intercept(runner) as stand_in:
        head_logits(runner, stream)
    assert stand_in.given is not None
    return stand_in.given


def _unembedding(runner: BlockRunner, probe: torch.Tensor, logits: torch.Tensor) -> Unembedding | None:
    """The fast readout, if the model's own logits can be had by it."""
    path = runner.anatomy.unembedding
    if path is None:
        return None
    module: Any = runner.model.get_submodule(path)
    matrix, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if (
        not isinstance(matrix, torch.Tensor)
        or matrix.is_meta
        or matrix.dim() != 2
        or matrix.shape[0] != logits.shape[-1]
    ):
        return None
    if not matrix.is_floating_point() or not (bias is None or isinstance(bias, torch.Tensor)):
        return None
    tolerance = TOLERANCE.get(matrix.dtype, 3e-2)
    with _intercept(runner) as stand_in:
        try:
            head_logits(runner, probe)
        except (RuntimeError, IndexError, ValueError):  # it needs all the vocabulary
            return None
    x = stand_in.given
    if x is None or x.shape[:2] != probe.shape[:2] or x.shape[-1] != matrix.shape[1]:
        return None
    # The same operation on the same numbers: equal to the last bit, or there is an adapter or something else in it.
    if not torch.equal(module(x), functional.linear(x, matrix, bias)):
        return None
    shape = _afterwards(runner, probe, matrix.shape[0], tolerance)
    if shape is None:
        return None
    norm = runner.model.get_submodule(runner.anatomy.final_norm) if runner.anatomy.final_norm else None
    plain = torch.equal(x, probe) or (norm is not None and torch.equal(x, norm(probe)))
    found = Unembedding(
        runner, None if torch.equal(x, probe) else norm if plain else None, module, *shape, own_norm=not plain
    )  # fmt: skip
    everything = torch.arange(probe.shape[1])
    return (
        found
        if _close(found.logits_tile(found.normalize(probe, everything), 0, found.vocabulary), logits[0], tolerance)
        else None
    )


def _afterwards(
    runner: BlockRunner, probe: torch.Tensor, vocabulary: int, tolerance: float
) -> tuple[float, float | None] | None:
    """Scale and soft-cap that the model applies behind its unembedding, tried on numbers of all sizes; None if it is another function."""
    sizes = 10.0 ** torch.arange(-3, TOKENS - 3)
    given = (torch.linspace(-1, 1, vocabulary)[None] * sizes[:, None])[None]
    with _intercept(runner, given) as stand_in:
        after = head_logits(runner, torch.zeros_like(probe))
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
