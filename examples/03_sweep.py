"""Measure how much the predictions change for every swap and every drop of a layer, then analyze the table.

Run it with: python examples/03_sweep.py
"""

from __future__ import annotations

from pydoc_data.topics import topics

import layersurgery as ls

model, tokenizer = ls.load("smollm2-135m")
text = "\n\n".join(topics[name] for name in sorted(topics))
# Little text, so that this takes seconds. Two sequences, because standard errors are computed over sequences.
tokens = tokenizer(text[:4000], return_tensors="pt").input_ids[:, :192].view(2, 96)

# One pass measures 15 edits of the middle layers. Block calls that several edited models share run only once.
frame = ls.sweep(
    model, "swap,drop", tokens, layers=range(10, 18), progress=lambda done, total: print(f"{done} of {total} sequences")
)

# The result is a pandas frame with one row for each edited model.
by_layer = frame.pivot_table(index="layer", columns="edit", values="kl_nats")
print(by_layer.round(3))
both = by_layer.dropna()
print(f"A swap hurts less than a drop at {(both['swap'] < both['drop']).sum()} of {len(both)} layers")
print(ls.summary_sentence(frame))

# Each metric has a standard error. On so little text it is large.
worst = frame.loc[frame[frame.edit == "drop"].kl_nats.idxmax()]
print(f"worst: {worst.plan}, {worst.kl_nats:.2f} +- {worst.kl_nats_sem:.2f} nats over {worst.sequences} sequences")

# Measure other plans, with names, on the same tokens.
plans = {"fewer layers": "drop 12:14", "one twice": "repeat 12", "no attention": "skip-attention 12:14"}
print(ls.sweep(model, plans, tokens).set_index("name")[["kl_nats", "agreement", "loss_change_nats"]].round(3))
