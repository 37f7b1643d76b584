"""Fold norms into the weights that read them and center weights, without changing the function of the model.

The weights are then easier to interpret: the scale of a norm is part of the matrix that reads the norm, and directions
that no module reads are removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..models.anatomy import Anatomy
from ..models.anatomy import anatomy as find_anatomy
from ..models.block_list import require_model, text_config, unwrap_transformers
from ..models.block_probe import BlockProbe
from ..models.call_tracing import TOKENS, first_tensor
from ..models.numerics import relative_error, tolerance
from ..models.quantized import quantizer_name, quantizer_of
from ..models.weight_conventions import fit_norm, output_dim
from ..runtime.block_runner import BlockRunner
from ..runtime.contributions import reads_are_mean_free
from ..runtime.inputs import model_inputs
from ..runtime.unembedding import Unembedding, find_readout
from .fold_weights import WeightUndo, fold_into, reset_norm, subtract_mean


@dataclass(slots=True)
class FoldResult:
    """Result of `fold`.

    Attributes:
        folded: norms whose scale and shift were folded into the weights that read them.
        centered: weights from which a mean was subtracted.
        not_folded: norms and weights that could not be folded or centered, with the reason.
    """

    folded: list[str] = field(default_factory=list)
    centered: list[str] = field(default_factory=list)
    not_folded: dict[str, str] = field(default_factory=dict)


def fold(
    model: nn.Module, *, blocks: str | None = None, anatomy: Anatomy | None = None, unembedding: bool = True
) -> FoldResult:
    """Fold each norm's scale and shift into the weights that read it, and center weights, in place.

    The function of the model stays the same. The steps are those of appendix D of the paper and of TransformerLens:

    1. Norms before attention, before MLP and before the unembedding get scale 1 and shift 0. The weights that read them
       absorb the old scale and shift.
    2. Weights that read a LayerNorm lose their mean over the inputs.
    3. If only LayerNorms read the residual stream, the weights that write it (embeddings, output projections and their
       biases) lose their mean over the width.
    4. The unembedding loses its mean over the vocabulary. This shifts all logits of a token by the same number, and
       changes no probability.

    Each step is tested on random numbers. If it changes the output of a block, it is undone and reported. A tied
    unembedding is untied, also in the config. In half precision, weights are rounded again, so fold in float32.

    Args:
        model: a transformers causal language model that is completely in memory.
        blocks: path of the list of blocks ("model.layers"), if it cannot be found automatically.
        anatomy: anatomy of the model; found by default.
        unembedding: perform step 4.

    Returns:
        What was folded, what was centered, and what was not folded and why.

    Raises:
        PlanError: `model` is not a loaded model.
        UnsupportedEditError: weights are not in memory, or the parts of the model cannot be identified.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m", dtype="float32")
        >>> result = ls.fold(model)
        >>> result.folded[:2]
        ['model.layers.0.input_layernorm', 'model.layers.0.post_attention_layernorm']
    """
    require_model(model)
    if quantizer_of(model) is not None:
        raise UnsupportedEditError(
            f"the weights are quantized ({quantizer_name(model)}), so they cannot absorb a norm without being rounded "
            "again; load the model without quantization to fold it"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedEditError(
            "some weights are not in memory (offloaded to disk, for example); load the whole model into memory to "
            "fold it"
        )
    runner = BlockRunner(model, anatomy or find_anatomy(model, blocks=blocks))
    result = FoldResult()
    center_writers = reads_are_mean_free(runner)
    with runner.inference_mode():
        probes = runner.probes(seed=8)
        for number, probe in enumerate(probes):
            for norm in runner.anatomy.parts(number).norms_before:
                _fold_norm(probe, f"{runner.path}.{number}.", norm, result)
        _fold_final_norm(runner, result, unembedding=unembedding)
        if center_writers:
            _center_writers(runner, probes, result)
        else:
            result.not_folded["what writes the stream"] = (
                "an RMSNorm reads the mean over channels, so the mean cannot be subtracted"
            )
    return result


def _fold_norm(probe: BlockProbe, prefix: str, path: str, result: FoldResult) -> None:
    """Fold one norm of a block into the weights that read it, or undo that and record the reason."""
    block, width = probe.block, probe.stream.shape[-1]
    norm, name = block.get_submodule(path), f"{prefix}{path}"
    before = probe.added()
    affine = fit_norm(norm, width, before)
    if affine is None:
        result.not_folded[name] = f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm"
        return
    readers = _find_readers(probe, path)
    undo = WeightUndo()
    try:
        if not readers:
            raise UnsupportedEditError("no module reads it directly")
        for reader in readers:
            fold_into(
                block.get_submodule(reader), affine.scale_D, affine.shift_D, width, undo, center=affine.subtracts_mean
            )
        reset_norm(norm, affine.scale_D, undo)
        if not _is_close(probe.added(), before):
            raise UnsupportedEditError("other modules than these matrices read it")
    except UnsupportedEditError as error:
        undo.run()
        result.not_folded[name] = str(error)
        return
    if any(True for _ in norm.parameters()):
        result.folded.append(name)
    if affine.subtracts_mean:
        result.centered += [f"{prefix}{reader}" for reader in readers]


def _find_readers(probe: BlockProbe, norm: str) -> list[str]:
    """Find the modules that have weight matrices and whose first input is exactly the output of a norm."""
    paths = [
        name
        for name, module in probe.block.named_modules()
        if name and any(p.dim() > 1 for p in module._parameters.values() if p is not None)
    ]
    calls = probe.calls([norm, *paths], probe.block)
    outputs = [first_tensor(call.output) for call in calls if call.name == norm]
    readers = []
    for call in calls:
        inputs = [
            value
            for value in (*call.args, *call.kwargs.values())
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        ]
        if call.name != norm and any(
            output is not None and value.numel() == output.numel() and torch.equal(value.flatten(), output.flatten())
            for value in inputs[:1]
            for output in outputs
        ):
            readers.append(call.name)
    # A module that only passes the output to matrices inside it does not read the output itself.
    return [name for name in dict.fromkeys(readers) if not any(inner.startswith(f"{name}.") for inner in readers)]


def _fold_final_norm(runner: BlockRunner, result: FoldResult, *, unembedding: bool) -> None:
    """Fold the final norm into the unembedding, and center the unembedding."""
    model, path, head = runner.model, runner.anatomy.final_norm, runner.anatomy.unembedding
    readout = find_readout(runner)
    if head is None or path is None or not isinstance(readout, Unembedding) or readout.norm is None:
        result.not_folded[head or "unembedding"] = "the unembedding is not a plain matrix directly after the final norm"
        return
    module: Any = model.get_submodule(head)
    norm = model.get_submodule(path)
    ids = torch.arange(TOKENS)[None] % 2
    inputs = model_inputs(model, ids, torch.ones_like(ids))

    def run() -> torch.Tensor:
        logits: torch.Tensor = model(**inputs).logits
        return logits.log_softmax(-1)

    before = run()
    affine = fit_norm(norm, runner.width, module.weight.detach())
    undo = WeightUndo()
    try:
        if affine is None:
            raise UnsupportedEditError(f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm")
        _untie(model, module, undo)
        fold_into(module, affine.scale_D, affine.shift_D, runner.width, undo, center=affine.subtracts_mean)
        reset_norm(norm, affine.scale_D, undo)
        if unembedding and readout.cap is None:
            for name in ("weight", "bias"):
                if isinstance(getattr(module, name, None), torch.Tensor):
                    parameter = undo.keep(module, name)
                    parameter.copy_(parameter.double() - parameter.double().mean(0))
        if not _is_close(run(), before):
            raise UnsupportedEditError("other modules than the unembedding read it")
    except UnsupportedEditError as error:
        undo.run()
        result.not_folded[path] = str(error)
        return
    result.folded.append(path)
    if unembedding and readout.cap is not None:
        result.not_folded[f"mean of {head} over the vocabulary"] = (
            "the soft-cap after it does not preserve a shift common to all logits"
        )
    elif affine.subtracts_mean or unembedding:
        result.centered.append(head)


def _untie(model: nn.Module, head: Any, undo: WeightUndo) -> None:
    """Give a tied unembedding its own weight, and set the config accordingly."""
    inner: Any = unwrap_transformers(model)
    embedding = inner.get_input_embeddings()
    if embedding.weight is not head.weight:
        return
    undo.set_parameter(
        head, "weight", nn.Parameter(head.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
    )
    for config in {id(config): config for config in (inner.config, text_config(model))}.values():
        if getattr(config, "tie_word_embeddings", False):
            undo.add_step(lambda config=config: setattr(config, "tie_word_embeddings", True))  # type: ignore[misc]
            config.tie_word_embeddings = False


def _center_writers(runner: BlockRunner, probes: Sequence[BlockProbe], result: FoldResult) -> None:
    """Subtract the mean over the width from all weights that write the residual stream."""
    model = runner.model
    inside = {id(module) for block in runner.blocks for module in block.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and id(module) not in inside and module.weight.shape[1] == runner.width:
            subtract_mean(module, "weight", 1)
            result.centered.append(f"{name}.weight")
    for number, probe in enumerate(probes):
        block, parts = runner.blocks[number], runner.anatomy.parts(number)
        names = [*parts.outputs("attention"), *parts.outputs("mlp")]
        if (
            parts.skip_error
            or not names
            or any(not skip.savable for skip in (*parts.attention_skips, *parts.mlp_skips))
        ):
            result.not_folded[f"what block {number} writes"] = (
                parts.skip_error or "cannot determine which weights write the stream"
            )
            continue
        before = probe.added()
        undo = WeightUndo()
        for path in names:
            owner, _, key = path.rpartition(".")
            module = block.get_submodule(owner)
            undo.keep(module, key)
            weight = block.get_parameter(path)
            bias = weight.dim() == 1 or key.endswith("bias")
            subtract_mean(module, key, weight.dim() - 1 if bias else output_dim(module, key, runner.width))
        if _is_close(probe.added(), before - before.mean(-1, keepdim=True)):
            result.centered += [f"{runner.path}.{number}.{path}" for path in names]
        else:
            undo.run()
            result.not_folded[f"what block {number} writes"] = (
                "centering these weights does not center the output of the block"
            )


def _is_close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Check whether two outputs are equal up to the rounding of the changed weights."""
    # Relative to the largest value of all rows: a norm may compute in float32 though the model is in float64.
    return relative_error(actual.flatten(), expected.flatten()) <= tolerance("fold", expected.dtype)
