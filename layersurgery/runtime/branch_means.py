"""Sum what each branch of a model adds to the residual stream over the tokens of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..models.means import BranchMean, Means, sampled_parameters, weight_samples
from ..plans.visit import Branch
from .block_runner import BlockRunner, ForwardRecord
from .contributions import BRANCHES, CapturePoint, capture_contributions, find_contributions
from .inputs import model_inputs


class BranchSums:
    """Sum the contributions of all branches over tokens, in float64, batch by batch.

    Each sequence is summed alone, and the sums are added in the order of the sequences, so that the batch size makes no
    difference to the order of additions.

    Args:
        runner: the model's blocks.
        first_tokens: also count the first token of each sequence. Its stream is often a hundred times as long as that
            of other tokens, and nearly the same in all texts.
    """

    def __init__(self, runner: BlockRunner, *, first_tokens: bool = False) -> None:
        self.runner, self.first_tokens, self.tokens = runner, first_tokens, 0
        self.contributions = find_contributions(runner, check_attention=False)
        self._sums: dict[tuple[int, Branch], torch.Tensor] = {
            (block, branch): torch.zeros(runner.width, dtype=torch.float64)
            for block, contributions in enumerate(self.contributions)
            for branch in BRANCHES
            if contributions.has(branch)
        }

    def add(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the tokens of a batch, (sequences, length)."""
        counted = mask.bool()
        if not self.first_tokens:
            counted = counted & (mask.cumsum(-1) > 1)
        self.tokens += int(counted.sum())
        runner = self.runner
        with runner.inference_mode():

            @contextmanager
            def around(number: int, _record: ForwardRecord) -> Iterator[None]:
                points = self.contributions[number].capture_points
                slots = [(point, self._adder(number, point, counted)) for point in points]
                with capture_contributions(runner.blocks[number], slots, (), None, mask.shape):
                    yield

            runner.record(model_inputs(runner.model, ids, mask), (), around)

    def _adder(self, block: int, point: CapturePoint, counted: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def add(value: torch.Tensor) -> None:
            kept = counted.to(value.device)[..., None]
            sums = torch.where(kept, value.double(), 0).sum(1) * point.scale
            for row in sums.cpu():
                self._sums[block, point.branch] += row

        return add

    def means(self, model: str, text: dict[str, object]) -> Means:
        """Return the means over all tokens that were added.

        Args:
            model: the model's name.
            text: what the tokens are.
        """
        vectors = {}
        for (block, branch), total in self._sums.items():
            # The whole mean is put at one module, and the others of the branch add nothing.
            point = next(
                point for point in self.contributions[block].capture_points if point.branch == branch and point.scale
            )
            own, outputs = self.runner.blocks[block], self.runner.anatomy.parts(block).outputs(branch)
            samples = weight_samples(own, sampled_parameters(own, outputs, point.path))
            vectors[block, branch] = BranchMean((total / self.tokens).float(), point.path, point.scale, samples)
        errors = {block: found.error for block, found in enumerate(self.contributions) if found.error}
        text = {**text, "first_tokens": self.first_tokens}
        return Means(model, self.runner.depth, self.runner.width, self.tokens, vectors, errors, text)
