"""The options of a measuring command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """What `sweep` takes beside the model; `analyze` and `stages` take some of it."""

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
    def of(cls, **given: Any) -> MeasureOptions:
        """Those given, and what the others are where nobody says anything."""
        usual: dict[str, Any] = dict.fromkeys(cls.__dataclass_fields__) | {
            "split": "train", "column": "text", "seed": 0, "pack": True, "bos": False, "dtype": "auto", "compile": False,
            "overwrite": False, "per_token": False, "estimate": False,
        }  # fmt: skip
        return cls(**usual | given)
