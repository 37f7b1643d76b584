"""Score neurons from the weights alone, without text: prediction, suppression and partition neurons.

The output weights of a neuron have a cosine with every row of the unembedding. High kurtosis and positive skew mean
that the neuron raises a few tokens strongly: a prediction neuron. High kurtosis and negative skew mean that it lowers a
few tokens strongly: a suppression neuron. After Gurnee et al., Universal Neurons in GPT2 Language Models (arXiv
2401.12181).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cache

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..errors import PlanError, UnsupportedEditError
from ..metrics.cosine_moments import NEURON_TILE, moments, unit_rows
from ..models.anatomy import Anatomy
from ..models.anatomy import anatomy as find_anatomy
from ..models.block_list import find_decoder_blocks, unwrap_transformers
from ..models.weight_conventions import NormAffine, fit_norm, output_weight_rows
from ..plans.branch_edits import PickNeurons
from ..plans.plan import Plan
from ..registry import NEURON_KINDS
from ..runtime.block_runner import BlockRunner
from ..runtime.contributions import reads_are_mean_free
from .memory import free_memory

KURTOSIS, VARIANCE = 10.0, 0.005
PREDICTION, SUPPRESSION = "prediction", "suppression"
_ROWS, _SPARE = 4096, 1.5
OnLayer = Callable[[int, int], None]
"""Called after each block with the number of blocks done and the total."""


def neuron_scores(
    model: nn.Module, *, blocks: str | None = None, anatomy: Anatomy | None = None, progress: OnLayer | None = None
) -> pd.DataFrame:
    """Score every neuron by the cosines between its output weights and the unembedding.

    The final norm's scale is folded into the unembedding, and the unembedding's mean over the vocabulary is subtracted.
    If every norm subtracts the mean over channels (LayerNorm), this mean is also subtracted from unembedding and output
    weights. The scale of a norm after the MLP is folded into the output weights. The model is not changed. The weights
    of each block are loaded once, also if they are offloaded to disk.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        blocks: path of the list of blocks ("model.layers"), if it cannot be found automatically.
        anatomy: the model's anatomy; found if not given.
        progress: called after each block with the number of blocks done and the total.

    Returns:
        One row for each neuron: layer, weight (name of the parameter within the block), expert (for weights that stack
        several experts), neuron; mean, variance, skew and kurtosis of its cosines with the whole vocabulary (population
        moments; Pearson's kurtosis, 3 for a Gaussian); kind ("prediction": kurtosis > 10 and skew > 0; "suppression":
        kurtosis > 10 and skew < 0; otherwise empty) and partition (variance > 0.005). `frame.attrs["skipped"]` names
        the blocks without such neurons, with the reasons.

    Raises:
        UnsupportedEditError: no output weights of neurons are found, or no unembedding of the stream's width.
    """
    runner = BlockRunner(model, anatomy or find_anatomy(model, blocks=blocks))
    skipped: dict[str, str] = {}
    frames = []
    with runner.inference_mode():
        u_VD = unembedding(runner)
        for layer, name, tiles in output_rows(runner, skipped, progress=progress):
            moments_4N = torch.cat([moments(rows_ND, u_VD) for rows_ND in tiles], 1)
            frames.append(_frame(layer, name, runner.blocks[layer], moments_4N))
    if not frames:
        raise UnsupportedEditError(
            f"{type(model).__name__} has no neurons to score: {next(iter(skipped.values()), 'it has no blocks')}"
        )
    scores = pd.concat(frames, ignore_index=True).astype({"layer": "Int64", "expert": "Int64", "neuron": "Int64"})
    scores.attrs["skipped"] = skipped
    scores.attrs["depth"] = runner.depth
    return scores


def pick_neurons(
    scores: pd.DataFrame, block: int, kind: str, count: int | None = None, *, seed: int = 0, draw: int | None = None
) -> tuple[int, ...]:
    """Return neurons of a block by kind, those with the highest kurtosis first; or as many random ones of no kind.

    Args:
        scores: the table of `neuron_scores`.
        block: the block.
        kind: "prediction", "suppression" or "partition"; partition neurons are taken by their variance.
        count: number of neurons; all of the kind if not given.
        seed: seed of a random draw, which depends on the kind, the block and its number alone.
        draw: number of a random draw; None for the neurons of the kind.

    Returns:
        Their numbers, sorted; fewer than `count` if the block has no more, and none if it has too few neurons of no
        kind for a random draw.

    Raises:
        PlanError: the neurons are those of experts.
    """
    rows = scores[scores.layer == block]
    if rows.expert.notna().any():
        raise PlanError(
            f"the neurons of block {block} are those of experts, which cannot be turned off one by one; this needs a "
            "model without experts"
        )
    is_partition = rows.partition.astype(bool)
    of_kind = rows[is_partition if kind == "partition" else rows.kind == kind]
    order = of_kind.sort_values("variance" if kind == "partition" else "kurtosis", ascending=False, kind="stable")
    chosen = order.neuron.to_numpy(int)[:count]
    if draw is not None:
        others = rows.neuron[(rows.kind == "") & ~is_partition].to_numpy(int)
        if len(others) < len(chosen):
            return ()
        generator = np.random.default_rng([seed, NEURON_KINDS.index(kind), block, draw])
        chosen = generator.choice(others, len(chosen), replace=False)
    return tuple(sorted(map(int, chosen)))


def neuron_picker(model: nn.Module, *, blocks: str | None = None, seed: int = 0) -> PickNeurons:
    """Return a function that picks neurons by kind; it scores the model's neurons when it is first called.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        blocks: path of the list of blocks, if it cannot be found automatically.
        seed: seed of random neurons.
    """
    scored = cache(lambda: neuron_scores(model, blocks=blocks))

    def pick(block: int, kind: str, count: int | None, random: bool) -> tuple[int, ...]:
        return pick_neurons(scored(), block, kind, count, seed=seed, draw=0 if random else None)

    return pick


def resolve_neurons(plan: Plan | str, model: nn.Module, *, blocks: str | None = None, seed: int = 0) -> Plan:
    """Return a plan with the numbers of the neurons that it names by kind, such as "top 50 suppression".

    Prediction and suppression neurons are ranked by the kurtosis of the cosines between their output weights and the
    unembedding, partition neurons by the variance (see `analyses.neuron_scores`).

    Args:
        plan: the plan, or its text: "neurons-off top 50 suppression of 29", or with "random" before "top", as many
            random neurons of no kind.
        model: a transformers causal language model; it is not changed.
        blocks: path of the list of blocks, if it cannot be found automatically.
        seed: seed of random neurons.

    Raises:
        PlanError: no block has such a neuron, or the neurons are those of experts.
        UnsupportedEditError: no output weights of neurons are found.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> plan = ls.resolve_neurons("neurons-off top 2 prediction of 25:28", model)
        >>> len(plan) > 0
        True
    """
    plan = Plan.parse(plan) if isinstance(plan, str) else plan
    if not plan.needs_weights:
        return plan
    depth = len(find_decoder_blocks(model, blocks).blocks)
    return plan.resolved(depth, neuron_picker(model, blocks=blocks, seed=seed))


def unembedding(runner: BlockRunner, *, unit: bool = True) -> torch.Tensor:
    """Return the unembedding directions in the residual stream, (V, D), float32.

    The final norm's scale is folded in, the rows are centered, and they have length 1.

    Args:
        runner: the model's blocks.
        unit: scale the rows to length 1; if False, they keep their length.

    Raises:
        UnsupportedEditError: there is no matrix of the stream's width, or the norm before it cannot be folded.
    """
    model, anatomy = runner.model, runner.anatomy
    name = type(unwrap_transformers(model)).__name__
    matrix = None if anatomy.unembedding is None else getattr(model.get_submodule(anatomy.unembedding), "weight", None)
    if not isinstance(matrix, torch.Tensor) or matrix.dim() != 2 or matrix.shape[1] != runner.width:
        shape = "none" if not isinstance(matrix, torch.Tensor) else f"of shape {tuple(matrix.shape)}"
        raise UnsupportedEditError(
            f"{name}: neurons write to a stream of width {runner.width}, but the unembedding is {shape}, so cosines "
            "between them are not defined"
        )
    affine = _norm_affine(runner, anatomy.final_norm, matrix)
    # Use main memory if the device has no room for the matrix in addition to the model.
    device = matrix.device if _SPARE * matrix.numel() * 4 < free_memory(matrix.device) else torch.device("cpu")
    u_VD = torch.empty(matrix.shape, dtype=torch.float32, device=device)
    sums = torch.zeros(runner.width, dtype=torch.float64, device=device)
    for start in range(0, len(matrix), _ROWS):
        rows = matrix[start : start + _ROWS].detach().to(device).double() * affine.scale_D.to(device)
        rows = rows - rows.mean(-1, keepdim=True) if affine.subtracts_mean else rows
        u_VD[start : start + _ROWS] = rows
        sums += rows.sum(0)
    for start in range(0, len(matrix), _ROWS):
        rows = u_VD[start : start + _ROWS].double() - sums / len(matrix)
        u_VD[start : start + _ROWS] = unit_rows(rows) if unit else rows
    return u_VD


def output_rows(
    runner: BlockRunner,
    skipped: dict[str, str],
    *,
    layers: Collection[int] | None = None,
    progress: OnLayer | None = None,
) -> Iterator[tuple[int, str, Iterator[torch.Tensor]]]:
    """Yield the output weights of neurons: layer, name of the weight in the block, float32 tiles of (neurons, width).

    Norms of the MLP's output are folded in, and rows are centered if all norms that read the stream center it. The
    weights of a block are only loaded while its turn lasts.

    Args:
        runner: the model's blocks, in inference mode.
        skipped: receives the blocks without such weights, with the reasons.
        layers: the blocks to read; all if not given.
        progress: called after each block with the number of blocks done and the total.
    """
    center = reads_are_mean_free(runner)
    selected = range(runner.depth) if layers is None else sorted(layers)
    for done, layer in enumerate(selected, 1):
        block = runner.blocks[layer]
        runner.offloaded.load(block)
        try:
            for name, tiles in _block_output_rows(runner, layer, skipped):
                yield (
                    layer,
                    name,
                    (rows_ND - rows_ND.mean(-1, keepdim=True) if center else rows_ND for rows_ND in tiles),
                )
        finally:
            runner.offloaded.unload(block)
        if progress is not None:
            progress(done, len(selected))


def _norm_affine(runner: BlockRunner, path: str | None, like: torch.Tensor) -> NormAffine:
    if path is None:
        return NormAffine(
            torch.ones(runner.width, dtype=torch.float64),
            torch.zeros(runner.width, dtype=torch.float64),
            subtracts_mean=False,
        )
    norm = runner.model.get_submodule(path)
    reference = next((parameter for parameter in norm.parameters() if not parameter.is_meta), like)
    affine = fit_norm(norm, runner.width, reference.detach())
    if affine is None:
        raise UnsupportedEditError(
            f"{path} ({type(norm).__name__}) is neither a LayerNorm nor an RMSNorm, so it cannot be folded into the "
            "weights that read its output"
        )
    return affine


def _block_output_rows(
    runner: BlockRunner, layer: int, skipped: dict[str, str]
) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
    """Yield the output weights of the neurons of a block: name, and tiles of (neurons, width), float32."""
    block, parts = runner.blocks[layer], runner.anatomy.parts(layer)
    output_norms = [skip.path for skip in parts.mlp_skips if skip.path in parts.norms_after]
    names = [name for name in parts.outputs("mlp") if not name.endswith("bias")]
    if not names:
        skipped[f"neurons of block {layer}"] = parts.skip_error or (
            "the output weights of its MLP cannot be identified" if parts.mlp else "the block has no mlp"
        )
    for name in names:
        owner, _, key = name.rpartition(".")
        like = block.get_parameter(name)
        affines = [_norm_affine(runner, f"{runner.path}.{layer}.{path}", like) for path in output_norms]
        yield name, _scaled_tiles(block.get_submodule(owner), key, runner.width, affines)


def _scaled_tiles(module: nn.Module, key: str, width: int, affines: list[NormAffine]) -> Iterator[torch.Tensor]:
    for rows_ND in output_weight_rows(module, key, width, NEURON_TILE):
        rows_ND = rows_ND.float()
        for affine in affines:
            rows_ND = rows_ND - rows_ND.mean(-1, keepdim=True) if affine.subtracts_mean else rows_ND
            rows_ND = rows_ND * affine.scale_D.to(rows_ND.device, rows_ND.dtype)
        yield rows_ND


def _frame(layer: int, name: str, block: nn.Module, moments_4N: torch.Tensor) -> pd.DataFrame:
    mean, variance, skew, kurtosis = moments_4N.cpu().numpy()
    weight = block.get_parameter(name)
    experts = weight.shape[0] if weight.dim() == 3 else None
    neurons_per_expert = moments_4N.shape[1] // (experts or 1)
    indices = pd.RangeIndex(moments_4N.shape[1])
    frame = pd.DataFrame(
        {
            "layer": layer,
            "weight": name,
            "expert": None if experts is None else indices // neurons_per_expert,
            "neuron": indices % neurons_per_expert,
            "mean": mean,
            "variance": variance,
            "skew": skew,
            "kurtosis": kurtosis,
        }
    )
    high_kurtosis = frame["kurtosis"] > KURTOSIS
    frame["kind"] = ""
    frame.loc[high_kurtosis & (frame["skew"] > 0), "kind"] = PREDICTION
    frame.loc[high_kurtosis & (frame["skew"] < 0), "kind"] = SUPPRESSION
    frame["partition"] = frame.variance > VARIANCE
    return frame
