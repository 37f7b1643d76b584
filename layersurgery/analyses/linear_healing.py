"""Heal a model from which blocks were removed, without training: fold a linear map into the block before each cut.

The map is fitted by least squares so that the stream behind the cut is what the removed blocks would have left
(ReplaceMe, arXiv 2505.02819). It multiplies what the MLP of the block before the cut adds to the stream, so it is
folded into that MLP's output projection: the model has no new tensor, and no other file format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..checkpoints.edit_checkpoint import EditResult
from ..errors import PlanError, UnsupportedEditError
from ..metrics.reference import METRICS
from ..models.anatomy import Anatomy
from ..models.anatomy import anatomy as find_anatomy
from ..models.block_list import find_decoder_blocks
from ..models.block_view import share_parameters
from ..models.call_tracing import eval_no_grad
from ..models.output_maps import OutputMap, find_output_maps
from ..models.weight_change import install_changes
from ..plans.plan import Plan
from ..plans.route import Route
from ..runtime.block_runner import BlockRunner, ForwardRecord
from ..runtime.contributions import BlockContributions, capture_contributions, find_contributions
from ..runtime.inputs import model_inputs
from ..surgery.operate import as_route, operate, operate_
from ..sweeps.compare import compare_tokens

if TYPE_CHECKING:
    from ..runs.text import TokenizedText

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties to choose from, relative to the mean second moment of what the MLP adds."""
_EVALUATED, _CHOOSING = 5, 5
_BATCH_TOKENS = 1024
_LEAST_SEQUENCES = 10


@dataclass(frozen=True, slots=True)
class Cut:
    """Hold a place where blocks were removed.

    Attributes:
        position: position, in the edited model, of the block before the cut.
        block: number of that block in the unedited model.
        removed: the blocks that were removed behind it.
    """

    position: int
    block: int
    removed: range


@dataclass(frozen=True, slots=True)
class LinearHealing:
    """Hold the linear maps that heal the cuts of an edited model.

    Attributes:
        plan: the edits that remove blocks.
        maps: for each position of the edited model with a map, the changes of the block's parameters.
        cuts: one row for each cut: block (before the cut), removed, ridge (infinite if no map helps), and the relative
            error of the stream behind the cut, before and after healing, on text that chose the ridge.
        costs: the metrics of the unedited, the edited and the healed model, with standard errors over sequences, on
            text that neither the fit nor the choice of the ridge has seen.
        written: the healed checkpoint, if one was written.
    """

    plan: Plan
    maps: Mapping[int, tuple[OutputMap, ...]] = field(compare=False)
    cuts: pd.DataFrame = field(compare=False)
    costs: pd.DataFrame = field(compare=False)
    written: EditResult | None = None

    @contextmanager
    def operate(self, model: nn.Module, *, anatomy: Anatomy | None = None) -> Iterator[nn.Module]:
        """Remove the blocks and heal the model inside a `with` block, as `layersurgery.operate` does."""
        with operate(model, self.plan, anatomy=anatomy), _healed(model, self.maps):
            yield model

    def operate_(self, model: nn.Module, **options: Any) -> nn.Module:
        """Remove the blocks and heal the model permanently, as `layersurgery.operate_` does.

        Args:
            model: the unedited model.
            options: as for `operate_`.
        """
        operate_(model, self.plan, **options)
        blocks = find_decoder_blocks(model, options.get("blocks")).blocks
        for position, maps in self.maps.items():
            install_changes(blocks[position], maps)
        return model


def fit_linear_healing(
    model: nn.Module,
    plan: Plan | Route | str,
    text: TokenizedText,
    *,
    batch_size: int | None = None,
    blocks: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> LinearHealing:
    """Fit the linear maps that heal the cuts of an edited model, and measure the model with and without them.

    The last fifth of the sequences is only measured. Of the others, every fifth chooses the ridge; the rest is fitted.

    Args:
        model: the unedited model; it is not changed.
        plan: the edits that remove blocks. The blocks that stay keep their order.
        text: the tokens, at least ten sequences.
        batch_size: number of sequences in a batch; by default as many as have about 1,024 tokens, and one where all
            logits are in memory.
        blocks: path of the list of blocks, if it cannot be found automatically.
        progress: called with what is done, how many sequences are done, and how many there are.

    Raises:
        PlanError: too little text, or a plan that removes nothing.
        UnsupportedEditError: blocks are moved or repeated, or the map cannot be folded into a block's weights.
    """
    known = find_anatomy(model, blocks=blocks)
    runner = BlockRunner(model, known)
    route = as_route(plan, runner.depth)
    cuts = find_cuts(route, runner.depth)
    sequences = len(text.ids)
    if sequences < _LEAST_SEQUENCES:
        raise PlanError(
            f"healing needs at least {_LEAST_SEQUENCES} sequences of text to fit, to choose and to measure, and there "
            f"are {sequences}; give more text (`tokens`) or shorter sequences (`context`)"
        )
    seen = sequences - sequences // _EVALUATED
    fit = _Fit(runner, route, text, seen, batch_size or max(1, _BATCH_TOKENS // text.ids.shape[1]))
    rows, maps = [], {}
    for number, cut in enumerate(cuts, 1):
        what = f"healing cut {number} of {len(cuts)}"
        chosen = fit.heal(cut, None if progress is None else partial(progress, what))
        rows.append({"block": cut.block, "removed": _span(cut.removed), **chosen.row})
        if chosen.maps:
            maps[cut.position] = chosen.maps
    table = pd.DataFrame(rows)
    healing = LinearHealing(_as_plan(plan, route), maps, table, pd.DataFrame())
    costs = _costs(model, healing, text, seen, batch_size or 1, known, progress)
    return replace(healing, costs=costs)


def find_cuts(route: Route, depth: int) -> list[Cut]:
    """Return the places where a route leaves out blocks.

    Raises:
        PlanError: it leaves out none behind its first block.
        UnsupportedEditError: it moves or repeats blocks, or the block before a cut has no MLP to fold a map into.
    """
    if any(first.block >= second.block for first, second in pairwise(route)):
        raise UnsupportedEditError(
            f"healing folds a map into a block's own weights, so each block that stays must run once and in order, and "
            f"the route is {route}. A result of other edits can be trained instead (layersurgery heal, ls.heal)"
        )
    cuts = []
    for position, visit in enumerate(route):
        following = route[position + 1].block if position + 1 < len(route) else depth
        if following == visit.block + 1:
            continue
        if visit.mlp is not True or visit.neurons_off:
            raise UnsupportedEditError(
                f"the MLP of block {visit.block}, before a cut, is changed by the plan ({visit}), so no map is folded "
                "into it; leave the cut or the change out, or train the result (layersurgery heal, ls.heal)"
            )
        cuts.append(Cut(position, visit.block, range(visit.block + 1, following)))
    if not cuts:
        raise PlanError(f"nothing to heal: the route {route} leaves out no block behind the first one that runs")
    return cuts


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Hold the map of one cut, and its row in the table."""

    maps: tuple[OutputMap, ...]
    row: dict[str, float]


class _Moments:
    """Sum weighted second moments, in float64, of what an MLP adds (M) and of what is missing behind it (R)."""

    def __init__(self, width: int) -> None:
        self.mm = torch.zeros(width, width, dtype=torch.float64)
        self.mr = torch.zeros(width, width, dtype=torch.float64)
        self.rr = self.total = 0.0

    def add(self, added_TD: torch.Tensor, missing_TD: torch.Tensor, target_TD: torch.Tensor) -> None:
        """Add tokens, each weighted by the inverse square of the norm of its target."""
        added, missing, target = (part.double() for part in (added_TD, missing_TD, target_TD))
        weight = 1 / target.square().sum(-1, keepdim=True).clamp_min(1e-30)
        weighted = added * weight
        self.mm += (weighted.T @ added).cpu()
        self.mr += (weighted.T @ missing).cpu()
        self.rr += float((missing.square() * weight).sum())
        self.total += len(target)

    def solve(self, ridge: float) -> torch.Tensor:
        """Return the map that minimizes the weighted error, with a penalty on its distance from no change."""
        size = ridge * self.mm.diagonal().mean().clamp_min(1e-30)
        matrix = self.mm + size * torch.eye(len(self.mm), dtype=torch.float64)
        solution: torch.Tensor = torch.linalg.solve(matrix, self.mr)
        return solution

    def error(self, delta: torch.Tensor | None) -> float:
        """Return the relative error of the stream, the root of the mean over tokens of its square."""
        if delta is None:
            squares = self.rr
        else:
            squares = self.rr - 2 * float((delta * self.mr).sum()) + float((delta * (self.mm @ delta)).sum())
        return float(np.sqrt(max(squares, 0.0) / self.total))


class _Fit:
    """Fit one cut after another; the stream before a cut is that of the model with the earlier cuts healed."""

    def __init__(self, runner: BlockRunner, route: Route, text: TokenizedText, seen: int, batch_size: int) -> None:
        self.runner, self.route, self.text, self.seen, self.batch_size = runner, route, text, seen, batch_size
        self.contributions = find_contributions(runner, check_attention=False)
        self.healed: dict[int, nn.Module] = {}

    def heal(self, cut: Cut, progress: Callable[[int, int], None] | None) -> _Chosen:
        """Fit the map of a cut."""
        runner = self.runner
        contributions = self.contributions[cut.block]
        if contributions.error or not contributions.has("mlp"):
            raise UnsupportedEditError(
                f"block {cut.block} cannot be healed: {contributions.error or 'what its MLP adds cannot be captured'}"
            )
        with runner.inference_mode():
            probe = runner.probes(seed=9)[cut.block]
            name = f"block {cut.block} ({type(probe.block).__name__})"
            # Refuse before hours of fitting; the map itself does not matter yet.
            width = runner.width
            find_output_maps(probe, runner.anatomy.parts(cut.block), name, torch.zeros(width, width).double())
            fitted, choosing = _Moments(width), _Moments(width)
            for first in range(0, self.seen, self.batch_size):
                span = slice(first, min(first + self.batch_size, self.seen))
                for number, tokens in enumerate(self._tokens(cut, contributions, span), first):
                    (choosing if number % _CHOOSING == _CHOOSING - 1 else fitted).add(*tokens)
                if progress is not None:
                    progress(span.stop, self.seen)
            deltas = [(ridge, fitted.solve(ridge)) for ridge in RIDGES]
            before = choosing.error(None)
            after, ridge, delta = min(
                ((choosing.error(delta), ridge, delta) for ridge, delta in deltas), key=lambda item: item[0]
            )
            maps: tuple[OutputMap, ...] = ()
            if after < before:
                maps = find_output_maps(probe, runner.anatomy.parts(cut.block), name, delta)
                view = share_parameters(runner.block(self.route[cut.position]))
                install_changes(view, maps)
                self.healed[cut.position] = view
            else:
                after, ridge = before, float("inf")
        return _Chosen(maps, {"ridge": ridge, "error_before": before, "error_after": after})

    def _tokens(
        self, cut: Cut, contributions: BlockContributions, span: slice
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield, for each sequence, what the MLP adds, what is missing behind the cut, and the stream to reach."""
        runner, mask = self.runner, self.text.mask[span]
        record = runner.record(
            model_inputs(runner.model, self.text.ids[span], mask), keep={0, cut.removed.stop} - {runner.depth}
        )
        target = record.states[cut.removed.stop]
        added, stream = self._run(cut, contributions, record)
        for sequence, kept in enumerate(mask.bool()):
            real = kept.to(target.device)
            reached = stream[sequence].to(target.device)[real]
            yield added[sequence].to(target.device)[real], target[sequence][real] - reached, target[sequence][real]

    def _run(
        self, cut: Cut, contributions: BlockContributions, record: ForwardRecord
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the MLP before a cut adds, and the stream behind it, in the model healed so far."""
        runner, stream = self.runner, record.states[0]
        for position, visit in enumerate(self.route[: cut.position]):
            stream = runner.run(record, visit, stream, self.healed.get(position))
        visit = self.route[cut.position]
        block = share_parameters(runner.block(visit))
        parts: list[torch.Tensor] = []
        points = [point for point in contributions.capture_points if point.branch == "mlp"]
        callbacks = [(point, _scaled_into(parts, point.scale)) for point in points]
        with capture_contributions(block, callbacks, (), None, stream.shape[:2]):
            after = runner.run(record, visit, stream, block)
        return torch.stack(parts).sum(0), after


def _scaled_into(parts: list[torch.Tensor], scale: float) -> Callable[[torch.Tensor], None]:
    return lambda value: parts.append(value.float() * scale)


@contextmanager
def _healed(model: nn.Module, maps: Mapping[int, Sequence[OutputMap]]) -> Iterator[None]:
    """Apply maps to the blocks of an edited model while the `with` block runs."""
    blocks = find_decoder_blocks(model).blocks
    with ExitStack() as restored:
        for position, of_block in maps.items():
            for output_map in of_block:
                path, _, name = output_map.parameter.rpartition(".")
                owner = blocks[position].get_submodule(path)
                restored.callback(owner._parameters.__setitem__, name, owner._parameters[name])
            install_changes(blocks[position], of_block)
        yield


def _costs(
    model: nn.Module,
    healing: LinearHealing,
    text: TokenizedText,
    seen: int,
    batch_size: int,
    anatomy: Anatomy,
    progress: Callable[[str, int, int], None] | None,
) -> pd.DataFrame:
    """Measure the unedited, the edited and the healed model on text that was not used."""
    ids, mask = text.ids[seen:], text.mask[seen:]
    rows = []
    others: dict[str, Any] = {
        "unedited": model,
        "edited": partial(operate, model, healing.plan, anatomy=anatomy),
        "healed": partial(healing.operate, model, anatomy=anatomy),
    }
    for number, (name, other) in enumerate(others.items()):
        if progress is not None:
            progress("measuring on other text", number, len(others))
        with eval_no_grad(model):
            found = compare_tokens(model, other, ids, mask, batch_size=batch_size, per_token=True)
        assert found.positions is not None
        of_sequence = found.positions.groupby("sequence")[list(METRICS)].agg(["sum", "count"])
        row: dict[str, Any] = {"model": name, "tokens": found.tokens, "sequences": len(of_sequence)}
        for metric in METRICS:
            sums, counts = (of_sequence[metric][part].to_numpy(float) for part in ("sum", "count"))
            row[metric] = sums.sum() / counts.sum()
            spread = ((sums - row[metric] * counts) ** 2).sum() * len(sums) / max(len(sums) - 1, 1)
            row[f"{metric}_sem"] = np.sqrt(spread) / counts.sum() if len(sums) > 1 else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def _span(blocks: range) -> str:
    return str(blocks.start) if len(blocks) == 1 else f"{blocks.start}:{blocks.stop}"


def _as_plan(plan: Plan | Route | str, route: Route) -> Plan:
    if isinstance(plan, Plan):
        return plan
    return Plan.parse(plan if isinstance(plan, str) else f"reorder {route}")
