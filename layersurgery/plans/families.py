"""The families of edits: sets of edits that a sweep makes for every block of a model.

A new family gets its entry here, and appears in sweeps, figures, tables, the report and the command line.

>>> from layersurgery.plans.families import FAMILIES
>>> [str(edit) for edit in FAMILIES["swap"].edits(range(4), 0, 4)]
['swap 0 1', 'swap 1 2', 'swap 2 3']
>>> [family.usage for family in FAMILIES.values() if family.per_layer]
['swap', 'drop', 'skip-attention', 'skip-mlp', 'drop-span:N']
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations

from .edits import Drop, Edit, Skip, Swap, parse_edit
from .route import Span


@dataclass(frozen=True, slots=True)
class Family:
    """A family of edits.

    Attributes:
        name: its name, in texts of edits and in the column "edit" of results.
        help: what its edits do, in a sentence without a full stop.
        title: what one of its edits does, for a figure.
        label: a short form of the title, for a list.
        edits: returns its edits, from the range of the blocks that they may touch, the number and the depth; in the
            order of their first blocks.
        per_layer: whether each edit belongs to one layer, the first block that it names, so that it is drawn over
            depth.
        takes_number: whether a number follows the name, as in "drop-span:4": the number of adjacent blocks.
        width: number of adjacent blocks that one edit changes, if the family takes no number.
    """

    name: str
    help: str
    title: str
    label: str
    edits: Callable[[range, int, int], Iterable[Edit]]
    per_layer: bool = True
    takes_number: bool = False
    width: int = 1

    @property
    def usage(self) -> str:
        """Return how the family is written in a text of edits."""
        return f"{self.name}:N" if self.takes_number else self.name

    def length(self, plan: str, depth: int) -> int:
        """Return the number of adjacent blocks that one of its edits changes.

        Args:
            plan: the plan's text, which is this edit alone.
            depth: number of blocks of the model.

        Example:
            >>> from layersurgery.plans.families import FAMILIES
            >>> FAMILIES["drop-span"].length("drop 4:8", 32)
            4
        """
        return len(parse_edit(plan).first_blocks(depth)) if self.takes_number else self.width


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "swap", "swap every two adjacent blocks", "swap a block with the next", "swap",
            lambda blocks, _number, _depth: (Swap(block, block + 1) for block in blocks[:-1]), width=2,
        ),
        Family(
            "drop", "drop every block", "drop a block", "drop",
            lambda blocks, _number, depth: (Drop((block,)) for block in blocks if depth > 1),
        ),
        Family(
            "skip-attention", "skip the attention of every block", "skip a block's attention", "skip attention",
            lambda blocks, _number, _depth: (Skip("attention", (block,)) for block in blocks),
        ),
        Family(
            "skip-mlp", "skip the MLP of every block", "skip a block's MLP", "skip MLP",
            lambda blocks, _number, _depth: (Skip("mlp", (block,)) for block in blocks),
        ),
        Family(
            "drop-span", "drop every N adjacent blocks; written drop-span:N", "drop adjacent blocks", "drop a span",
            lambda blocks, number, _depth: (
                Drop((Span(start, start + number),)) for start in blocks[: max(0, len(blocks) - number + 1)]
            ),
            takes_number=True,
        ),
        Family(
            "swap-pairs", "swap every two blocks", "swap two blocks", "swap two blocks",
            lambda blocks, _number, _depth: (Swap(*pair) for pair in combinations(blocks, 2)), per_layer=False,
        ),
    )
}  # fmt: skip
"""The families by name, in the order in which they are listed and drawn."""
