"""`layersurgery demo`: the main job, whole, on the embedded model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from layersurgery.atomic_io import check_output
from layersurgery.checkpoints.edit_checkpoint import prepare_edit, read_checkpoint, write_edit
from layersurgery.checkpoints.sources import EMBEDDED, find_source, needs_conversion
from layersurgery.plans.plan import swap

from ..terminal.console import Console, format_bytes

if TYPE_CHECKING:
    import torch

_PROMPTS = ("The capital of France is", "Water boils at", "To make bread, you need")
_TOKENS = 513  # of which 512 have a next one
_NEW_TOKENS = 16


def run_demo(output: Path, overwrite: bool, console: Console) -> None:
    """Swap two layers, save, load both models in a pipeline, and compare them."""
    console.log(f"This swaps blocks 12 and 13 of {EMBEDDED}, a real model of 30 blocks, and looks at what it does.\n")
    converting = "1. Converting the embedded GGUF file to safetensors (once, about half a minute)"
    with console.status(converting if needs_conversion(EMBEDDED) else "1. Finding the model"):
        source = find_source(EMBEDDED)
    check_output(output, source.directory, overwrite=overwrite)
    plan = swap(12)
    with console.status("2. Checking that a reload of the edited checkpoint would be the model meant"):
        sketch = prepare_edit(read_checkpoint(source), plan)
    console.log(f"   {plan}: the stream now visits {sketch.route}")
    with console.byte_progress(sketch.nbytes) as progress:
        edited = write_edit(sketch, output, overwrite=overwrite, progress=progress)
    console.log(f"3. Wrote {output} ({format_bytes(edited.bytes_written)} in {edited.seconds:.1f} s)")
    started = time.perf_counter()
    with console.status('4. Loading both in transformers.pipeline("text-generation")'):
        continuations, divergence = _compare(source.directory, output)
    console.log(f"   ({time.perf_counter() - started:.0f} s)\n")
    lines = []
    for prompt, (before, after) in continuations.items():
        lines += [f"[dim]{prompt}[/]", escape(f"  before: {before!r}"), escape(f"  after:  {after!r}")]
    lines += [
        "",
        f"KL between them: {divergence['kl_nats']:.3f} nats a token, and {100 * divergence['agreement']:.0f} % of their next "
        f"words agree ({divergence['tokens']} tokens of Python's own help text)",
        "",
        "Try next:",
        f"  layersurgery inspect {EMBEDDED}",
        f"  layersurgery drop {EMBEDDED} --layer 20",
        f"  layersurgery plan {EMBEDDED} --plan 'repeat 8:12; skip-attention 20'",
    ]
    value = {
        "path": str(output),
        "plan": str(plan),
        "route": str(sketch.route),
        **divergence,
        "continuations": continuations,
    }
    console.result(value, *lines)


def _compare(before: Path, after: Path) -> tuple[dict[str, tuple[str, str]], dict[str, Any]]:
    import torch
    from transformers import pipeline
    from transformers.utils import logging

    from layersurgery import compare

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipes = [
        pipeline("text-generation", model=str(path), device="cpu", dtype=torch.float32) for path in (before, after)
    ]
    written = [
        [
            pipe(prompt, max_new_tokens=_NEW_TOKENS, do_sample=False, return_full_text=False)[0]["generated_text"]
            for prompt in _PROMPTS
        ]
        for pipe in pipes
    ]
    continuations = {prompt: (written[0][i], written[1][i]) for i, prompt in enumerate(_PROMPTS)}
    found = compare(pipes[0].model, pipes[1].model, _help_text(pipes[0].tokenizer))
    return continuations, {"kl_nats": found.kl_nats, "agreement": found.agreement, "tokens": found.tokens}


def _help_text(tokenizer: Any) -> torch.Tensor:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids: torch.Tensor = tokenizer(text[: 8 * _TOKENS], return_tensors="pt").input_ids[:, :_TOKENS]
    return ids
