"""Define the options of the measuring commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """Options of `sweep` other than the model; other measuring commands take some of them."""

    edits: str | None
    plans: Path | None
    layers: str | None
    data: str | None
    split: str
    column: str
    tokens: str | None
    context: int | None
    seed: int
    shuffle: bool | None
    pack: bool
    bos: bool
    tokenizer: str | None
    batch_size: int | None
    dtype: str
    device: str | None
    device_map: str | None
    max_memory: str | None
    offload_folder: Path | None
    schedule: str | None
    compile: bool
    output: Path | None
    overwrite: bool
    per_token: bool
    revision: str | None
    blocks: str | None
    estimate: bool

    @classmethod
    def of(cls, **options: Any) -> MeasureOptions:
        """Return the given options, with defaults for all others."""
        defaults: dict[str, Any] = dict.fromkeys(cls.__dataclass_fields__) | {
            "split": "train",
            "column": "text",
            "seed": 0,
            "pack": True,
            "bos": False,
            "dtype": "auto",
            "compile": False,
            "overwrite": False,
            "per_token": False,
            "estimate": False,
        }
        return cls(**defaults | options)
