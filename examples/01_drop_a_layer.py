"""Take one layer out of a model for a while: what does it say then, what did it lose, and is it really back afterwards?

Run it with: python examples/01_drop_a_layer.py
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch

import layersurgery as ls

model, tokenizer = ls.load("smollm2-135m")  # any causal language model of transformers would do
prompt = tokenizer("The capital of France is", return_tensors="pt")
# Python's own help, which every machine has; what an edit does is measured on it.
text = tokenizer(topics["for"] + topics["while"], return_tensors="pt").input_ids[:, :256]


def speak() -> str:
    tokens = model.generate(**prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)
    return repr(tokenizer.decode(tokens[0, prompt.input_ids.shape[1] :]))


before = model(text).logits
print(f"all 30 layers       {speak()}")

# One layer of the middle, the first one, and the last: layers are not alike.
for layer in (20, 0, -1):
    # KL says how far all predictions moved, agreement how many top predictions stayed the same.
    cost = ls.compare(model, ls.drop(layer), text)
    # Inside the block, model is an ordinary model with one layer less: generate, hooks, training, all of it works.
    with ls.operate(model, ls.drop(layer)):
        assert model.config.num_hidden_layers == 29
        print(f"without layer {layer:2}    {speak()}")
        print(f"                    KL {cost.kl_nats:.2f} nats, {cost.agreement:.0%} of top predictions kept")

# The very objects are put back, so "as before" means bit for bit. That holds after an exception, too.
try:
    with ls.operate(model, "drop 0:10"):
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
assert torch.equal(model(text).logits, before)
print("and the logits are those of before, bit for bit")
