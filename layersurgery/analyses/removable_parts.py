"""Name the parts of a model that a removal takes out: blocks, or the attention or the MLP of blocks.

>>> from layersurgery.analyses.removable_parts import Part, parts_of, removal_plan
>>> [str(part) for part in parts_of("branches", 2)]
['0-attn', '0-mlp', '1-attn', '1-mlp']
>>> str(removal_plan([Part(3, "mlp"), Part(1, "attention"), Part(3, "attention"), Part(5, "mlp")]))
'drop 3; skip-attention 1; skip-mlp 5'
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from ..errors import PlanError
from ..plans.plan import Plan
from ..plans.route import Route, parse_items, resolve
from ..plans.variants import Variant
from ..plans.visit import BRANCHES, Branch, Visit, whole_number

BLOCKS = "blocks"
KINDS: dict[str, tuple[Branch | None, ...]] = {
    BLOCKS: (None,),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "branches": BRANCHES,
}
"""What can be ranked and removed, and the branches of a block that are meant; None for the whole block."""
NOUNS = {BLOCKS: "layer", "attention": "attention branch", "mlp": "MLP branch", "branches": "branch"}
"""What one part of each kind is called."""
BUDGETS = {"params": "parameters", "flops": "multiplications", "kv-cache": "cache_bytes"}
"""Names of what a budget may be of, and the column of each in the table of what parts cost."""


@dataclass(frozen=True, slots=True)
class Part:
    """A block, or the attention or the MLP of a block.

    Attributes:
        layer: number of the block.
        branch: "attention" or "mlp"; None for the whole block.
    """

    layer: int
    branch: Branch | None = None

    @property
    def name(self) -> str:
        """Return "block", "attention" or "mlp", as in the column `part` of tables."""
        return self.branch or "block"

    @property
    def words(self) -> str:
        """Return what it is in words."""
        layer = f"layer {self.layer}"
        return layer if self.branch is None else f"the {'MLP' if self.branch == 'mlp' else self.branch} of {layer}"

    @property
    def edit(self) -> str:
        """Return the edit that removes it, which is also the name of a family of edits."""
        return f"skip-{self.branch}" if self.branch else "drop"

    @classmethod
    def parse(cls, word: str | int) -> Part:
        """Read the text of a part."""
        layer, _, branch = str(word).partition("-")
        return cls(int(layer), {"attn": BRANCHES[0], "mlp": BRANCHES[1]}.get(branch))

    @classmethod
    def of_row(cls, layer: int, part: str = "block") -> Part:
        """Return the part of a row of a table."""
        return cls(int(layer), {name: name for name in BRANCHES}.get(part))  # type: ignore[call-overload]

    @classmethod
    def of_variant(cls, variant: Variant) -> Part:
        """Return the part that a variant of a family removes."""
        assert variant.layer is not None
        return cls.of_row(variant.layer, variant.edit.removeprefix("skip-"))

    def __str__(self) -> str:
        return f"{self.layer}{'' if self.branch is None else '-attn' if self.branch == 'attention' else '-mlp'}"


def check_kind(of: str) -> str:
    """Return what is ranked or removed.

    Raises:
        PlanError: it is unknown.
    """
    if of not in KINDS:
        raise PlanError(f"unknown kind of parts {of!r}; choose from {', '.join(KINDS)}")
    return of


def plural(noun: str, count: int) -> str:
    """Return what so many parts are called."""
    return noun if count == 1 else f"{noun}es" if noun.endswith("ch") else f"{noun}s"


def describe_parts(parts: Iterable[Part]) -> str:
    """Name parts in words, attentions and MLPs apart, each in their order.

    >>> from layersurgery.analyses.removable_parts import Part, describe_parts
    >>> describe_parts([Part(17, "mlp"), Part(3, "attention"), Part(14, "mlp")])
    'the attention of layer 3, the MLP of layers 17, 14'
    """
    layers: dict[str, list[int]] = {}
    for part in sorted(parts, key=lambda part: str(part.branch)):
        layers.setdefault(part.words.rpartition(" ")[0], []).append(part.layer)
    return ", ".join(f"{what}{'s'[: len(of) != 1]} {', '.join(map(str, of))}" for what, of in layers.items())


def parts_of(of: str, depth: int, keep: Collection[int] = ()) -> list[Part]:
    """Return the parts of a kind, in the order of the blocks, without those of the blocks to keep."""
    return [Part(layer, branch) for layer in range(depth) if layer not in keep for branch in KINDS[of]]


def removal_plan(parts: Iterable[Part], single: Collection[int] = ()) -> Plan:
    """Return the plan without these parts. A block is dropped if it, or each of its branches, is among them.

    Args:
        parts: what is removed.
        single: blocks with one branch only (a Mamba mixer without an MLP).
    """
    dropped, branches = _dropped(parts, single)
    texts = [("drop", dropped), *((f"skip-{branch}", branches[branch] - dropped) for branch in BRANCHES)]
    return Plan.parse("; ".join(f"{verb} {Route(sorted(layers))}" for verb, layers in texts if layers))


def leaves_a_block(parts: Iterable[Part], depth: int, single: Collection[int] = ()) -> bool:
    """Return whether a model of `depth` blocks has one left without these parts."""
    return len(_dropped(parts, single)[0]) < depth


def _dropped(parts: Iterable[Part], single: Collection[int]) -> tuple[set[int], dict[Branch | None, set[int]]]:
    """Return the blocks of which nothing is left, and the blocks of the parts by their branch."""
    named = set(parts)
    branches: dict[Branch | None, set[int]] = {
        branch: {part.layer for part in named if part.branch == branch} for branch in (None, *BRANCHES)
    }
    both = branches["attention"] & branches["mlp"]
    alone = (branches["attention"] | branches["mlp"]) & set(single)
    return branches[None] | both | alone, branches


def removed_parts(route: Route, depth: int) -> Iterator[Part]:
    """Yield what a route of a removal leaves out."""
    visits = {visit.block: visit for visit in route}
    for block in range(depth):
        visit = visits.get(block)
        if visit is None:
            yield Part(block)
        else:
            yield from (Part(block, branch) for branch in visit.skipped)


def kept_layers(keep: object, depth: int) -> frozenset[int]:
    """Return the layers that stay.

    Args:
        keep: numbers and half-open ranges as text ("0:2,-1"), a number, or numbers and ranges; None for none.
        depth: number of blocks; negative numbers count from the end.

    Raises:
        PlanError: it cannot be read, or the model does not have a layer of a number.

    >>> from layersurgery.analyses.removable_parts import kept_layers
    >>> sorted(kept_layers("0:2,-1", 30))
    [0, 1, 29]
    """
    if keep is None:
        return frozenset()
    if isinstance(keep, str):
        items = parse_items(keep)
        if any(item.like != Visit(0) for item in items):
            raise PlanError(f"`keep` takes numbers and half-open ranges of layers, for example 0:2,-1, not {keep!r}")
        return frozenset(block for item in items for block in resolve(item.ref, depth))
    if isinstance(keep, range):
        keep = list(keep)
    numbers = keep if isinstance(keep, Iterable) else [keep]
    kept: set[int] = set()
    for number in numbers:
        if isinstance(number, str | range):
            kept |= kept_layers(number, depth)
        else:
            kept |= {*resolve(whole_number(number, "a layer to keep"), depth)}
    return frozenset(kept)
