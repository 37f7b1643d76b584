"""One pass of the residual stream through one block, and what it changes in the block: plain values and their text."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from ..errors import PlanError

Branch = Literal["attention", "mlp"]
BRANCHES: tuple[Branch, ...] = ("attention", "mlp")
_SHORT: dict[Branch, str] = {"attention": "attn", "mlp": "mlp"}


def as_int(value: object) -> int | None:
    """Return an integer of any library as int; None for everything else, also for True and False."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def whole_number(value: object, what: str) -> int:
    """Return an integer of any library as int.

    Raises:
        PlanError: it is not an integer; `what` begins the sentence.
    """
    number = as_int(value)
    if number is None:
        raise PlanError(f"{what} is given as a whole number, not as {value!r}")
    return number


@dataclass(frozen=True, slots=True, order=True)
class Visit:
    """One pass of the residual stream through one block.

    Attributes:
        block: number of the block in the loaded model, from 0.
        attention: factor of what the block's attention (or its other token mixer) adds to the stream: True for 1, False
            for 0, which skips it.
        mlp: factor of what the block's MLP adds to the stream.
        heads_off: numbers of the attention heads whose output is zero.
        neurons_off: numbers of the neurons of the MLP whose activation is zero.
        source: name of the checkpoint that the block's weights are from; empty for the loaded model.
        mean: the branches that add their mean over tokens, in place of what they compute.
        start: number of tokens at the beginning of each text for which the branches are not skipped or scaled.
        zeroed: whether the output projections of both branches are zero: the block adds nothing, but has weights to
            train.
        parallel: whether the block is given what the visit before it was given, and what both add is summed.
        divisor: number by which what the whole block adds is divided.
    """

    block: int
    attention: bool | float = True
    mlp: bool | float = True
    heads_off: tuple[int, ...] = ()
    neurons_off: tuple[int, ...] = ()
    source: str = ""
    mean: tuple[Branch, ...] = ()
    start: int = 0
    zeroed: bool = False
    parallel: bool = False
    divisor: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", whole_number(self.block, "a block"))
        if self.block < 0:
            raise PlanError(
                f"a visit needs a block number of at least 0, not {self.block}; resolve it against the depth first"
            )
        if unknown := sorted(set(self.mean) - set(BRANCHES)):
            raise PlanError(f"mean is of 'attention' or 'mlp', not of {unknown[0]!r}")
        object.__setattr__(self, "mean", tuple(branch for branch in BRANCHES if branch in self.mean))
        for branch, units in (("attention", "heads_off"), ("mlp", "neurons_off")):
            skipped = self.zeroed or branch in self.mean
            factor = False if skipped else branch_factor(getattr(self, branch), branch)
            object.__setattr__(self, branch, factor)
            # What is off in a branch that is skipped for all tokens makes no difference: such visits are the same.
            numbers = unit_numbers(getattr(self, units), units) if factor or self.start else ()
            object.__setattr__(self, units, numbers)
        if self.zeroed and self.mean:
            raise PlanError("a block whose output projections are zero adds no mean; leave one of both out")
        if self.source and self.mean:
            raise PlanError(
                f"the means are those of the loaded model, and block {self.block} is taken from {self.source}; leave "
                "one of both out"
            )
        source_name(self.source or "base")
        self._check_start()
        if whole_number(self.divisor, "a divisor") < 1:
            raise PlanError(f"what a block adds is divided by a number of at least 1, not by {self.divisor}")

    def _check_start(self) -> None:
        if whole_number(self.start, "a number of tokens") < 0:
            raise PlanError(f"a change starts at a token of a number of at least 0, not at {self.start}")
        if self.start and (self.zeroed or self.mean or self.heads_off or self.neurons_off):
            raise PlanError(
                "only branches that are skipped or scaled can run as they are for the first tokens ('from'); means, "
                "heads, neurons and zeroed copies are changed for all tokens"
            )
        if self.attention is True and self.mlp is True:
            object.__setattr__(self, "start", 0)

    @property
    def whole(self) -> bool:
        """Return whether the block runs as it is, and is given what the visit before it returns."""
        return self == Visit(self.block)

    @property
    def alone(self) -> Visit:
        """Return the visit with what it changes in the block, but not its place among parallel blocks."""
        return replace(self, parallel=False, divisor=1) if self.parallel or self.divisor != 1 else self

    @property
    def adds_nothing(self) -> bool:
        """Return whether the visit could be left out of the route: both branches are skipped for all tokens."""
        return not (self.attention or self.mlp or self.mean or self.start or self.zeroed)

    @property
    def skipped(self) -> tuple[Branch, ...]:
        """Return the branches that add nothing, for all tokens or from `start` on; none in a copy with zero weights."""
        return tuple(branch for branch in BRANCHES if not (self.factor(branch) or self.zeroed or branch in self.mean))

    @property
    def skips_only(self) -> bool:
        """Return whether branches are skipped for all tokens or run as they are, and nothing else is changed."""
        return self == Visit(self.block, bool(self.attention), bool(self.mlp))

    @property
    def of_own_block(self) -> Visit:
        """Return the visit that makes the same changes in the loaded model's own block."""
        return replace(self, source="") if self.source else self

    def factor(self, branch: Branch) -> bool | float:
        """Return the factor of what a branch adds to the stream."""
        return self.attention if branch == "attention" else self.mlp

    def units_off(self, branch: Branch) -> tuple[int, ...]:
        """Return the heads, or the neurons, of a branch that are off."""
        return self.heads_off if branch == "attention" else self.neurons_off

    def within(self, before: Visit) -> Visit:
        """Return this visit with the changes that an earlier edit made in the block.

        Raises:
            PlanError: both cannot be made together.
        """
        if self.source and before.source and self.source != before.source:
            raise PlanError(f"block {self.block} is taken from {before.source}, and then from {self.source}")
        if self.start != before.start and not (self._unskipped or before._unskipped):
            raise PlanError(
                f"block {self.block} is changed from token {before.start} and from token {self.start}; choose one"
            )
        return Visit(
            self.block,
            self.attention * before.attention,
            self.mlp * before.mlp,
            self.heads_off + before.heads_off,
            self.neurons_off + before.neurons_off,
            self.source or before.source,
            self.mean + before.mean,
            max(self.start, before.start),
            self.zeroed or before.zeroed,
            self.parallel,
            self.divisor,
        )

    @property
    def _unskipped(self) -> bool:
        return self.attention is True and self.mlp is True

    @property
    def suffix(self) -> str:
        """Return what the text of the visit has behind the block, such as "", "-attn", "@base" or "[mlp*0.5]"."""
        text = f"@{self.source}" * bool(self.source)
        text += "".join(f"-{_SHORT[branch]}" for branch in self.skipped)
        words = ["zeroed"] * self.zeroed + [f"{_SHORT[branch]}=mean" for branch in self.mean]
        words += (
            f"{_SHORT[branch]}*{factor_text(factor)}"
            for branch in BRANCHES
            if (factor := self.factor(branch)) and factor is not True
        )
        off = {"heads-off": self.heads_off, "neurons-off": self.neurons_off}
        words += (f"{name} {units_text(units)}" for name, units in off.items() if units)
        words += [f"from {self.start}"] * bool(self.start) + ["parallel"] * self.parallel
        words += [f"/{self.divisor}"] * (self.divisor != 1)
        return text + "".join(f"[{word}]" for word in words)

    def __str__(self) -> str:
        return f"{self.block}{self.suffix}"


def source_name(name: object) -> str:
    """Return the name of a source of blocks.

    Raises:
        PlanError: it is not a letter followed by letters, digits and underscores.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name):
        raise PlanError(f"a source has a name of letters, digits and _, such as base, not {name!r}")
    return name


def branch_factor(value: object, what: str) -> bool | float:
    """Return a factor of a branch as a number; True for 1 and False for 0.

    Raises:
        PlanError: it is not a finite number; `what` begins the sentence.
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise PlanError(f"{what} is scaled by a finite number, not by {value!r}")
    return bool(number) if number in (0, 1) else number


def factor_text(factor: float) -> str:
    """Return the shortest text of a factor that is read back as the same number."""
    return repr(float(factor)).removesuffix(".0")


def unit_numbers(values: Iterable[object], what: str) -> tuple[int, ...]:
    """Return numbers of heads or neurons, each once and in order.

    Raises:
        PlanError: one of them is not a whole number, or is negative.
    """
    numbers = sorted({whole_number(value, f"a number of {what}") for value in values})
    if numbers and numbers[0] < 0:
        raise PlanError(f"{what} are numbered from 0, not {numbers[0]}")
    return tuple(numbers)


def units_text(units: Sequence[int], separator: str = "+") -> str:
    """Return numbers as text: numbers and half-open ranges.

    >>> from layersurgery.plans.visit import units_text
    >>> units_text((0, 1, 2, 3, 7))
    '0:4+7'
    """
    words: list[str] = []
    for _, run in groupby(enumerate(units), key=lambda item: item[1] - item[0]):
        numbers = [number for _, number in run]
        words += [f"{numbers[0]}:{numbers[-1] + 1}"] if len(numbers) > 2 else map(str, numbers)
    return separator.join(words)


def parse_units(text: str) -> tuple[int, ...]:
    """Read numbers and half-open ranges of heads or neurons, separated by +, spaces or commas.

    Raises:
        PlanError: a word is neither, or a range is empty.
    """
    numbers: list[int] = []
    for word in re.split(r"[+,\s]+", text.strip()):
        match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", word)
        if match is None:
            raise PlanError(f"cannot read {word!r}: give numbers (3) or half-open ranges (0:4), counted from 0")
        first, stop = int(match[1]), int(match[2] or int(match[1]) + 1)
        if first >= stop:
            raise PlanError(f"the range {word} is empty: ranges are half-open, so 0:4 means 0 to 3")
        numbers += range(first, stop)
    return tuple(sorted(set(numbers)))


def parse_suffix(source: str, skips: str, brackets: str) -> Visit:
    """Return a visit of block 0 with the changes of a suffix.

    Args:
        source: name of a source; may be empty.
        skips: text such as "-attn-mlp".
        brackets: text such as "[attn*0.5][heads-off 0+3]".

    Raises:
        PlanError: the brackets cannot be read, or change something twice.
    """
    fields: dict[str, Any] = {"source": source} if source else {}
    if "-att" in skips:
        fields["attention"] = False
    if "-mlp" in skips:
        fields["mlp"] = False
    mean: list[Branch] = []
    for text in re.findall(r"\[\s*(.*?)\s*\]", brackets):
        branch: Branch = "mlp" if text.startswith("mlp") else "attention"
        name: str
        value: Any
        if match := re.fullmatch(r"(?:attn|attention|mlp)\s*\*\s*(\S+)", text):
            name, value = branch, branch_factor(match[1], f"[{text}]")
        elif re.fullmatch(r"(attn|attention|mlp)\s*=\s*mean", text):
            mean.append(branch)
            name, value = branch, False
        elif match := re.fullmatch(r"(heads|neurons)-off\s+(.+)", text):
            name, value = f"{match[1]}_off", parse_units(match[2])
        elif match := re.fullmatch(r"from\s+(\d{1,9})", text):
            name, value = "start", int(match[1])
        elif match := re.fullmatch(r"/\s*(\d{1,9})", text):
            name, value = "divisor", int(match[1])
        elif text in ("zeroed", "parallel"):
            name, value = text, True
        else:
            raise PlanError(
                f"cannot read [{text}]: write [attn*0.5], [mlp*0.5], [mlp=mean], [heads-off 0+3], [neurons-off 0:9], "
                "[from 1], [zeroed], [parallel] or [/2]"
            )
        if name in fields:
            raise PlanError(f"[{text}]: {name} is given twice")
        fields[name] = value
    return Visit(0, mean=tuple(mean), **fields)
