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
DEFAULT_SPLIT = "train"
ALL = 1 << 40
"""Number of tokens that stands for all of them."""


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Request for text.

    Attributes:
        data: "pydoc", a file (.txt, .jsonl, .json, .csv or .tsv, also compressed as .zst or .gz, or .parquet), a
            directory of such files, a directory that datasets' `save_to_disk` wrote, or the id of a Hub dataset
            ("id:configuration" if it has several configurations).
        tokens: number of tokens; rounded up to whole contexts.
        context: largest number of tokens of one sequence.
        split: split of a Hub dataset or of a saved dataset of several splits.
        column: the column that contains the texts or the conversations, for tables; None for text, or else messages,
            conversations or conversation.
        pack: join documents with the end-of-text token and cut them into contexts; otherwise each document is one
            sequence.
        bos: begin each sequence with the tokenizer's beginning-of-text token; None does what the tokenizer does.
        shuffle: take contexts in random order instead of from the start; None means yes for a Hub dataset, no for other
            text.
        seed: seed for shuffling.
        lines: each line of a text file is one document.
        documents: texts, conversations or the rows of a dataset that were given from Python; `data` is then a name for
            them.
    """

    data: str
    tokens: int
    context: int
    split: str = DEFAULT_SPLIT
    column: str | None = None
    pack: bool = True
    bos: bool | None = None
    shuffle: bool | None = None
    seed: int = 0
    lines: bool = False
    documents: Iterable[Any] | None = field(default=None, compare=False, repr=False)

    @property
    def from_hub(self) -> bool:
        """Return whether the text comes from the Hub."""
        return self.documents is None and self.data != PYDOC and self.path is None

    @property
    def path(self) -> Path | None:
        """Return the file or directory that `data` names; None if it names none."""
        if self.documents is not None or self.data == PYDOC:
            return None
        try:
            path = Path(self.data).expanduser()
            return path if path.exists() else None
        except (OSError, RuntimeError):  # the name is too long, or "~user" names no user
            return None

    @property
    def shuffled(self) -> bool:
        """Return whether contexts are taken in random order."""
        return self.from_hub if self.shuffle is None else self.shuffle

    def arguments(self) -> dict[str, Any]:
        """Return what the tokens depend on, as `run.json` records it."""
        names = ("data", "tokens", "context", "split", "column", "pack", "bos")
        arguments: dict[str, Any] = {name: getattr(self, name) for name in names} | {"column": self.column or "text"}
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
