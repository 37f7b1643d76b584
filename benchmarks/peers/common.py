"""What the scripts share: arguments, models, dense metrics, timing, and the file of results.

They run in environments of other packages, so this imports numpy, torch and transformers only. Import it before transformers: it
turns the hub off.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import numpy as np
import torch

Rows = list[dict[str, Any]]
METRICS = ("kl_nats", "agreement", "entropy_bits", "loss_nats")

# Of EleutherAI/pythia-*: width, blocks, heads, vocabulary.
GEOMETRIES = {
    "pythia-410m": (1024, 24, 16, 50304),
    "pythia-1.4b": (2048, 24, 16, 50304),
    "pythia-2.8b": (2560, 32, 32, 50304),
    "pythia-6.9b": (4096, 32, 32, 50432),
}


class CannotError(Exception):
    """The library cannot do what was asked for; says why."""


@dataclass(frozen=True)
class Edit:
    """A swap of blocks `layer` and `layer + 1`, or a drop of block `layer`."""

    kind: str
    layer: int

    @property
    def plan(self) -> str:
        return f"swap {self.layer} {self.layer + 1}" if self.kind == "swap" else f"drop {self.layer}"


@dataclass(frozen=True)
class Task:
    """What to measure: tokens (sequences, length), so many sequences at once, every edit."""

    model: str
    dtype: torch.dtype
    device: str
    tokens: torch.Tensor
    at_once: int
    edits: list[Edit]

    def batches(self) -> Iterator[torch.Tensor]:
        for batch in torch.split(self.tokens, self.at_once):
            yield batch.to(self.device)


class Means:
    """Means over all positions that have a next token, for each edit."""

    def __init__(self) -> None:
        self._sums: dict[Edit, torch.Tensor] = {}
        self._counts: dict[Edit, int] = {}

    def add(self, edit: Edit, values: torch.Tensor) -> None:
        """Take in metrics, (len(METRICS), positions)."""
        self._sums[edit] = self._sums.get(edit, 0) + values.double().sum(-1)
        self._counts[edit] = self._counts.get(edit, 0) + values.shape[-1]

    def rows(self) -> Rows:
        return [
            {"plan": edit.plan} | dict(zip(METRICS, (sums / self._counts[edit]).tolist(), strict=True))
            for edit, sums in self._sums.items()
        ]


def batched(
    task: Task, unedited: Callable[[torch.Tensor], torch.Tensor], edited: Callable[[torch.Tensor, Edit], torch.Tensor]
) -> Rows:
    """Logits of the unedited model once a batch, those of each edit beside them, and the metrics."""
    means = Means()
    for batch in task.batches():
        p = log_probabilities(unedited(batch))
        for edit in task.edits:
            means.add(edit, metrics(p, log_probabilities(edited(batch, edit)), batch))
    return means.rows()


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Of positions that have a next token, float32, for logits (batch, length, vocabulary)."""
    return logits[:, :-1].float().log_softmax(-1)


def metrics(p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Dense metrics as anybody would write them, (len(METRICS), positions), of two results of `log_probabilities`."""
    weights = q.exp()
    values = [
        (p.exp() * (p - q)).sum(-1),
        (p.argmax(-1) == q.argmax(-1)).float(),
        -(weights * q).sum(-1) / math.log(2),
        -q.gather(-1, tokens[:, 1:, None])[..., 0],
    ]
    return torch.stack([value.flatten() for value in values])


def load_plain(task: Task) -> Any:
    """The model through transformers; of a geometry's name, with random weights."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    if task.model in GEOMETRIES:
        width, depth, heads, vocabulary = GEOMETRIES[task.model]
        config = GPTNeoXConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
        )
        torch.manual_seed(0)
        with torch.device(task.device):
            return AutoModelForCausalLM.from_config(config, dtype=task.dtype).eval()
    return AutoModelForCausalLM.from_pretrained(task.model, dtype=task.dtype).eval().to(task.device)


def wait(device: str) -> None:
    """Until a device has done all its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--edits", default="swap,drop")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--option", action="append", default=[])
    return parser


def main(
    library: str,
    load: Callable[[Task], Any],
    measure: Callable[[Any, Task], Rows],
    supported: tuple[str, ...] = ("swap", "drop"),
) -> None:
    """Load, warm up on one edit of one batch, measure, and write what was found."""
    asked = arguments().parse_args()
    edits = [
        Edit(kind, layer)
        for kind in asked.edits.split(",")
        for layer in range(asked.depth - (kind == "swap"))
        if kind in supported
    ]
    tokens = torch.from_numpy(np.load(asked.tokens)[: asked.sequences])
    task = Task(asked.model, getattr(torch, asked.dtype), asked.device, tokens, asked.at_once, edits)
    try:
        if not edits:
            raise CannotError(f"it has no {asked.edits}")
        model = load(task)
        with torch.inference_mode():
            measure(model, Task(task.model, task.dtype, task.device, tokens[: task.at_once], task.at_once, edits[:1]))
            wait(task.device)
            started = time.perf_counter()
            rows = measure(model, task)
            wait(task.device)
            seconds = time.perf_counter() - started
    except CannotError as reason:
        sys.exit(f"{library}: {reason}")
    write(asked.out, library, rows, seconds, tokens.numel(), asked.device)


def write(out: Path, library: str, rows: Rows, seconds: float, tokens: int, device: str, **more: Any) -> None:
    """Write the file of results."""
    found = {
        "version": importlib.metadata.version(library), "torch": torch.__version__, "seconds": seconds, "tokens": tokens, "rows": rows,
        "bytes_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes_peak_device": torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0,
    }  # fmt: skip
    out.write_text(json.dumps(found | more))
