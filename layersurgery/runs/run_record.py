"""Say what `run.json` holds: the record of a run."""

from __future__ import annotations

from typing import Any, TypedDict

ModelFacts = TypedDict(
    "ModelFacts", {"class": str, "blocks": int, "parameters": int, "dtype": str, "device": str}
)  # "class" is a word of Python's, so a class body cannot name it
"""The measured model."""


class TextFacts(TypedDict):
    """Facts about the measured text."""

    fingerprint: str
    tokens: int
    sequences: int
    length: int
    notes: tuple[str, ...] | list[str]
    read: dict[str, Any]  # what it was made from: files, columns, numbers of documents, the chat template


class ScheduleFacts(TypedDict):
    """Facts about the order of computation."""

    order: str
    block_calls: int
    block_calls_apart: int
    bytes_read_a_batch: int


class StoppingFacts(TypedDict):
    """Facts about a run that stopped once its results were precise."""

    finished: int  # edits that were precise before the end of the text
    edits: int
    sequences: int  # of the text that any edit uses
    tokens: int  # positions measured in them
    block_call_tokens: int  # block calls of each batch, times its positions
    block_call_tokens_of_all_text: int


RunRecord = TypedDict(
    "RunRecord",
    {
        # From the start.
        "kind": str,
        "state": str,  # "begun" or "finished"
        "arguments": dict[str, Any],  # what the digits depend on
        "command": str,
        "replaced": list[str],  # results of another run that are being removed
        "batch_size": int,
        "until": dict[str, Any] | None,  # when the run stops before the end of the text
        "means": dict[str, Any],  # which means are added in the place of branches, and what they were measured on
        # From the end of a measurement on text.
        "model": ModelFacts,
        "text": TextFacts,
        "schedule": ScheduleFacts,
        "stopping": StoppingFacts | None,
        "sequences_at_once": int,
        "readout": str,
        "compiled": bool | str,  # or why compiled blocks were refused
        "contexts": str | None,  # "shared", or why contexts of requests were run for each of their continuations
        "centred": bool | None,
        "non_finite": dict[str, list[int]],  # batches with NaN or infinity, by plan or quantity
        "seconds": float,
        "tokens_per_second": float,
        "machine": dict[str, Any],
        # From the end of an analysis of windows, or of pairs of sentences.
        "windows": dict[str, int],
        "read": dict[str, Any],  # the searched text, as `TextFacts.read`
        "pairs": dict[str, int],
        "class": dict[str, Any],
        "caption": str,
        "summary": str,
        # From the end of every run.
        "skipped": dict[str, str],  # reasons, by what was skipped
        "files": list[str],
        "figures": list[str],
        "figure_error": str,
    },
    total=False,
)
"""The content of `run.json`."""
