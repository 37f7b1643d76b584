"""Say how much a removal takes out of a model: a number of parts, or a share of what its blocks cost.

>>> from layersurgery.analyses.removal_goal import Goal
>>> goal = Goal.of(remove_attention=6, remove_mlp=2, keep="0:2,-1").checked(30)
>>> goal.counts, goal.count, sorted(goal.keep)
({'attention': 6, 'mlp': 2}, 8, [0, 1, 29])
>>> Goal.of(budget="kv-cache=30%", of="attention").name
'attention-kv-cache-30'
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..plans.visit import whole_number
from .removable_parts import BLOCKS, BUDGETS, KINDS, NOUNS, Part, check_kind, kept_layers, parts_of, plural

if TYPE_CHECKING:
    from .part_costs import PartCosts

_KIND_OF = {"remove": BLOCKS, **{f"remove_{kind}": kind for kind in KINDS if kind != BLOCKS}}
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Budget:
    """A share of what all blocks cost, which is to be removed.

    Attributes:
        name: "params", "flops" or "kv-cache".
        percent: the share, in percent.
    """

    name: str
    percent: float

    @classmethod
    def parse(cls, text: object) -> Budget:
        """Read a budget such as "params=20%".

        Raises:
            PlanError: it cannot be read.
        """
        match = re.fullmatch(r"\s*([\w-]+)\s*=\s*(\d+(?:\.\d+)?)\s*%\s*", text) if isinstance(text, str) else None
        if match is None or match[1] not in BUDGETS or not 0 < float(match[2]) < 100:
            raise PlanError(
                f"cannot read the budget {text!r}: write what is removed of all blocks' {', '.join(BUDGETS)}, between "
                "0 and 100 %, for example params=20%"
            )
        return cls(match[1], float(match[2]))

    def __str__(self) -> str:
        return f"{self.name}={self.percent:g}%"


@dataclass(frozen=True, slots=True)
class Goal:
    """What is to be removed, how much of it, and which layers stay.

    Attributes:
        counts: number of parts of each kind ("blocks", "attention", "mlp" or "branches"); empty with a budget.
        budget: the share to remove; None with counts.
        kinds: the kinds of parts that are removed.
        keep: the layers that stay: as they were given, and after `checked` their numbers.
    """

    counts: dict[str, int]
    budget: Budget | None
    kinds: tuple[str, ...]
    keep: Any = None

    @classmethod
    def of(
        cls,
        *,
        remove: int | None = None,
        remove_attention: int | None = None,
        remove_mlp: int | None = None,
        remove_branches: int | None = None,
        budget: str | None = None,
        of: str | None = None,
        keep: Any = None,
    ) -> Goal:
        """Make a goal.

        Args:
            remove: number of blocks.
            remove_attention: number of blocks whose attention is skipped.
            remove_mlp: number of blocks whose MLP is skipped.
            remove_branches: number of branches, of all attentions and MLPs together.
            budget: a share such as "params=20%", instead of the numbers.
            of: what a budget removes: "blocks" (the default), "attention", "mlp" or "branches".
            keep: layers that stay, as for `kept_layers`.

        Raises:
            PlanError: not exactly one of the numbers and the budget is given (attention and MLP may be given
                together), or one of them cannot be read.
        """
        numbers = {
            "remove": remove, "remove_attention": remove_attention, "remove_mlp": remove_mlp,
            "remove_branches": remove_branches,
        }  # fmt: skip
        counts = {name: whole_number(number, f"`{name}`") for name, number in numbers.items() if number is not None}
        given = [*counts, *(["budget"] if budget is not None else [])]
        if len(given) != 1 and given != ["remove_attention", "remove_mlp"]:
            found = " and ".join(f"`{name}`" for name in given) or "none"
            raise PlanError(
                "give one of `remove`, `remove_attention`, `remove_mlp`, `remove_branches` and `budget`; "
                f"`remove_attention` and `remove_mlp` may be given together; found {found}"
            )
        if budget is None and of is not None:
            raise PlanError(f"`of` says what a budget removes; `{given[0]}` says it by itself")
        kinds = tuple(_KIND_OF[name] for name in counts) or (str(check_kind(of or BLOCKS)),)
        by_kind = {_KIND_OF[name]: number for name, number in counts.items()}
        return cls(by_kind, None if budget is None else Budget.parse(budget), kinds, keep)

    def checked(self, depth: int) -> Goal:
        """Return the goal with the numbers of the kept layers.

        Raises:
            PlanError: a number is out of range for a model of `depth` blocks.
        """
        keep = kept_layers(self.keep, depth)
        but = f", and keep {len(keep)} of them" if keep else ""
        for kind, number in self.counts.items():
            most = len(KINDS[kind]) * (depth - len(keep))
            if not keep and kind in (BLOCKS, "branches"):
                most -= 1  # one part stays
            everything = len(KINDS[kind]) * depth
            what = f"{everything} {plural(NOUNS[kind], everything)}"
            if not 1 <= number <= most:
                raise PlanError(f"cannot remove {number} of {what}{but}; give 1 to {most}")
        if self.count == 2 * depth:
            raise PlanError(f"cannot remove all {2 * depth} branches; one of them stays")
        if len(keep) == depth:
            raise PlanError("all layers are kept; nothing can be removed")
        return replace(self, keep=keep)

    @property
    def count(self) -> int:
        """Return the number of parts to remove; 0 with a budget."""
        return sum(self.counts.values())

    @property
    def of_blocks(self) -> bool:
        """Return whether whole blocks are removed."""
        return self.kinds == (BLOCKS,)

    @property
    def noun(self) -> str:
        """Return what one of the parts is called."""
        return NOUNS[self.kinds[0]] if len(self.kinds) == 1 else NOUNS["branches"]

    @property
    def name(self) -> str:
        """Return the goal as a part of a directory's name."""
        of_kind = {kind: "" if kind == BLOCKS else f"{kind}-" for kind in self.kinds}
        if self.budget is not None:
            return f"{of_kind[self.kinds[0]]}{self.budget.name}-{self.budget.percent:g}"
        return "-".join(f"{of_kind[kind]}{number}" for kind, number in self.counts.items())

    def candidates(self, depth: int, removed: Iterable[Part] = ()) -> list[Part]:
        """Return the parts that may be removed next, after some are removed."""
        removed = set(removed)
        left = Counter(self.counts)
        for part in removed:
            left[self._kind_of(part)] -= 1
        parts = [part for kind in self.kinds if self.budget or left[kind] > 0 for part in self.parts(kind, depth)]
        return [part for part in parts if part not in removed]

    def parts(self, kind: str, depth: int) -> list[Part]:
        """Return all parts of one of the kinds that may be removed."""
        return parts_of(kind, depth, self.keep)

    def _kind_of(self, part: Part) -> str:
        return next(kind for kind in self.kinds if part.branch in KINDS[kind])

    def is_reached(self, removed: Iterable[Part], costs: PartCosts) -> bool:
        """Return whether removing these parts is enough."""
        parts = list(removed)
        if self.budget is None:
            return len(parts) >= self.count
        return costs.share(parts, self.budget.name) >= self.budget.percent / 100 - _ROUNDING
