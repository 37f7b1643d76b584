"""What does each layer of a model do for its predictions? Measure every swap and every drop at once, then ask the table.

Run it with: python examples/03_sweep.py
"""

from __future__ import annotations

from pydoc_data.topics import topics

import layersurgery as ls

model, tokenizer = ls.load("smollm2-135m")
text = "\n\n".join(topics[name] for name in sorted(topics))
# Little text, so that this takes seconds. Several sequences, because errors are over sequences.
tokens = tokenizer(text[:4000], return_tensors="pt").input_ids[:, :192].view(2, 96)

# 15 edited models of the middle layers in one pass: every block call that two of them share is made once.
frame = ls.sweep(
    model, "swap,drop", tokens, layers=range(10, 18), progress=lambda done, of: print(f"{done} of {of} sequences")
)

# It is a pandas frame with a row for each edited model, so everything that pandas can do can be asked.
by_layer = frame.pivot_table(index="layer", columns="edit", values="kl_nats")
print(by_layer.round(3))
both = by_layer.dropna()
print(f"A swap hurts less than a drop at {(both['swap'] < both['drop']).sum()} of {len(both)} layers")
print(ls.summary_sentence(frame))

# Each metric has its standard error beside it: on so little text it is large, and one should look.
worst = frame.loc[frame[frame.edit == "drop"].kl_nats.idxmax()]
print(f"worst: {worst.plan}, {worst.kl_nats:.2f} +- {worst.kl_nats_sem:.2f} nats over {worst.sequences} sequences")

# Any other plans, by name, on the same tokens:
mine = {"fewer layers": "drop 12:14", "one twice": "repeat 12", "no attention": "skip-attention 12:14"}
print(ls.sweep(model, mine, tokens).set_index("name")[["kl_nats", "agreement", "loss_change_nats"]].round(3))
