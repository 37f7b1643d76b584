"""Edit a checkpoint on disk without loading it, look at the output, and generate text with the edited model.

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
    # Tensors are renamed in the file headers, and the operating system copies the bytes. No weight is read into memory.
    result = ls.edit_checkpoint("smollm2-135m", plan, out)
    print(
        f"{len(result.route)} blocks from {result.depth}, {result.bytes_written / 1e6:.0f} MB in {result.seconds:.1f} s"
    )

    # The config is updated, tokenizer and license are copied, and a model card describes the edit.
    print(f"layers now: {json.loads((out / 'config.json').read_text('utf-8'))['num_hidden_layers']}")
    print(", ".join(sorted(path.name for path in out.iterdir())))

    # The edited model runs without layersurgery.
    generate = pipeline("text-generation", model=str(out), device="cpu")
    print(repr(generate("The capital of France is", max_new_tokens=12, do_sample=False)[0]["generated_text"]))

    # A plan that does not fit the model is refused before anything is written. The error gives the reason.
    try:
        ls.edit_checkpoint("smollm2-135m", ls.swap(40), out, overwrite=True)
    except ls.PlanError as error:
        print(f"refused: {error}")

    # An existing output is not overwritten without `overwrite=True`.
    try:
        ls.edit_checkpoint("smollm2-135m", ls.drop(3), out)
    except ls.OutputError as error:
        print(f"refused: {str(error).replace(directory, '')}")
