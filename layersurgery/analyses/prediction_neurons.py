"""Prediction and suppression neurons: what an MLP's output weights say to the vocabulary. Read off weights alone, no text is needed.

A neuron whose weights push a few words far up has cosines with the unembedding of high kurtosis and positive skew: it predicts. One that
pushes a few far down suppresses. After Gurnee et al., Universal Neurons in GPT2 Language Models (arXiv 2401.12181).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import pandas as pd
import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..metrics.cosine_moments import NEURON_TILE, moments, unit_rows
from ..models.anatomy import Anatomy
from ..models.anatomy import anatomy as find_anatomy
from ..models.block_list import unwrap_transformers
from ..models.weight_conventions import NormAffine, fit_norm, output_weight_rows
from ..runtime.block_runner import BlockRunner
from ..runtime.contributions import reads_are_mean_free
from ..sweeps.memory import free_memory

KURTOSIS, VARIANCE = 10.0, 0.005
PREDICTION, SUPPRESSION = "prediction", "suppression"
_ROWS, _SPARE = 4096, 1.5
OnLayer = Callable[[int, int], None]


def neuron_scores(
    model: nn.Module, *, blocks: str | None = None, anatomy: Anatomy | None = None, progress: OnLayer | None = None
) -> pd.DataFrame:
    """How the output weights of every neuron lie to the unembedding.

    The final norm's scale is folded into the unembedding, whose mean over the vocabulary is taken away; where every norm takes the mean
    over channels away (LayerNorm), so are the means over the width of unembedding and output weights. A norm behind the MLP scales what its
    neurons write. The model is not changed; each block's weights are looked at once, also where they are kept on disk.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        blocks: path of the list of blocks ("model.layers"), where it cannot be found.
        anatomy: the model's, found if not given.
        progress: is called after each block with the number of blocks done and of all.

    Returns:
        One row for each neuron: layer, weight (the parameter, within the block), expert (of weights that stack several), neuron, and of its
        cosines with the whole vocabulary mean, variance, skew and kurtosis (population moments; Pearson's kurtosis, 3 for a Gaussian);
        kind ("prediction": kurtosis > 10 and skew > 0; "suppression": kurtosis > 10 and skew < 0; else empty) and partition (variance >
        0.005). `frame.attrs["skipped"]` says which blocks have no such neurons, and why.

    Raises:
        UnsupportedEditError: no neuron's output weights, or no unembedding of the stream's width.
    """
    runner = BlockRunner(model, anatomy or find_anatomy(model, blocks=blocks))
    skipped: dict[str, str] = {}
    frames = []
    with runner.inference_mode():
        u_VD = unembedding(runner)
        for layer, name, parts in output_rows(runner, skipped, progress=progress):
            found = torch.cat([moments(rows_ND, u_VD) for rows_ND in parts], 1)
            frames.append(_frame(layer, name, runner.blocks[layer], found))
    if not frames:
        raise UnsupportedEditError(
            f"{type(model).__name__} has no neurons to look at: {next(iter(skipped.values()), 'it has no blocks')}"
        )
    found = pd.concat(frames, ignore_index=True).astype({"layer": "Int64", "expert": "Int64", "neuron": "Int64"})
    found.attrs["skipped"] = skipped
    found.attrs["depth"] = runner.depth
    return found


def neurons(
    model: nn.Module, *, blocks: str | None = None, anatomy: Anatomy | None = None, progress: OnLayer | None = None
) -> pd.DataFrame:
    """Prediction, suppression and partition neurons of each block, as in figures 1 and 6 of the paper.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        blocks: path of the list of blocks, where it cannot be found.
        anatomy: the model's, found if not given.
        progress: is called after each block with the number of blocks done and of all.

    Returns:
        One row for each block: layer, relative_depth, neurons, prediction, suppression, partition (numbers of neurons; of a mixture, all
        experts'), prediction_percent and suppression_percent of all neurons of the block. Blocks without an MLP have no numbers.

    Raises:
        UnsupportedEditError: no neuron's output weights, or no unembedding of the stream's width.

    Example:
        >>> neurons(model).plot("relative_depth", ["prediction_percent", "suppression_percent"])  # doctest: +SKIP
    """
    return neurons_per_block(
        neuron_scores(model, blocks=blocks, anatomy=anatomy, progress=progress), type(model).__name__
    )


def neurons_per_block(scores: pd.DataFrame, model: str) -> pd.DataFrame:
    """The table of `neurons`, from that of `neuron_scores`."""
    depth = scores.attrs["depth"]
    rows = []
    for layer in range(depth):
        mine = scores[scores.layer == layer]
        some = len(mine) > 0
        row = {"model": model, "layer": layer, "relative_depth": layer / max(1, depth - 1), "neurons": len(mine)}
        for kind in (PREDICTION, SUPPRESSION):
            row[kind] = int((mine.kind == kind).sum()) if some else None
        row["partition"] = int(mine.partition.sum()) if some else None
        for kind in (PREDICTION, SUPPRESSION):
            row[f"{kind}_percent"] = 100 * float((mine.kind == kind).mean()) if some else None
        rows.append(row)
    whole = dict.fromkeys(("layer", "neurons", PREDICTION, SUPPRESSION, "partition"), "Int64")
    frame = pd.DataFrame(rows).astype(whole | {f"{kind}_percent": "float64" for kind in (PREDICTION, SUPPRESSION)})
    frame.attrs["skipped"] = scores.attrs["skipped"]
    return frame


def unembedding(runner: BlockRunner, *, unit: bool = True) -> torch.Tensor:
    """The directions of the stream that words are read along: the final norm's scale folded in, centred, rows of length 1, float32, (V, D).

    Args:
        runner: the model's blocks.
        unit: scale rows to length 1; otherwise they keep their own.

    Raises:
        UnsupportedEditError: there is no matrix of the stream's width, or the norm before it is none that can be folded.
    """
    model, anatomy = runner.model, runner.anatomy
    name = type(unwrap_transformers(model)).__name__
    matrix = None if anatomy.unembedding is None else getattr(model.get_submodule(anatomy.unembedding), "weight", None)
    if not isinstance(matrix, torch.Tensor) or matrix.dim() != 2 or matrix.shape[1] != runner.width:
        found = "none" if not isinstance(matrix, torch.Tensor) else f"of shape {tuple(matrix.shape)}"
        raise UnsupportedEditError(
            f"{name}: neurons write a stream of width {runner.width}, and the unembedding is {found}, so they cannot be laid beside each other"
        )
    gain = _gain(runner, anatomy.final_norm, matrix)
    # Where a device has no room for it beside the model, main memory has.
    place = matrix.device if _SPARE * matrix.numel() * 4 < free_memory(matrix.device) else torch.device("cpu")
    u_VD = torch.empty(matrix.shape, dtype=torch.float32, device=place)
    sums = torch.zeros(runner.width, dtype=torch.float64, device=place)
    for start in range(0, len(matrix), _ROWS):
        rows = matrix[start : start + _ROWS].detach().to(place).double() * gain.scale_D.to(place)
        rows = rows - rows.mean(-1, keepdim=True) if gain.centres else rows
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
    """With which neurons write the stream: layer, weight (within the block), and some (neurons, width) after another, float32.

    Behind norms of the MLP's output, and centred where all that reads the stream centres it. A block's weights are there while it is its turn.

    Args:
        runner: the model's blocks, at rest.
        skipped: is told which blocks have none, and why.
        layers: the blocks to look at; all if not given.
        progress: is called after each block with the number of blocks done and of all.
    """
    centre = reads_are_mean_free(runner)
    wanted = range(runner.depth) if layers is None else sorted(layers)
    for done, layer in enumerate(wanted, 1):
        block = runner.blocks[layer]
        runner.offloaded.load(block)
        try:
            for name, parts in _written(runner, layer, skipped):
                yield (
                    layer,
                    name,
                    (rows_ND - rows_ND.mean(-1, keepdim=True) if centre else rows_ND for rows_ND in parts),
                )
        finally:
            runner.offloaded.unload(block)
        if progress is not None:
            progress(done, len(wanted))


def _gain(runner: BlockRunner, path: str | None, like: torch.Tensor) -> NormAffine:
    if path is None:
        return NormAffine(
            torch.ones(runner.width, dtype=torch.float64), torch.zeros(runner.width, dtype=torch.float64), centres=False
        )
    norm = runner.model.get_submodule(path)
    held = next((parameter for parameter in norm.parameters() if not parameter.is_meta), like)
    gain = fit_norm(norm, runner.width, held.detach())
    if gain is None:
        raise UnsupportedEditError(
            f"{path} ({type(norm).__name__}) is neither a LayerNorm nor an RMSNorm, so it cannot be folded into what reads it"
        )
    return gain


def _written(runner: BlockRunner, layer: int, skipped: dict[str, str]) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
    """Weights with which neurons of a block write the stream, by their names: some (neurons, width) after another, float32."""
    block, parts = runner.blocks[layer], runner.anatomy.parts(layer)
    behind = [skip.path for skip in parts.mlp_skips if skip.path in parts.norms_after]
    names = [name for name in parts.outputs("mlp") if not name.endswith("bias")]
    if not names:
        skipped[f"neurons of block {layer}"] = parts.fault or (
            "the weights with which its MLP writes cannot be told" if parts.mlp else "the block has no mlp"
        )
    for name in names:
        owner, _, key = name.rpartition(".")
        like = block.get_parameter(name)
        gains = [_gain(runner, f"{runner.path}.{layer}.{path}", like) for path in behind]
        yield name, _some(block.get_submodule(owner), key, runner.width, gains)


def _some(module: nn.Module, key: str, width: int, gains: list[NormAffine]) -> Iterator[torch.Tensor]:
    for rows_ND in output_weight_rows(module, key, width, NEURON_TILE):
        rows_ND = rows_ND.float()
        for gain in gains:
            rows_ND = rows_ND - rows_ND.mean(-1, keepdim=True) if gain.centres else rows_ND
            rows_ND = rows_ND * gain.scale_D.to(rows_ND.device, rows_ND.dtype)
        yield rows_ND


def _frame(layer: int, name: str, block: nn.Module, found: torch.Tensor) -> pd.DataFrame:
    mean, variance, skew, kurtosis = found.cpu().numpy()
    weight = block.get_parameter(name)
    experts = weight.shape[0] if weight.dim() == 3 else None
    each = found.shape[1] // (experts or 1)
    places = pd.RangeIndex(found.shape[1])
    frame = pd.DataFrame(
        {
            "layer": layer,
            "weight": name,
            "expert": None if experts is None else places // each,
            "neuron": places % each,
            "mean": mean,
            "variance": variance,
            "skew": skew,
            "kurtosis": kurtosis,
        }
    )
    sharp = frame["kurtosis"] > KURTOSIS
    frame["kind"] = ""
    frame.loc[sharp & (frame["skew"] > 0), "kind"] = PREDICTION
    frame.loc[sharp & (frame["skew"] < 0), "kind"] = SUPPRESSION
    frame["partition"] = frame.variance > VARIANCE
    return frame
