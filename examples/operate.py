"""Operate on a live model, let it speak, undo; then keep an edit, save it, and load it in a pipeline."""

from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import torch
from transformers import pipeline

import layersurgery as ls

model, tokenizer = ls.load("smollm2-135m")
print(ls.anatomy(model))

prompt = tokenizer("The capital of France is", return_tensors="pt")
text = tokenizer(topics["for"] + topics["while"], return_tensors="pt").input_ids[:, :256]


def speak() -> str:
    tokens = model.generate(**prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)
    return repr(tokenizer.decode(tokens[0, prompt.input_ids.shape[1] :]))


# For a while: inside the block the model is edited, behind it it is what it was, bit for bit.
logits = model(text).logits
plans: list[ls.Plan | str] = [ls.Plan(), "swap 12 13", "drop 20", "repeat 8:10", "skip-attention 20", "skip-mlp 20"]
for plan in plans:
    found = ls.compare(model, plan, text)
    with ls.operate(model, plan):
        print(f"{str(plan) or 'unedited':18} {found.kl_nats:6.3f} nats, perplexity {found.perplexity:6.1f}: {speak()}")
assert torch.equal(model(text).logits, logits)

# Edits compose: block numbers are those of the model as it stands.
with ls.operate(model, ls.drop(20)), ls.operate(model, ls.skip_mlp(0)):
    print(f"29 blocks: {len(model.model.layers)}, no MLP in the first: {speak()}")

# For good: an ordinary transformers model that trains, saves and reloads.
ls.operate_(model, "drop 20:22; repeat 10")
kept = speak()
with TemporaryDirectory() as directory:
    ls.save(model, Path(directory) / "kept", tokenizer=tokenizer)
    pipe = pipeline("text-generation", model=f"{directory}/kept", device="cpu")
    again = pipe("The capital of France is", max_new_tokens=10, do_sample=False, return_full_text=False)[0]["generated_text"]
print(f"kept {kept}, reloaded {again!r}")
assert repr(again) == kept
