"""Run a command in this process until its first number, and print where the time went, as one line of JSON.

`python -m benchmarks.first_number layersurgery sweep MODEL ...` runs the command line until the metrics of the unedited
model are there. `python -m benchmarks.first_number plain MODEL TOKENS` is the floor: transformers loads the model, runs
it once on the same tokens, and computes the same loss.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

_STARTED = time.perf_counter()
# The phase of each function; a function that another one calls counts for its own phase.
PHASES = {
    "layersurgery.runs.session": {"measure_text": "first number"},
    "layersurgery.runs.session_model": {"read_model_info": "config", "fingerprint": "hash of the weights"},
    "layersurgery.runs.session_text": {"read_text": "text"},
    "layersurgery.checkpoints.loading": {"tokenizer_of": "tokenizer", "load_weights": "weights"},
    "layersurgery.runs.sweep": {"Measurer": "checks"},
}
IMPORTS, OTHER = "imports", "other"


class Clock:
    """Adds up CPU and wall time by phase.

    Attributes:
        cpu_seconds: CPU time of this process, by phase.
        seconds: wall time, by phase.
        calls: number of calls of each phase.
    """

    def __init__(self) -> None:
        self.cpu_seconds: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._open = [OTHER]
        self._last = (0.0, _STARTED)

    def stop(self) -> None:
        """Add the time since the last change of phase to the current phase."""
        now = (time.process_time(), time.perf_counter())
        for total, start, end in zip((self.cpu_seconds, self.seconds), self._last, now, strict=True):
            total[self._open[-1]] = total.get(self._open[-1], 0.0) + end - start
        self._last = now

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed. An import that another import needs is part of that one."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if phase == self._open[-1] == IMPORTS:
                return function(*args, **kwargs)
            self.stop()
            self._open.append(phase)
            self.calls[phase] = self.calls.get(phase, 0) + 1
            try:
                return function(*args, **kwargs)
            finally:
                self.stop()
                self._open.pop()

        return run

    def finish(self, loss: float) -> None:
        """Print everything and end the process."""
        self.stop()
        facts = {"cpu_seconds": self.cpu_seconds, "seconds": self.seconds, "calls": self.calls, "loss_nats": loss}
        print(json.dumps(facts | {"modules": sorted({name.partition(".")[0] for name in sys.modules})}), flush=True)
        os._exit(0)  # what a command does at its end is not timed


def run_command(arguments: list[str], clock: Clock) -> None:
    """Run the command line until the metrics of the unedited model are there."""
    for module, functions in PHASES.items():
        loaded = importlib.import_module(module)  # the command imports it, too
        for name, phase in functions.items():
            setattr(loaded, name, clock.timed(phase, getattr(loaded, name)))
    from layersurgery_cli.__main__ import main

    from layersurgery.metrics.reference import METRICS
    from layersurgery.sweeps.batch_metrics import BatchMetrics

    add = BatchMetrics._add

    def add_first(self: BatchMetrics, *args: Any) -> None:
        add(self, *args)
        clock.finish(float(self.sums[0][:, METRICS.index("loss_nats")].sum() / sum(self._counts)))

    BatchMetrics._add = add_first  # type: ignore[method-assign,assignment]
    sys.argv[1:] = arguments
    main()


def run_plain(directory: str, tokens: int) -> float:
    """Return the loss that transformers alone gives for the first tokens of Python's help."""
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    ids: list[int] = []
    for name in sorted(topics):
        ids += [*tokenizer(topics[name], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= tokens:
            break
    with torch.no_grad():
        batch = torch.tensor([ids[:tokens]])
        return float(model(batch, labels=batch).loss)


if __name__ == "__main__":
    clock = Clock()
    builtins.__import__ = clock.timed(IMPORTS, builtins.__import__)
    importlib.import_module = clock.timed(IMPORTS, importlib.import_module)
    if sys.argv[1] == "plain":
        clock.finish(run_plain(sys.argv[2], int(sys.argv[3])))
    run_command(sys.argv[2:], clock)
