"""Remove six of thirty layers where it costs least, heal what is left by a short fine-tune, save it, and load it in a pipeline.

Run it with: python examples/06_prune_and_heal.py
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import torch
from transformers import pipeline

import layersurgery as ls

torch.manual_seed(0)
model, tokenizer = ls.load("smollm2-135m", dtype="float32")
text = "\n\n".join(topics[name] for name in sorted(topics))
ids = tokenizer(text[:60_000], return_tensors="pt").input_ids[0]
sequences = ids[: len(ids) // 64 * 64].view(-1, 64)
# The ends are kept apart: layers are chosen on the first, losses are read on the last, training sees only what is between.
choosing, training, held_out = sequences[:1], sequences[1:-8], sequences[-8:]


@torch.no_grad()
def loss() -> float:
    return float(model(held_out, labels=held_out).loss)


before = loss()
found = ls.prune(model, choosing, remove=6)  # by="influence" and by="angular" choose in other ways
print(found.costs.pivot_table(index="removed", columns="criterion", values="kl_nats").round(2))
print(f"{found.plan}, chosen in the order {', '.join(map(str, found.layers))}")

ls.operate_(model, found.plan)  # for good; what is left is an ordinary model of 24 layers, with memory for 24
pruned = loss()

# Healing is plain training. All that is left of the blocks may move; embeddings, which are also the unembedding, may not.
model.requires_grad_(False)
blocks = list(model.model.layers.requires_grad_(True).parameters())
optimizer = torch.optim.AdamW(blocks, lr=5e-5)
model.train()
for step in range(20):
    batch = training[torch.randint(len(training), (2,))]
    now = model(batch, labels=batch).loss
    now.backward()
    torch.nn.utils.clip_grad_norm_(blocks, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 4:
        print(f"step {step + 1}: {now.item():.2f} nats")
model.eval()
# Part of what is gained is that the model gets used to this kind of text: the whole model, trained so, would gain, too.
print(f"held-out loss: {before:.2f} nats before, {pruned:.2f} pruned, {loss():.2f} healed")

with TemporaryDirectory() as directory:
    ls.save(model, Path(directory) / "healed", tokenizer=tokenizer)
    pipe = pipeline("text-generation", model=f"{directory}/healed", device="cpu")
    print(repr(pipe("The capital of France is", max_new_tokens=12, do_sample=False)[0]["generated_text"]))
