"""The edits of what a block's attention and MLP add to the stream: skip, scale, heads and neurons off."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import PlanError
from ..registry import NEURON_KINDS
from .edits import Edit, changed, check_ending, ending, join, parse_refs, positions, resolve_all, split_ending
from .route import Ref, Route
from .visit import Branch, Visit, branch_factor, factor_text, parse_units, unit_numbers, units_text

PickNeurons = Callable[[int, str, int | None, bool], tuple[int, ...]]
"""Returns neurons of a block, given their kind, how many (None for all), and whether random ones in their place."""


@dataclass(frozen=True, slots=True)
class Skip(Edit):
    """Skip the attention (or other token mixer) or the MLP of blocks, at all their positions.

    With `mean`, it adds the mean of what it adds over tokens. With `start`, it runs for so many first tokens.
    """

    branch: Branch
    blocks: tuple[Ref, ...]
    mean: bool = False
    start: int = 0
    examples: ClassVar = {
        "skip-attention": "skip-attention 5, skip-attention 5 mean or skip-attention 5 from 1",
        "skip-mlp": "skip-mlp 5, skip-mlp 5 mean or skip-mlp 5 from 1",
    }

    @classmethod
    def _parse(cls, verb: str, text: str, /) -> Edit:
        blocks, mean, start = split_ending(text)
        return cls("attention" if verb == "skip-attention" else "mlp", parse_refs(blocks), mean, start)

    def __post_init__(self) -> None:
        check_ending(self.mean, self.start)

    @property
    def _first(self) -> Ref:
        return self.blocks[0]

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        named = resolve_all(self.blocks, depth)
        for block in named:
            if any(not route[position].factor(self.branch) for position in positions(route, block, self)):
                raise PlanError(f"'{self}': the {self.branch} of block {block} is already skipped; name it once")
        mean = (self.branch,) if self.mean else ()
        skipped: dict[str, Any] = {self.branch: False}

        def without(visit: Visit) -> Visit:
            return changed(visit, Visit(visit.block, mean=mean, start=self.start, **skipped))

        return (without(visit) if visit.block in named else visit for visit in route)

    def __str__(self) -> str:
        return f"skip-{self.branch} {join(self.blocks)}{ending(self.mean, self.start)}"


@dataclass(frozen=True, slots=True)
class Scale(Edit):
    """Multiply what blocks add to the stream, at all their positions: the attention, the MLP, or both.

    0 skips, 1 changes nothing. Several factors of one branch multiply. With `start`, so many first tokens are not
    scaled.
    """

    blocks: tuple[Ref, ...]
    by: float
    branch: Branch | None = None
    start: int = 0
    examples: ClassVar = {
        "scale": "scale 20 0.5",
        "scale-attention": "scale-attention 20 0.5",
        "scale-mlp": "scale-mlp 20 0.5",
    }

    @classmethod
    def _parse(cls, verb: str, text: str, /) -> Edit:
        words, mean, start = split_ending(text)
        blocks, _, factor = words.rpartition(" ")
        if not blocks or mean:
            raise PlanError("expected blocks, and a factor behind them")
        branch: Branch | None = None if verb == "scale" else "attention" if verb == "scale-attention" else "mlp"
        return cls(parse_refs(blocks), branch_factor(factor, "a branch"), branch, start)

    @property
    def _first(self) -> Ref:
        return self.blocks[0]

    def __post_init__(self) -> None:
        object.__setattr__(self, "by", branch_factor(self.by, "a branch"))
        check_ending(False, self.start)

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        named = resolve_all(self.blocks, depth)
        branches: tuple[Branch, ...] = ("attention", "mlp") if self.branch is None else (self.branch,)
        for block in named:
            _refuse_skipped(route, block, branches, self)

        factors: dict[str, Any] = dict.fromkeys(branches, self.by)

        def scaled(visit: Visit) -> Visit:
            return changed(visit, Visit(visit.block, start=self.start, **factors))

        return (scaled(visit) if visit.block in named else visit for visit in route)

    def __str__(self) -> str:
        branch = "" if self.branch is None else f"-{self.branch}"
        return f"scale{branch} {join(self.blocks)} {factor_text(self.by)}{ending(False, self.start)}"


@dataclass(frozen=True, slots=True)
class UnitsOff(Edit):
    """Set the output of attention heads, or the activation of neurons of the MLP, to zero, at all positions of blocks.

    Heads are query heads. Both are numbered from 0.
    """

    branch: Branch
    units: tuple[int, ...]
    blocks: tuple[Ref, ...]
    examples: ClassVar = {"heads-off": "heads-off 0 3 of 5", "neurons-off": "neurons-off 0:100 of 29"}

    @classmethod
    def _parse(cls, verb: str, text: str, /) -> Edit:
        units, of, blocks = text.partition(" of ")
        if not of:
            raise PlanError("expected numbers, 'of' and blocks")
        if verb == "neurons-off" and units.split()[-1] in NEURON_KINDS:
            return NeuronsOfKind.read(units, blocks)
        return cls("attention" if verb == "heads-off" else "mlp", parse_units(units), parse_refs(blocks))

    @property
    def _first(self) -> Ref:
        return self.blocks[0]

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", unit_numbers(self.units, self._name))

    @property
    def _name(self) -> str:
        return "heads" if self.branch == "attention" else "neurons"

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        named, field = resolve_all(self.blocks, depth), f"{self._name}_off"
        for block in named:
            _refuse_skipped(route, block, [self.branch], self)

        def without(visit: Visit) -> Visit:
            off: dict[str, Any] = {field: self.units}
            return changed(visit, Visit(visit.block, **off)) if visit.block in named else visit

        return map(without, route)

    def __str__(self) -> str:
        return f"{self._name}-off {units_text(self.units, ' ')} of {join(self.blocks)}"


@dataclass(frozen=True, slots=True)
class NeuronsOfKind(Edit):
    """Turn neurons of a kind off, which the weights of a model tell: all, or the `count` most distinct ones.

    `Plan.resolved` replaces it by the numbers of the neurons. With `random`, as many random neurons of no kind are off.
    """

    kind: str
    count: int | None
    random: bool
    blocks: tuple[Ref, ...]

    @classmethod
    def read(cls, words: str, blocks: str) -> NeuronsOfKind:
        """Read "suppression", "top 50 suppression" or "random suppression", and blocks.

        Raises:
            PlanError: the words are others.
        """
        match = re.fullmatch(r"(?:(random)\s+)?(?:top\s+([1-9]\d{0,8})\s+)?(\w+)", words.strip())
        if match is None:
            raise PlanError(
                f"cannot read {words.strip()!r}: write 'suppression', 'top 50 suppression' or 'random suppression'"
            )
        count = None if match[2] is None else int(match[2])
        return cls(match[3], count, match[1] is not None, parse_refs(blocks))

    @classmethod
    def _parse(cls, _verb: str, text: str, /) -> Edit:
        words, _, blocks = text.partition(" of ")
        return cls.read(words, blocks)

    @property
    def _first(self) -> Ref:
        return self.blocks[0]

    def all_blocks(self, depth: int) -> frozenset[int]:
        """Return the blocks that it names, in a model of `depth` blocks."""
        return resolve_all(self.blocks, depth)

    def resolved(self, depth: int, pick: PickNeurons) -> list[Edit]:
        """Return the edits with the numbers of the neurons, one for each block that has any.

        Args:
            depth: number of blocks of the model.
            pick: returns the neurons.

        Raises:
            PlanError: no block has a neuron of the kind.
        """
        found: list[Edit] = []
        for block in sorted(self.all_blocks(depth)):
            if neurons := pick(block, self.kind, self.count, self.random):
                found.append(UnitsOff("mlp", neurons, (block,)))
        if not found:
            what = "enough random neurons of no kind" if self.random else f"a {self.kind} neuron"
            raise PlanError(f"'{self}': no block that it names has {what}; layersurgery analyze neurons counts them")
        return found

    def _edited(self, _route: Route, _depth: int) -> Iterable[Visit]:
        raise PlanError(
            f"'{self}' names neurons by their weights, so it needs the model: sweep, compare and the command off look "
            "them up; elsewhere, use the plan that resolve_neurons(plan, model) returns"
        )

    def __str__(self) -> str:
        top = "" if self.count is None else f"top {self.count} "
        return f"neurons-off {'random ' * self.random}{top}{self.kind} of {join(self.blocks)}"


def _refuse_skipped(route: Route, block: int, branches: Iterable[Branch], edit: Edit) -> None:
    """Refuse to change a branch that an earlier edit skips."""
    for branch in branches:
        if not any(route[position].factor(branch) for position in positions(route, block, edit)):
            raise PlanError(f"'{edit}': the {branch} of block {block} is skipped; leave one of both edits out")
