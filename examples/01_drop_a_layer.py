"""Drop one layer of a model, look at the generated text and the cost, and check that the edit is undone exactly.

Run it with: python examples/01_drop_a_layer.py
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch

import layersurgery as ls

model, tokenizer = ls.load("smollm2-135m")  # or any causal language model from transformers
prompt = tokenizer("The capital of France is", return_tensors="pt")
# Python's help text, which every machine has. The effect of each edit is measured on it.
text = tokenizer(topics["for"] + topics["while"], return_tensors="pt").input_ids[:, :256]


def generate() -> str:
    """Return what the model writes after the prompt."""
    tokens = model.generate(**prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)
    return repr(tokenizer.decode(tokens[0, prompt.input_ids.shape[1] :]))


before = model(text).logits
print(f"all 30 layers       {generate()}")

# Drop a middle layer, the first one and the last one: their effects are very different.
for layer in (20, 0, -1):
    # KL measures how much all predictions change; agreement is the share of unchanged top predictions.
    cost = ls.compare(model, ls.drop(layer), text)
    # Inside `with`, `model` is an ordinary model with one layer less: generation, hooks and training work.
    with ls.operate(model, ls.drop(layer)):
        assert model.config.num_hidden_layers == 29
        print(f"without layer {layer:2}    {generate()}")
        print(f"                    KL {cost.kl_nats:.2f} nats, {cost.agreement:.0%} top-1 agreement")

# The original modules are restored, so the logits are the same bit for bit. This also holds after an exception.
try:
    with ls.operate(model, "drop 0:10"):
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
assert torch.equal(model(text).logits, before)
print("after the edits the logits are the same as before, bit for bit")
