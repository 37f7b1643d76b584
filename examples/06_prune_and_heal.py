"""Remove the six of thirty layers that matter least, fine-tune the pruned model, save it, and load it in a pipeline.

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
# The first sequence chooses the layers, the last eight measure the loss, the others are for training.
choosing, training, held_out = sequences[:1], sequences[1:-8], sequences[-8:]


@torch.no_grad()
def held_out_loss() -> float:
    return float(model(held_out, labels=held_out).loss)


before = held_out_loss()
pruning = ls.prune(model, choosing, remove=6)  # or by="influence", by="angular"
print(pruning.costs.pivot_table(index="removed", columns="criterion", values="kl_nats").round(2))
print(f"{pruning.plan}, chosen in the order {', '.join(map(str, pruning.layers))}")

ls.operate_(model, pruning.plan)  # permanent: an ordinary model of 24 layers that needs the memory of 24 layers
pruned = held_out_loss()

# Healing is ordinary training. Train the remaining blocks only; freeze the embedding, which is also the unembedding.
model.requires_grad_(False)
blocks = list(model.model.layers.requires_grad_(True).parameters())
optimizer = torch.optim.AdamW(blocks, lr=5e-5)
model.train()
for step in range(20):
    batch = training[torch.randint(len(training), (2,))]
    loss = model(batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(blocks, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 4:
        print(f"step {step + 1}: {loss.item():.2f} nats")
model.eval()
# Part of the gain is adaptation to this kind of text: training the unpruned model on it would also lower its loss.
print(f"held-out loss: {before:.2f} nats before, {pruned:.2f} pruned, {held_out_loss():.2f} healed")

with TemporaryDirectory() as directory:
    ls.save(model, Path(directory) / "healed", tokenizer=tokenizer)
    generate = pipeline("text-generation", model=f"{directory}/healed", device="cpu")
    print(repr(generate("The capital of France is", max_new_tokens=12, do_sample=False)[0]["generated_text"]))
