"""Write a table with a row for each token and model.

During the run, each batch is one file. At the end, the files are joined into one table.
"""

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
    """Rows of one batch.

    Args:
        variants: the measured models, the unedited one first.
        ids: tokens of the batch, (sequences, length).
        mask: 1 for a token and 0 for padding, the same shape.
        first: number of its first sequence.
        tokenizer: writes tokens as text; if None, the column "token" is empty.
    """

    def __init__(
        self, variants: Sequence[Variant], ids: torch.Tensor, mask: torch.Tensor, first: int, tokenizer: Any = None
    ) -> None:
        self.variants = variants
        sequence, position = (index.numpy() for index in torch.where(has_next_token(mask)))
        tokens = ids.numpy()
        decode = _make_decoder(tokenizer)
        token_ids = tokens[sequence, position]
        self._columns: dict[str, Any] = {
            "sequence": pa.array(sequence + first, pa.int32()),
            "position": pa.array(position, pa.int32()),
            "token_id": pa.array(token_ids, pa.int32()),
            "token": pa.array([decode(int(token)) for token in token_ids], pa.string()),
            "next_token_id": pa.array(tokens[sequence, position + 1], pa.int32()),
        }
        self._metrics: dict[int, np.ndarray[Any, Any]] = {}

    def __call__(self, rows: Sequence[int], metrics: torch.Tensor) -> None:
        """Store the metrics of some rows' models at all positions, (len(METRICS), positions)."""
        values = metrics.float().cpu().numpy()
        self._metrics.update(dict.fromkeys(rows, values))

    def write(self, path: Path) -> None:
        """Write the rows in the order of models, sequences and positions."""
        with (
            atomic_file(path) as partial,
            pq.ParquetWriter(partial, self._table(0).schema, compression="zstd") as writer,
        ):
            for row in sorted(self._metrics):
                writer.write_table(self._table(row))

    def _table(self, row: int) -> pa.Table:
        variant, values = self.variants[row], self._metrics[row]
        count = values.shape[1]
        labels = {"edit": variant.edit, "plan": variant.plan, "name": variant.name}
        columns = {"row": pa.array(np.full(count, row), pa.int32())}
        columns |= {key: pa.array([value] * count, pa.string()) for key, value in labels.items()}
        columns |= self._columns
        columns |= {metric: pa.array(values[index]) for index, metric in enumerate(METRICS)}
        return pa.table(columns)


def is_complete(path: Path) -> bool:
    """Return whether a batch's file exists and can be read."""
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def _make_decoder(tokenizer: Any) -> Any:
    """Return a function from a token id to its text, with a cache; it returns None if there is no tokenizer."""
    if tokenizer is None:
        return lambda _: None
    return lru_cache(maxsize=None)(lambda token: tokenizer.decode([token]))


def join_parts(parts: Sequence[Path], path: Path) -> None:
    """Join the batches' files into one table, with one row group for each batch.

    Only one batch is in memory at a time.
    """
    with atomic_file(path) as partial:
        schema = pq.read_schema(parts[0])
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for part in parts:
                with pq.ParquetFile(part) as file:
                    writer.write_table(file.read())
