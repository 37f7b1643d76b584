"""Put the documents of tasks in a random order, so that a run can stop once enough of them are measured.

>>> from layersurgery.tasks.document_order import DocumentOrder
>>> order = DocumentOrder.of([("a", 0), ("a", 0), ("a", 1)], seed=0)
>>> sorted(order.documents), sorted(order.requests)
([('a', 0), ('a', 1)], [0, 1, 2])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Label = tuple[str, int]
"""Task and number of a document."""


@dataclass(frozen=True, slots=True)
class DocumentOrder:
    """Hold a random order of the documents of all tasks.

    Attributes:
        documents: the documents.
        requests: numbers of the requests, those of a document side by side.
        of_document: numbers of each document's requests.
    """

    documents: tuple[Label, ...]
    requests: tuple[int, ...]
    of_document: dict[Label, tuple[int, ...]]

    @classmethod
    def of(cls, labels: Sequence[Label], seed: int) -> DocumentOrder:
        """Draw the order.

        Args:
            labels: the document of each request.
            seed: of the random numbers.
        """
        found: dict[Label, list[int]] = {}
        for number, label in enumerate(labels):
            found.setdefault(label, []).append(number)
        listed = list(found)
        documents = tuple(listed[index] for index in np.random.default_rng(seed).permutation(len(listed)))
        of_document = {label: tuple(numbers) for label, numbers in found.items()}
        return cls(documents, tuple(number for label in documents for number in of_document[label]), of_document)

    def complete(self, sequence_of: Sequence[int], sequences: int) -> tuple[Label, ...]:
        """Return the documents of which all requests are measured, in this order up to the first that is not.

        Args:
            sequence_of: number of each request's sequence.
            sequences: number of measured sequences, from the first.
        """
        last = np.array([max(sequence_of[number] for number in self.of_document[label]) for label in self.documents])
        return self.documents[: int(np.searchsorted(np.maximum.accumulate(last), sequences))]
