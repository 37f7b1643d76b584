"""Measure several signals of each layer in one pass over a short text, to see what the layers do.

Run it with: python examples/05_stages.py
"""

from __future__ import annotations

from pydoc_data.topics import topics

import layersurgery as ls

model, tokenizer = ls.load("smollm2-135m")
text = "\n\n".join(topics[name] for name in sorted(topics))
# 128 tokens give only a rough result. For a measurement, run `layersurgery stages smollm2-135m --tokens 8192`.
tokens = tokenizer(text[:4000], return_tensors="pt").input_ids[:, :128].view(2, 64)

# One run of the model measures all signals. Attention and norms cost very little. The lens costs one readout per block.
# "drop" (the KL without each block) costs most: half a run of the model for each block.
tables = ls.analyses.measure(model, tokens, ["attention", "norms", "lens", "drop"])

frame = tables["attention"][["layer", "attention_prev5"]].copy()
frame["mlp_norm"] = tables["norms"].mlp_norm
frame["attention_to_mlp_ratio"] = tables["norms"].attention_to_mlp_ratio
# The logit lens: the prediction from the stream after this layer, and its KL from the final prediction.
frame["lens_kl_nats"] = tables["lens"].lens_kl_nats
frame["lens_entropy_bits"] = tables["lens"].lens_entropy_bits
# This table has one row for each edited model; the first row is the unedited model.
frame["drop_kl_nats"] = tables["drop"].kl_nats[1:].to_numpy()
print(frame.set_index("layer").round(2).to_string())

# Three results of the paper: the first layer matters most, predictions form late, the last MLP writes most.
lens = frame.lens_kl_nats
half = int((lens > lens.max() / 2)[::-1].idxmax()) + 1
print(
    f"dropping layer 0 changes predictions by {frame.drop_kl_nats[0]:.1f} nats, "
    f"the median layer by {frame.drop_kl_nats.median():.2f}"
)
print(f"from layer {half} of {len(frame)} on, the lens KL stays below half its maximum")
print(
    f"the MLP of layer {frame.mlp_norm.idxmax()} writes most: norm {frame.mlp_norm.max():.0f}, "
    f"median {frame.mlp_norm.median():.0f}"
)

# ls.analyses.stages(model, tokens) adds neurons, and reports which boundaries between the stages the signals support.
# It needs thousands of tokens: if the signals are too noisy, it reports "not found".
