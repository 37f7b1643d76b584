"""Write a table with a row for each token and model.

During the run, each batch is one file. At the end, the files are joined into one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..atomic_io import atomic_file
from ..metrics.aggregation import BatchResult
from ..metrics.reference import METRICS, TOKEN_TAILS
from ..plans.variants import Variant
from ..runtime.inputs import has_next_token

if TYPE_CHECKING:
    import pyarrow as pa

TOKENS = "tokens.parquet"
PARTS = "tokens.parts"


def write_batch(
    path: Path,
    variants: Sequence[Variant],
    ids: torch.Tensor,
    mask: torch.Tensor,
    result: BatchResult,
    tokenizer: Any = None,
) -> None:
    """Write the rows of one batch, in the order of models, sequences and positions.

    Args:
        path: the file.
        variants: the measured models, the unedited one first.
        ids: tokens of the batch, (sequences, length).
        mask: 1 for a token and 0 for padding, the same shape.
        result: the batch's result, with its metrics at each position.
        tokenizer: writes tokens as text; if None, the column "token" is empty.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sequence, position = (index.numpy() for index in torch.where(has_next_token(mask)))
    tokens, decode = ids.numpy(), _make_decoder(tokenizer)
    token_ids = tokens[sequence, position]
    positions = {
        "sequence": pa.array(sequence + result.first, pa.int32()),
        "position": pa.array(position, pa.int32()),
        "token_id": pa.array(token_ids, pa.int32()),
        "token": pa.array([decode(int(token)) for token in token_ids], pa.string()),
        "next_token_id": pa.array(tokens[sequence, position + 1], pa.int32()),
    }
    metrics_by_row = {
        row: metrics.float().numpy() for rows, metrics in (result.token_metrics or {}).items() for row in rows
    }

    def table(row: int) -> pa.Table:
        variant, count = variants[row], len(sequence)
        labels = {"edit": variant.edit, "plan": variant.plan, "name": variant.name}
        columns = {"row": pa.array(np.full(count, row), pa.int32())}
        columns |= {key: pa.array([value] * count, pa.string()) for key, value in labels.items()}
        columns |= positions
        # Without tails, their rows are missing.
        columns |= dict(zip((*METRICS, *TOKEN_TAILS), map(pa.array, metrics_by_row[row]), strict=False))
        return pa.table(columns)

    with atomic_file(path) as partial, pq.ParquetWriter(partial, table(0).schema, compression="zstd") as writer:
        for row in sorted(metrics_by_row):
            writer.write_table(table(row))


def is_complete(path: Path) -> bool:
    """Return whether a batch's file exists and can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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
    import pyarrow.parquet as pq

    with atomic_file(path) as partial:
        schema = pq.read_schema(parts[0])
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for part in parts:
                with pq.ParquetFile(part) as file:
                    writer.write_table(file.read())
