"""Compute logits from the residual stream: final norm, unembedding, then the model's scale and soft-cap.

There are two readouts. The model's own head works for every model. The fast readout multiplies with the unembedding's
weight, so that the vocabulary can be processed in tiles; it is used only if it was shown equal to the model's own head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from ..errors import UnsupportedEditError, is_out_of_memory
from ..models.block_list import text_config, unwrap_transformers
from ..models.call_tracing import TOKENS, ModuleWrapper, random_like, replace_modules
from ..models.numerics import relative_error, tolerance
from .block_runner import BlockRunner
from .float32_matmul import matmul, probability_times_weights
from .inputs import model_inputs

_HEAD_ROWS = 64


class Readout(Protocol):
    """Computes logits from a residual stream."""

    @property
    def vocabulary(self) -> int:
        """Return the number of logits for each token."""

    @property
    def affine(self) -> bool:
        """Return whether logits are an affine function of the output of `normalize`."""

    @property
    def tokens_at_once(self) -> int | None:
        """Return how many tokens are read at once; None if the vocabulary is read in tiles instead."""

    @property
    def description(self) -> str:
        """Describe the readout in words."""

    def normalize(self, stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the input of the unembedding, (tokens, width), at some positions of a stream.

        Args:
            stream: residual stream, (batch, length, width).
            chosen: positions as indices into the flattened batch, (tokens,).
        """

    def logits_tile(self, x_TD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the logits of a slice of the vocabulary, float32, (tokens, stop - start)."""

    def mean_weight_row(self, p_TC: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return sum_v p_v (d logit_v / d x) over a slice of the vocabulary, float32, (tokens, width).

        Only an affine readout has it.
        """


@dataclass(frozen=True, slots=True)
class ModelHead:
    """Readout by the model's own forward with its blocks skipped, a few tokens at a time over the whole vocabulary."""

    runner: BlockRunner
    vocabulary: int
    tokens_at_once: int
    affine: bool = False
    description: str = "by the model's own forward, a few tokens at a time"

    def normalize(self, stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the stream at the chosen positions, without a norm: the model's own forward applies it."""
        return _select_positions(stream, chosen)

    def logits_tile(self, x_TD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return all logits; the slice must be the whole vocabulary."""
        assert (start, stop) == (0, self.vocabulary)
        return head_logits(self.runner, x_TD[None])[0].float()

    def mean_weight_row(self, p_TC: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Raise NotImplementedError: this readout is not affine."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Unembedding:
    """Readout by a linear map of the normalized stream with float32 sums, then a scale and a soft-cap.

    The soft-cap is cap * tanh(logit / cap).

    Attributes:
        runner: the model's blocks.
        norm: the final norm; None if the unembedding reads the stream itself, or if `own_norm` is set.
        linear: the unembedding module. Its `weight` and `bias` are looked up at each use, because offloaded weights are
            loaded only for a while.
        scale: factor of the logits.
        cap: soft-cap of the logits; None without one.
        use_model_norm: take the input of the unembedding from the model's own forward, because no single module
            computes it.
        tokens_at_once: None, since the vocabulary is read in tiles.
    """

    runner: BlockRunner
    norm: nn.Module | None
    linear: Any
    scale: float = 1.0
    cap: float | None = None
    use_model_norm: bool = False
    tokens_at_once: int | None = None

    @property
    def matrix(self) -> torch.Tensor:
        """Return the unembedding matrix, (vocabulary, width)."""
        weight: torch.Tensor = self.linear.weight
        return weight.detach()

    @property
    def bias(self) -> torch.Tensor | None:
        """Return the unembedding's bias, (vocabulary,); None without one."""
        bias: torch.Tensor | None = self.linear.bias if hasattr(self.linear, "bias") else None
        return None if bias is None else bias.detach()

    @property
    def vocabulary(self) -> int:
        """Return the number of logits for each token."""
        return self.matrix.shape[0]

    @property
    def affine(self) -> bool:
        """Return whether logits are an affine function of what is read: true without a soft-cap."""
        return self.cap is None

    @property
    def description(self) -> str:
        """Describe the readout in words."""
        parts = [
            "unembedding with float32 sums",
            f"scale {self.scale:g}" if self.scale != 1 else "",
            f"soft-cap {self.cap:g}" if self.cap else "",
        ]
        return ", ".join(filter(None, parts)) + ", in tiles"

    def normalize(self, stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the normalized stream at the chosen positions, in the model's dtype, on the unembedding's device."""
        if self.use_model_norm:
            x = _select_positions(_unembedded(self.runner, stream), chosen)
        else:
            x = _select_positions(stream, chosen)
            x = x if self.norm is None else self.norm(x)
        return x.to(self.matrix.device)

    def logits_tile(self, x_TD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the logits of a slice of the vocabulary."""
        logits = matmul(x_TD, self.matrix[start:stop], None if self.bias is None else self.bias[start:stop], self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def mean_weight_row(self, p_TC: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the probability-weighted sum of a slice of the unembedding's rows, multiplied by the scale."""
        sums = probability_times_weights(p_TC, self.matrix[start:stop])
        return sums if self.scale == 1 else sums.mul_(self.scale)


def _select_positions(stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return stream.flatten(0, 1).index_select(0, chosen.to(stream.device))


class _Intercept(ModuleWrapper):
    """Wrapper of the unembedding that keeps its input and returns an answer, or a cheap placeholder, as logits."""

    _answer: torch.Tensor | None
    received: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.received = x
        return x[..., :1] if self._answer is None else self._answer.to(x.device, x.dtype)


def find_readout(runner: BlockRunner, *, use_model_head: bool = False) -> Readout:
    """Return the fast readout if it equals the model's own head on seven random tokens, else the model's own head.

    Args:
        runner: the model's blocks.
        use_model_head: return the model's own head in any case.

    Raises:
        UnsupportedEditError: the model does not return logits for each token, or its logits at one position depend on
            others.
    """
    with runner.inference_mode():
        probe = _probe(runner)
        logits = _check_head_logits(runner, probe)
        fast = None if use_model_head else _unembedding(runner, probe, logits)
    if fast is not None:
        return fast
    max_positions = getattr(text_config(runner.model), "max_position_embeddings", None)
    return ModelHead(
        runner, logits.shape[-1], min(_HEAD_ROWS, max_positions) if isinstance(max_positions, int) else _HEAD_ROWS
    )


def _check_head_logits(runner: BlockRunner, probe: torch.Tensor) -> torch.Tensor:
    """Return the logits of the model's own head after checking that they can be read token by token.

    Raises:
        UnsupportedEditError: the model does not return logits for each token, or its logits at one position depend on
            others.
    """
    name = type(unwrap_transformers(runner.model)).__name__
    try:
        logits = head_logits(runner, probe)
    except AttributeError:  # an output without logits
        logits = None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedEditError(
            f"{name}: the model's head cannot be run after its blocks: {str(error).partition(chr(10))[0]}"
        ) from error
    if logits is None or logits.dim() != 3 or logits.shape[:2] != probe.shape[:2]:
        result = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)} for {probe.shape[1]} tokens"
        raise UnsupportedEditError(
            f"{name} predicts no next tokens: it returns {result}. Load the model as a causal language model "
            "(AutoModelForCausalLM)"
        )
    # Weights may be NaN or infinite; the measurement of the unedited model reports that.
    partial, expected = (values.nan_to_num(0, 0, 0) for values in (head_logits(runner, probe[:, ::2]), logits[:, ::2]))
    if not relative_error(partial, expected) <= tolerance("readout", probe.dtype):
        raise UnsupportedEditError(
            f"{name}: after its last block, the logits at one position depend on other positions, so the model "
            "cannot be read token by token"
        )
    return logits


def head_logits(runner: BlockRunner, stream: torch.Tensor) -> torch.Tensor:
    """Compute logits, (batch, length, vocabulary), with the model's own head.

    Args:
        runner: the model's blocks.
        stream: residual stream after the last block, (batch, length, width).
    """
    ids = torch.full(stream.shape[:2], 1)  # any token: its embedding is not used
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
    intercept = _Intercept(runner.model.get_submodule(path), _answer=answer)
    with replace_modules([(runner.model.get_submodule(parent), name)], [intercept]):
        yield intercept


def _unembedded(runner: BlockRunner, stream: torch.Tensor) -> torch.Tensor:
    """Return the input of the model's unembedding for a final residual stream."""
    with _intercept(runner) as intercept:
        head_logits(runner, stream)
    assert intercept.received is not None
    return intercept.received


def unembedding_input(runner: BlockRunner, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Run a model on tokens without computing logits, and return the input of its unembedding.

    Gradients flow through it. Only a model whose readout is an `Unembedding` has one.

    Args:
        runner: the model's blocks.
        ids: token ids, (batch, length).
        mask: 1 for a token and 0 for padding, the same shape.

    Returns:
        (batch, length, width).
    """
    with _intercept(runner) as intercept:
        runner.model(**model_inputs(runner.model, ids, mask))
    assert intercept.received is not None
    return intercept.received


def _unembedding(runner: BlockRunner, probe: torch.Tensor, logits: torch.Tensor) -> Unembedding | None:
    """Return the fast readout if it gives the model's own logits, else None."""
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
    largest_error = tolerance("readout", matrix.dtype)
    with _intercept(runner) as intercept:
        try:
            head_logits(runner, probe)
        except (RuntimeError, IndexError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            return None  # the code after the unembedding needs the whole vocabulary
    x = intercept.received
    if x is None or x.shape[:2] != probe.shape[:2] or x.shape[-1] != matrix.shape[1]:
        return None
    # The same operation on the same numbers is equal to the last bit; if not, the module does more (an adapter, for
    # example).
    if not torch.equal(module(x), functional.linear(x, matrix, bias)):
        return None
    shape = _fit_scale_and_cap(runner, probe, matrix.shape[0], largest_error)
    if shape is None:
        return None
    norm = runner.model.get_submodule(runner.anatomy.final_norm) if runner.anatomy.final_norm else None
    plain = torch.equal(x, probe) or (norm is not None and torch.equal(x, norm(probe)))
    candidate = Unembedding(
        runner, None if torch.equal(x, probe) else norm if plain else None, module, *shape, use_model_norm=not plain
    )  # fmt: skip
    all_positions = torch.arange(probe.shape[1])
    read = candidate.logits_tile(candidate.normalize(probe, all_positions), 0, candidate.vocabulary)
    return candidate if relative_error(read, logits[0]) <= largest_error else None


def _fit_scale_and_cap(
    runner: BlockRunner, probe: torch.Tensor, vocabulary: int, largest_error: float
) -> tuple[float, float | None] | None:
    """Fit the scale and the soft-cap that the model applies after its unembedding.

    Numbers of all sizes are tried. Returns None if the model applies another function.
    """
    sizes = 10.0 ** torch.arange(-3, TOKENS - 3)
    logits = (torch.linspace(-1, 1, vocabulary)[None] * sizes[:, None])[None]
    with _intercept(runner, logits) as intercept:
        after = head_logits(runner, torch.zeros_like(probe))
    if intercept.received is None or after.shape != logits.shape:
        return None
    logits = logits.to(intercept.received.dtype).double()  # rounded as the model received it
    after = after.double().cpu()
    if not after.isfinite().all():
        return None
    # Least squares over the smallest numbers, where a soft-cap is still linear.
    x, y = logits[0, 0], after[0, 0]
    scale = float(x @ y / (x @ x))
    if scale == 0:
        return None
    if relative_error(after, scale * logits) <= largest_error:
        return scale, None
    cap = float(after.abs().max())
    return (scale, cap) if relative_error(after, cap * torch.tanh(scale * logits / cap)) <= largest_error else None
