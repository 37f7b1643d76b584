"""List the signals that can be observed on a model's blocks, and the numbers that are stored of them by sequence."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from ..plans.route import Route
from ..runtime.contributions import BRANCHES

ATTENTION, NORMS, SIMILARITY, CHANGE = "attention", "norms", "similarity", "change"
CKA, COSINE, STREAM = "cka", "cosine", "stream"
BRANCH_CHANGE = "branch-change"
"""The change of the stream by each branch alone: by what it adds to the stream that it is added to."""
SIGNALS = (ATTENTION, NORMS, SIMILARITY)
STREAM_SIGNALS = (CKA, COSINE, STREAM)
OF_PAIRS = (CKA, COSINE)
"""Signals of all pairs of states. State k is the stream before block k; the last one is the stream after all blocks."""
PARTS = (*BRANCHES, "block")
SIMILARITY_KINDS = ("self", "index", "adjacent")
COUNTS = (
    "tokens", "has_five_previous", "pairs", "last_tokens", "first_tokens", "has_four_tokens", "has_five_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantity:
    """Describe a measured mean: a column of sums, and the column that counts the summed values.

    Attributes:
        signal: the signal that it belongs to.
        layer: the block; for a swap, the first of the two blocks; for the stream itself and pairs of states, the state.
        part: "attention", "mlp" or "block"; "stream" for the stream itself; for a change of the stream, the number of
            consecutive blocks, as text; for a pair of states, the second one, as text.
        name: the column of the table.
        count: what is counted, one of `COUNTS`: real tokens ("tokens"), tokens with at least five previous tokens
            ("has_five_previous"), pairs of a token and one of its five previous tokens ("pairs"), last or
            first tokens of sequences ("last_tokens", "first_tokens"), or sequences of at least four or five tokens
            ("has_four_tokens", "has_five_tokens").
    """

    signal: str
    layer: int
    part: str
    name: str
    count: str

    def __str__(self) -> str:
        if self.signal in OF_PAIRS:
            return f"{self.name} of states {self.layer} and {self.part}"
        return f"{self.part} {self.name} of block {self.layer}"


@dataclass(frozen=True, slots=True)
class Observed:
    """Choice of what is observed on a model's blocks.

    Attributes:
        signals: the signals to measure, some of `SIGNALS` and `STREAM_SIGNALS`; or only "change" (of the stream).
        spans: for "change": the largest number of consecutive blocks.
        route: for "change": the route to observe, which visits no block twice; the unedited model's if not given.
    """

    signals: Collection[str]
    spans: int = 1
    route: Route | None = None


class Quantities:
    """Measured means, in the order in which their sums are stored: after the counts.

    Args:
        quantities: the means.
    """

    def __init__(self, quantities: Iterable[Quantity]) -> None:
        self._quantities = tuple(quantities)
        self._columns = {(q.layer, q.part, q.name): column for column, q in enumerate(self._quantities, len(COUNTS))}

    def __iter__(self) -> Iterator[Quantity]:
        return iter(self._quantities)

    @property
    def size(self) -> int:
        """Return how many numbers are stored for each sequence: the counts, and a sum for each quantity."""
        return len(COUNTS) + len(self._quantities)

    @property
    def names(self) -> list[str]:
        """Return a description of each number that is stored for a sequence."""
        return [*COUNTS, *map(str, self._quantities)]

    def column(self, layer: int, part: str, name: str) -> int:
        """Return the index of a quantity's sum among the numbers that are stored for a sequence."""
        return self._columns[layer, part, name]

    def count_column(self, column: int) -> int:
        """Return the index of the count that the sum at an index is divided by."""
        return COUNTS.index(self._quantities[column - len(COUNTS)].count)

    def is_measured(self, layer: int, part: str, name: str) -> bool:
        """Return whether a quantity is measured."""
        return (layer, part, name) in self._columns
