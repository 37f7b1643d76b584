"""Rows for each single token, written as the sweep goes: one file a batch, joined into one table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..atomic_io import atomic_file
from ..metrics.reference import METRICS
from ..plans.variants import Variant
from ..runtime.inputs import has_next_token

TOKENS = "tokens.parquet"
PARTS = "tokens.parts"


class TokenRows:
    """The rows of one batch.

    Args:
        variants: the models measured, the unedited one first.
        ids: tokens of the batch, (sequences, length).
        mask: 1 for a token and 0 for padding, the same shape.
        first: number of its first sequence.
        tokenizer: to write tokens as text; None to leave that out.
    """

    def __init__(
        self, variants: Sequence[Variant], ids: torch.Tensor, mask: torch.Tensor, first: int, tokenizer: Any = None
    ) -> None:
        self.variants = variants
        sequence, position = (place.numpy() for place in torch.where(has_next_token(mask)))
        tokens = ids.numpy()
        text = _decoder(tokenizer)
        here = tokens[sequence, position]
        self._columns: dict[str, Any] = {
            "sequence": pa.array(sequence + first, pa.int32()),
            "position": pa.array(position, pa.int32()),
            "token_id": pa.array(here, pa.int32()),
            "token": pa.array([text(int(token)) for token in here], pa.string()),
            "next_token_id": pa.array(tokens[sequence, position + 1], pa.int32()),
        }
        self._metrics: dict[int, np.ndarray[Any, Any]] = {}

    def __call__(self, rows: Sequence[int], metrics: torch.Tensor) -> None:
        """Take in the metrics of some models at all positions, (len(METRICS), positions)."""
        values = metrics.float().cpu().numpy()
        self._metrics.update(dict.fromkeys(rows, values))

    def write(self, path: Path) -> None:
        """Write the rows, by model, sequence and position."""
        with (
            atomic_file(path) as partial,
            pq.ParquetWriter(partial, self._table(0).schema, compression="zstd") as writer,
        ):
            for row in sorted(self._metrics):
                writer.write_table(self._table(row))

    def _table(self, row: int) -> pa.Table:
        variant, values = self.variants[row], self._metrics[row]
        count = values.shape[1]
        named = {"edit": variant.edit, "plan": variant.plan, "name": variant.name}
        columns = {"row": pa.array(np.full(count, row), pa.int32())}
        columns |= {key: pa.array([value] * count, pa.string()) for key, value in named.items()}
        columns |= self._columns
        columns |= {metric: pa.array(values[place]) for place, metric in enumerate(METRICS)}
        return pa.table(columns)


def is_complete(path: Path) -> bool:
    """Whether a batch's file is there and can be read."""
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def _decoder(tokenizer: Any) -> Any:
    if tokenizer is None:
        return lambda _: None
    return lru_cache(maxsize=None)(lambda token: tokenizer.decode([token]))


def join_parts(parts: Sequence[Path], path: Path) -> None:
    """Write one table of the batches' files, a row group at a time."""
    with atomic_file(path) as partial:
        schema = pq.read_schema(parts[0])
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for part in parts:
                with pq.ParquetFile(part) as file:
                    writer.write_table(file.read())
