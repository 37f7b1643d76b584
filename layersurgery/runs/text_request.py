"""Say which text to measure on, and how to cut it into sequences."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PlanError

PYDOC = "pydoc"
PILE = "EleutherAI/the_pile_deduplicated"
ALL = 1 << 40
"""A number of tokens that stands for all there are."""


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Request for text.

    Attributes:
        data: "pydoc", a file (.txt or .jsonl, also compressed as .zst or .gz, or .parquet), a directory of such files,
            or the id of a Hub dataset ("id:configuration" if it has several configurations).
        tokens: number of tokens; rounded up to whole contexts.
        context: largest number of tokens of one sequence.
        split: split of the Hub dataset.
        column: the column that contains the text, for tables.
        pack: join documents with the end-of-text token and cut them into contexts; otherwise each document is one
            sequence.
        bos: begin each sequence with the tokenizer's beginning-of-text token; None does what the tokenizer does.
        shuffle: take contexts in random order instead of from the start; None means yes for a Hub dataset, no for other
            text.
        seed: seed for shuffling.
        lines: each line of a text file is one document.
        documents: texts that were given from Python; `data` is then a name for them.
    """

    data: str
    tokens: int
    context: int
    split: str = "train"
    column: str = "text"
    pack: bool = True
    bos: bool | None = None
    shuffle: bool | None = None
    seed: int = 0
    lines: bool = False
    documents: Iterable[str] | None = field(default=None, compare=False, repr=False)

    @property
    def from_hub(self) -> bool:
        """Return whether the text comes from the Hub."""
        if self.documents is not None:
            return False
        try:
            return self.data != PYDOC and not Path(self.data).expanduser().exists()
        except (OSError, RuntimeError):  # the name is too long, or "~user" names no user
            return True

    @property
    def shuffled(self) -> bool:
        """Return whether contexts are taken in random order."""
        return self.from_hub if self.shuffle is None else self.shuffle

    def arguments(self) -> dict[str, Any]:
        """Return what the tokens depend on, as `run.json` records it."""
        names = ("data", "tokens", "context", "split", "column", "pack", "bos")
        arguments: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.tokens >= ALL:
            arguments["tokens"] = "all"
        arguments |= {"shuffle": self.shuffled, "seed": self.seed}
        return arguments | ({"lines": True} if self.lines else {})


def parse_count(text: str) -> int:
    """Parse a count such as "4096", "100k", "1M" or "2.5M".

    Raises:
        PlanError: the text is not a positive whole number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB]?)", text.strip().replace("_", "").replace(",", ""))
    value = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()] if match else 0
    if value < 1 or value != int(value):
        raise PlanError(f"{text!r} is not a number of tokens: write for example 4096, 100k or 1M")
    return int(value)
