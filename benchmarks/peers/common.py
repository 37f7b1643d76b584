"""Share arguments, model loading, dense metrics, timing and the results file between the scripts.

The scripts run in the environments of other libraries, so this module imports only numpy, torch and transformers.
Import it before transformers: it puts the Hugging Face Hub in offline mode.
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

# EleutherAI/pythia-*: width, number of blocks, number of heads, size of the vocabulary.
GEOMETRIES = {
    "pythia-410m": (1024, 24, 16, 50304),
    "pythia-1.4b": (2048, 24, 16, 50304),
    "pythia-2.8b": (2560, 32, 32, 50304),
    "pythia-6.9b": (4096, 32, 32, 50432),
    "tiny": (64, 4, 4, 503),  # to test the benchmarks themselves
}


class UnsupportedError(Exception):
    """The library cannot do the requested measurement; the message says why."""


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
    """Measurement that a script does.

    Attributes:
        model: directory of a checkpoint, or a key of `GEOMETRIES`.
        dtype: of the weights.
        device: of the model.
        tokens: token ids, (sequences, length).
        batch_size: sequences in one batch.
        edits: edits to measure.
    """

    model: str
    dtype: torch.dtype
    device: str
    tokens: torch.Tensor
    batch_size: int
    edits: list[Edit]

    def batches(self) -> Iterator[torch.Tensor]:
        """Yield the batches of tokens, on the device."""
        for batch in torch.split(self.tokens, self.batch_size):
            yield batch.to(self.device)


class Means:
    """Means of the metrics over all positions that have a next token, for each edit."""

    def __init__(self) -> None:
        self._sums: dict[Edit, torch.Tensor] = {}
        self._counts: dict[Edit, int] = {}

    def add(self, edit: Edit, values: torch.Tensor) -> None:
        """Add the metrics of some positions, (len(METRICS), positions)."""
        self._sums[edit] = self._sums.get(edit, 0) + values.double().sum(-1)
        self._counts[edit] = self._counts.get(edit, 0) + values.shape[-1]

    def rows(self) -> Rows:
        """Return one row per edit: its plan and the mean of each metric."""
        return [
            {"plan": edit.plan} | dict(zip(METRICS, (sums / self._counts[edit]).tolist(), strict=True))
            for edit, sums in self._sums.items()
        ]


def measure_batches(
    task: Task, unedited: Callable[[torch.Tensor], torch.Tensor], edited: Callable[[torch.Tensor, Edit], torch.Tensor]
) -> Rows:
    """Measure every edit, and run the unedited model once per batch.

    Args:
        task: the measurement.
        unedited: returns the logits of the unedited model for a batch.
        edited: returns the logits of the edited model for a batch.

    Returns:
        One row per edit.
    """
    means = Means()
    for batch in task.batches():
        p = log_probabilities(unedited(batch))
        for edit in task.edits:
            means.add(edit, metrics(p, log_probabilities(edited(batch, edit)), batch))
    return means.rows()


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return float32 log probabilities at the positions that have a next token.

    Args:
        logits: (batch, length, vocabulary).
    """
    return logits[:, :-1].float().log_softmax(-1)


def metrics(p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Compute the metrics densely, straight from their definitions.

    Args:
        p: log probabilities of the unedited model.
        q: log probabilities of the edited model.
        tokens: token ids, (batch, length).

    Returns:
        Metrics, (len(METRICS), positions).
    """
    q_probabilities = q.exp()
    values = [
        (p.exp() * (p - q)).sum(-1),
        (p.argmax(-1) == q.argmax(-1)).float(),
        -(q_probabilities * q).sum(-1) / math.log(2),
        -q.gather(-1, tokens[:, 1:, None])[..., 0],
    ]
    return torch.stack([value.flatten() for value in values])


def load_with_transformers(task: Task) -> Any:
    """Load the model with transformers; for a key of `GEOMETRIES`, build it with random weights."""
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


def synchronize(device: str) -> None:
    """Wait until the device has finished all its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments that all scripts take."""
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
    parser.add_argument("--repeats", type=int, default=1, help="times that the loaded model measures all edits")
    parser.add_argument("--option", action="append", default=[])
    return parser


def main(
    library: str,
    load: Callable[[Task], Any],
    measure: Callable[[Any, Task], Rows],
    supported: tuple[str, ...] = ("swap", "drop"),
) -> None:
    """Load the model, warm up with one edit of one batch, measure all edits, and write the results file.

    Args:
        library: name of the library's package.
        load: returns what `measure` needs.
        measure: returns one row per edit.
        supported: kinds of edits that the library can do.
    """
    args = argument_parser().parse_args()
    edits = [
        Edit(kind, layer)
        for kind in args.edits.split(",")
        for layer in range(args.depth - (kind == "swap"))
        if kind in supported
    ]
    tokens = torch.from_numpy(np.load(args.tokens)[: args.sequences])
    task = Task(args.model, getattr(torch, args.dtype), args.device, tokens, args.at_once, edits)
    try:
        if not edits:
            raise UnsupportedError(f"it supports none of these edits: {args.edits}")
        model = load(task)
        with torch.inference_mode():
            measure(
                model, Task(task.model, task.dtype, task.device, tokens[: task.batch_size], task.batch_size, edits[:1])
            )
            synchronize(task.device)
            seconds = []
            for _ in range(args.repeats):
                started = time.perf_counter()
                rows = measure(model, task)
                synchronize(task.device)
                seconds.append(time.perf_counter() - started)
    except UnsupportedError as error:
        sys.exit(f"{library}: {error}")
    write(args.out, library, rows, seconds, tokens.numel(), args.device)


def library_version(library: str) -> str:
    """Return the version of a library; of a checkout that is not installed, the one that its code states."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module(library).__version__)


def write(out: Path, library: str, rows: Rows, seconds: list[float], tokens: int, device: str, **more: Any) -> None:
    """Write the results file as JSON; `seconds` has the time of each repeat, and `more` adds fields."""
    results = {
        "version": library_version(library), "torch": torch.__version__, "seconds": seconds,
        "tokens": tokens, "rows": rows,
        "bytes_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes_peak_device": torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0,
    }  # fmt: skip
    out.write_text(json.dumps(results | more), encoding="utf-8")
