"""What does each layer do? Read several signals off a model in one pass over a little text, and see what they say about stages.

Run it with: python examples/05_stages.py
"""

from __future__ import annotations

from pydoc_data.topics import topics

import layersurgery as ls

model, tokenizer = ls.load("smollm2-135m")
text = "\n\n".join(topics[name] for name in sorted(topics))
# 128 tokens are a look and no measurement: `layersurgery stages smollm2-135m --tokens 8192` is the real thing, and takes half an hour.
tokens = tokenizer(text[:4000], return_tensors="pt").input_ids[:, :128].view(2, 64)

# All of them ride on one run of the model. Attention and norms cost next to nothing, a lens costs a readout for each block,
# "drop" (the KL without each block) costs the most: half a run of the model for each.
tables = ls.analyses.measure(model, tokens, ["attention", "norms", "lens", "drop"])

frame = tables["attention"][["layer", "attention_prev5"]].copy()
frame["mlp_norm"] = tables["norms"].mlp_norm
frame["attention_to_mlp_ratio"] = tables["norms"].attention_to_mlp_ratio
# The logit lens: what the model would say if it ended here, and how far that is from what it says.
frame["lens_kl_nats"] = tables["lens"].lens_kl_nats
frame["lens_entropy_bits"] = tables["lens"].lens_entropy_bits
# A table has a row for each edited model; the first is the unedited one.
frame["drop_kl_nats"] = tables["drop"].kl_nats[1:].to_numpy()
print(frame.set_index("layer").round(2).to_string())

# The paper's picture in three numbers: vital first layers, predictions that are made late, a last layer that writes most.
lens = frame.lens_kl_nats
half = int((lens > lens.max() / 2)[::-1].idxmax()) + 1
print(
    f"without layer 0 the predictions move by {frame.drop_kl_nats[0]:.1f} nats, without a median layer by {frame.drop_kl_nats.median():.2f}"
)
print(f"the logit lens is closer than half its greatest distance for good from layer {half} of {len(frame)} on")
print(
    f"the MLP of layer {frame.mlp_norm.idxmax()} writes most: {frame.mlp_norm.max():.0f}, the median one {frame.mlp_norm.median():.0f}"
)

# ls.analyses.stages(model, tokens) puts neurons beside these, and says which limits between the stages they support and why;
# it wants thousands of tokens, because "not found" is its answer to noise.
