"""Edit a checkpoint on disk without loading it, look at what was written, and let the edited model speak.

Run it with: python examples/04_edit_a_checkpoint.py
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import pipeline

import layersurgery as ls

plan = ls.swap(12) + ls.drop(20)
print(f"{plan}  ->  {plan.route(30)}")

with TemporaryDirectory() as directory:
    out = Path(directory) / "edited"
    # Tensors are renamed in the headers of the files and bytes are moved by the kernel: no weight is read into memory.
    result = ls.edit_checkpoint("smollm2-135m", plan, out)
    print(
        f"{len(result.route)} blocks from {result.depth}, {result.bytes_written / 1e6:.0f} MB in {result.seconds:.1f} s"
    )

    # The config follows, tokenizer and licence come along, and a model card says what was done.
    print(f"layers now: {json.loads((out / 'config.json').read_text())['num_hidden_layers']}")
    print(", ".join(sorted(path.name for path in out.iterdir())))

    # Nothing of layersurgery is needed to run it.
    speak = pipeline("text-generation", model=str(out), device="cpu")
    print(repr(speak("The capital of France is", max_new_tokens=12, do_sample=False)[0]["generated_text"]))

    # A plan that does not fit the model is refused before a byte is written, and says why.
    try:
        ls.edit_checkpoint("smollm2-135m", ls.swap(40), out, overwrite=True)
    except ls.PlanError as error:
        print(f"refused: {error}")

    # What an output already holds is not overwritten unasked.
    try:
        ls.edit_checkpoint("smollm2-135m", ls.drop(3), out)
    except ls.OutputError as error:
        print(f"refused: {str(error).replace(directory, '')}")
