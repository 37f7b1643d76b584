"""Say how much text a run measured, and how long it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def run_cost(facts: Mapping[str, Any]) -> str:
    """Say how much of the text was measured, in how many seconds, and what was saved where edits stopped before."""
    seconds, stopping = facts["seconds"], facts.get("stopping")
    if stopping is None:
        per_second = facts["tokens_per_second"]
        rate = f"{per_second:,.0f} tokens/s" if per_second >= 10 else f"{per_second:.2g} tokens/s"
        requests = f"{facts['text']['sequences']:,} requests of " if "requests" in facts["text"].get("read", {}) else ""
        return f"{requests}{facts['text']['tokens']:,} tokens in {seconds:,.0f} s ({rate})"
    noun = "request" if "requests" in facts["text"].get("read", {}) else "sequence"
    share = stopping["block_call_tokens"] / max(1, stopping["block_call_tokens_of_all_text"])
    return (
        f"{stopping['sequences']:,} of {facts['text']['sequences']:,} {noun}s in {seconds:,.0f} s; "
        f"{float(f'{100 * share:.2g}'):g} % of the block calls that all the text takes"
    )
