"""Run `layersurgery demo`: edit the bundled model and compare it with the original."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from layersurgery.atomic_io import check_output
from layersurgery.checkpoints.checkpoint import read_checkpoint
from layersurgery.checkpoints.edit_checkpoint import write_edit
from layersurgery.checkpoints.model_packages import EMBEDDED
from layersurgery.checkpoints.prepared_edit import plan_edit
from layersurgery.checkpoints.sources import find_source, needs_conversion
from layersurgery.library_logs import quiet_libraries
from layersurgery.plans.plan import swap
from layersurgery.units import format_bytes

from ..terminal.console import Console

if TYPE_CHECKING:
    import torch

_PROMPTS = ("The capital of France is", "Water boils at", "To make bread, you need")
_TOKENS = 513  # 512 of them have a next token
_NEW_TOKENS = 16


def run_demo(output: Path, overwrite: bool, console: Console) -> None:
    """Swap two layers, write the checkpoint, load both models in pipelines, and compare them."""
    console.log(f"This swaps blocks 12 and 13 of {EMBEDDED}, a real model of 30 blocks, and measures the effect.\n")
    converting = "1. Converting the bundled GGUF file to safetensors (once, about half a minute)"
    with console.status(converting if needs_conversion(EMBEDDED) else "1. Finding the model"):
        source = find_source(EMBEDDED)
    check_output(output, source.directory, overwrite=overwrite)
    plan = swap(12)
    console.log("2. Copying the weights, and checking that the edited checkpoint will reload as the intended model")
    planned = plan_edit(read_checkpoint(source), plan)
    console.log(f"   {plan}: the residual stream now visits {planned.route}")
    with console.byte_progress(planned.nbytes) as progress:
        result = write_edit(planned, output, overwrite=overwrite, progress=progress)
    console.log(f"3. Wrote {output} ({format_bytes(result.bytes_written)} in {result.seconds:.1f} s)")
    started = time.perf_counter()
    with console.status('4. Loading both models in transformers.pipeline("text-generation")'):
        continuations, metrics = _compare(source.directory, output)
    console.log(f"   ({time.perf_counter() - started:.0f} s)\n")
    # Started by `uv run`, the program may not be on the path of the shell.
    program = "uv run layersurgery" if "UV_RUN_RECURSION_DEPTH" in os.environ else "layersurgery"
    lines = []
    for prompt, (before, after) in continuations.items():
        lines += [f"[dim]{prompt}[/]", escape(f"  before: {before!r}"), escape(f"  after:  {after!r}")]
    lines += [
        "",
        f"KL from the original: {metrics['kl_nats']:.3f} nats per token; {100 * metrics['agreement']:.0f} % of the top "
        f"next tokens agree ({metrics['tokens']} tokens of Python's own help text)",
        "",
        "Try next:",
        f"  {program} inspect {EMBEDDED}",
        f"  {program} drop {EMBEDDED} --layer 20",
        f"  {program} plan {EMBEDDED} --plan 'repeat 8:12; skip-attention 20'",
    ]
    value = {
        "path": str(output),
        "plan": str(plan),
        "route": str(planned.route),
        **metrics,
        "continuations": continuations,
    }
    console.result(value, *lines)


@quiet_libraries()
def _compare(before: Path, after: Path) -> tuple[dict[str, tuple[str, str]], dict[str, Any]]:
    import torch
    from transformers import pipeline

    from layersurgery import compare

    pipes = [
        pipeline("text-generation", model=str(path), device="cpu", dtype=torch.float32) for path in (before, after)
    ]
    generated = [
        [
            pipe(prompt, max_new_tokens=_NEW_TOKENS, do_sample=False, return_full_text=False)[0]["generated_text"]
            for prompt in _PROMPTS
        ]
        for pipe in pipes
    ]
    continuations = {prompt: (generated[0][i], generated[1][i]) for i, prompt in enumerate(_PROMPTS)}
    result = compare(pipes[0].model, pipes[1].model, _help_text(pipes[0].tokenizer))
    return continuations, {"kl_nats": result.kl_nats, "agreement": result.agreement, "tokens": result.tokens}


def _help_text(tokenizer: Any) -> torch.Tensor:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids: torch.Tensor = tokenizer(text[: 8 * _TOKENS], return_tensors="pt").input_ids[:, :_TOKENS]
    return ids
