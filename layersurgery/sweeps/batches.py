"""Say which sequences of a text each batch has.

>>> from layersurgery.sweeps.batches import Batches
>>> Batches.of(10, size=4).ends
(4, 8, 10)
>>> Batches.of_groups([9, 8, 8, 4, 4, 3, 3], groups=[3, 2, 2], tokens=27).ends  # no group is cut without need
(3, 7)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Batches:
    """Hold where each batch ends; every sequence of the text is in one of them, in the text's order.

    Attributes:
        ends: for each batch, the number of the sequence after its last one.
    """

    ends: tuple[int, ...]

    @classmethod
    def of(cls, sequences: int, size: int) -> Batches:
        """Divide so many sequences into batches of one size; the last one may be smaller."""
        return cls((*range(size, sequences, size), sequences))

    @classmethod
    def of_groups(cls, lengths: Sequence[int], groups: Sequence[int], tokens: int) -> Batches:
        """Fill batches up to a number of tokens, padding included; a group is cut only if it is too large by itself.

        Args:
            lengths: the length of each sequence.
            groups: sizes of the groups of neighbours, which together are all sequences.
            tokens: tokens of a batch; at least those of the longest sequence.
        """
        ends: list[int] = []
        start = stop = 0
        for group in groups:
            if stop > start and (stop + group - start) * max(lengths[start : stop + group]) > tokens:
                ends.append(stop)
                start = stop
            for number in range(stop, stop + group):
                if (number + 1 - start) * max(lengths[start : number + 1]) > tokens:
                    ends.append(number)
                    start = number
            stop += group
        return cls((*ends, stop))

    def __len__(self) -> int:
        return len(self.ends)

    def span(self, batch: int) -> slice:
        """Return the sequences of a batch."""
        return slice(self.ends[batch - 1] if batch else 0, self.ends[batch])

    def size(self, batch: int) -> int:
        """Return the number of sequences of a batch."""
        span = self.span(batch)
        return int(span.stop - span.start)
