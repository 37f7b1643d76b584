"""Compute the distillation loss of a student from its teacher; a tokens x vocabulary tensor never exists.

The logits of both models, and the gradient with respect to the student's, exist for a few tokens at a time, also in the
backward pass: the gradient of the loss is known when the logits are, so it is reduced to the width of the stream at
once.

Suffixes of names give shapes: T tokens, D width of the readout's input, V vocabulary, C the tokens of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnsupportedEditError
from ..metrics.tiled import tile_elements
from ..models.block_list import unwrap_transformers
from ..runtime.block_runner import BlockRunner
from ..runtime.float32_matmul import probability_times_weights
from ..runtime.inputs import has_next_token
from ..runtime.unembedding import Unembedding, find_readout, unembedding_input


def find_trainable_readout(runner: BlockRunner) -> Unembedding:
    """Return the readout of a model whose logits are a linear map of the stream, with a scale and a soft-cap.

    Raises:
        UnsupportedEditError: the model computes its logits in another way.
    """
    readout = find_readout(runner)
    if not isinstance(readout, Unembedding):
        raise UnsupportedEditError(
            f"{type(unwrap_transformers(runner.model)).__name__}: the logits are not a linear map of the stream with a "
            "scale and a soft-cap (or the unembedding is quantized or offloaded), so their gradient is not known here; "
            "train this model with another program"
        )
    return readout


@dataclass(frozen=True, slots=True)
class ReadTokens:
    """Hold what predicts the next tokens of some sequences: the unembedding's input, and the true next tokens.

    Attributes:
        x_TD: input of the unembedding, at the positions that have a next token.
        target_T: the next tokens.
    """

    x_TD: torch.Tensor
    target_T: torch.Tensor


def read_tokens(readout: Unembedding, ids: torch.Tensor, mask: torch.Tensor) -> ReadTokens:
    """Run a model up to its unembedding, on all positions that have a next token in their sequence.

    Args:
        readout: the model's readout.
        ids: token ids, (sequences, length).
        mask: 1 for a token and 0 for padding, the same shape.
    """
    x = unembedding_input(readout.runner, ids, mask)
    chosen = has_next_token(mask).flatten().nonzero()[:, 0]
    x_TD = x[:, :-1].flatten(0, 1).index_select(0, chosen.to(x.device)).to(readout.matrix.device)
    return ReadTokens(x_TD, ids[:, 1:].flatten()[chosen].to(x_TD.device))


def distillation_loss(
    student: Unembedding, read: ReadTokens, teacher: Unembedding, teacher_read: ReadTokens, loss_weight: float
) -> torch.Tensor:
    """Compute the sum over tokens of (1 - w) KL(teacher || student) + w cross-entropy with the true token, in nats.

    Gradients flow into the student's stream, and into its unembedding if that is trained.

    Args:
        student: the student's readout.
        read: the student's stream, and the true tokens.
        teacher: the teacher's readout.
        teacher_read: the teacher's stream at the same positions.
        loss_weight: w, from 0 to 1.
    """
    weight, bias = student.linear.weight, getattr(student.linear, "bias", None)
    total: torch.Tensor = _Distillation.apply(
        read.x_TD, weight, bias, read.target_T, student, teacher, teacher_read.x_TD, loss_weight
    )
    return total


class _Distillation(torch.autograd.Function):
    """Sum the loss and its gradients over chunks of tokens, in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_T: torch.Tensor,
        student: Unembedding,
        teacher: Unembedding,
        teacher_TD: torch.Tensor,
        loss_weight: float,
    ) -> torch.Tensor:
        # Autocast would round the products, and the sums over the vocabulary need every digit.
        with torch.autocast(x_TD.device.type, enabled=False):
            gradients = _Gradients.like(x_TD, weight_VD, bias_V, ctx.needs_input_grad)
            total = x_TD.new_zeros((), dtype=torch.float64)
            step = max(1, tile_elements(x_TD.device) // student.vocabulary)
            for start in range(0, len(x_TD), step):
                rows = slice(start, start + step)
                p_CV = teacher.logits_tile(teacher_TD[rows], 0, teacher.vocabulary).log_softmax(-1)
                z_CV = student.logits_tile(x_TD[rows].detach(), 0, student.vocabulary)
                slope_CV = None if student.cap is None else 1 - (z_CV / student.cap).square_()
                q_CV = z_CV.log_softmax(-1)
                probability_CV, target_C1 = p_CV.exp(), target_T[rows, None]
                # A token that the teacher excludes (minus infinity) adds nothing.
                terms_CV = torch.where(probability_CV == 0, 0.0, probability_CV * (p_CV - q_CV))
                total += (1 - loss_weight) * terms_CV.sum(-1).double().sum()
                if loss_weight:
                    total -= loss_weight * q_CV.gather(-1, target_C1).double().sum()
                del terms_CV, p_CV
                slope = q_CV.exp_().sub_(probability_CV.mul_(1 - loss_weight))
                slope.scatter_add_(-1, target_C1, slope.new_full(target_C1.shape, -loss_weight))
                if slope_CV is not None:
                    slope.mul_(slope_CV)
                gradients.add(rows, slope.mul_(student.scale), x_TD[rows].detach(), student)
        ctx.save_for_backward(gradients.x_TD, gradients.weight_VD, gradients.bias_V)
        ctx.dtypes = x_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [factor] = grad_outputs
        scaled = (
            None if gradient is None else (gradient * factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None, None)


@dataclass(slots=True)
class _Gradients:
    """Sum the gradients with respect to the stream, the unembedding and its bias, in float32; None if not needed."""

    x_TD: torch.Tensor | None
    weight_VD: torch.Tensor | None
    bias_V: torch.Tensor | None

    @classmethod
    def like(
        cls, x_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, needed: tuple[bool, ...]
    ) -> _Gradients:
        return cls(
            *(
                torch.zeros_like(value, dtype=torch.float32) if value is not None and is_needed else None
                for value, is_needed in zip((x_TD, weight_VD, bias_V), needed, strict=False)
            )
        )

    def add(self, rows: slice, slope_CV: torch.Tensor, x_CD: torch.Tensor, student: Unembedding) -> None:
        """Add some tokens, given the gradient with respect to x W^T + bias."""
        if self.x_TD is not None:
            self.x_TD[rows] = probability_times_weights(slope_CV, student.matrix)
        if self.weight_VD is not None:
            self.weight_VD.addmm_(slope_CV.T, x_CD.float())
        if self.bias_V is not None:
            self.bias_V += slope_CV.sum(0)


@torch.no_grad()
def held_out_sums(
    student: Unembedding, teacher: Unembedding, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[float, float, float, int]:
    """Return sums over the tokens of some sequences: KL, the student's loss, the teacher's loss, and how many.

    Args:
        student: the student's readout.
        teacher: the teacher's readout.
        ids: token ids, (sequences, length).
        mask: 1 for a token and 0 for padding, the same shape.
    """
    read, teacher_read = read_tokens(student, ids, mask), read_tokens(teacher, ids, mask)
    kl = loss = teacher_loss = 0.0
    step = max(1, tile_elements(read.x_TD.device) // student.vocabulary)
    for start in range(0, len(read.target_T), step):
        rows = slice(start, start + step)
        # Each with its own unembedding: that of the student may have been trained.
        p_CV = teacher.logits_tile(teacher_read.x_TD[rows], 0, teacher.vocabulary).log_softmax(-1)
        q_CV = student.logits_tile(read.x_TD[rows], 0, student.vocabulary).log_softmax(-1)
        target_C1, probability_CV = read.target_T[rows, None], p_CV.exp()
        teacher_loss -= float(p_CV.gather(-1, target_C1).double().sum())
        loss -= float(q_CV.gather(-1, target_C1).double().sum())
        terms_CV = torch.where(probability_CV == 0, 0.0, probability_CV * p_CV.sub_(q_CV))
        kl += float(terms_CV.sum(-1).double().sum())
    return kl, loss, teacher_loss, len(read.target_T)
