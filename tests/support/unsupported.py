"""What is rightly refused over the zoo, and the words of the refusal."""

from __future__ import annotations

WHOLE = ["swap 1 2", "drop 0", "drop -1", "move 1 after 3", "repeat 2:4", "reverse 1:5"]
SKIPS = ["skip-attention 2", "skip-mlp 2"]
_MOVING = [plan for plan in WHOLE if plan != "drop -1"]
_INWARD = ["swap 1 2", "move 1 after 3", "reverse 1:5"]


def _rows(name: str, plans: list[str], words: str) -> dict[tuple[str, str], str]:
    return {(name, plan): words for plan in plans}


# In memory and on disk.
NEVER: dict[tuple[str, str], str] = {
    **_rows("jamba", ["swap 1 2", "drop 0", "move 1 after 3", "repeat 2:4"], "works out .*layer"),
    **_rows("rwkv", ["drop 0"], "block 0 holds the norm of the embedding"),
    **_rows("mamba", ["skip-mlp 2"], "has no mlp"),
    **_rows("mamba2", ["skip-mlp 2"], "has no mlp"),
    **_rows("falcon_mamba", ["skip-mlp 2"], "has no mlp"),
    **_rows("nemotron_h", ["skip-attention 2"], "has no attention"),
    # Its channel mixing looks at the token before, too.
    **_rows("rwkv", SKIPS, "attention and feed_forward both mix tokens"),
    # Norms of the whole stream stand between the branches.
    **_rows("opt-postnorm", SKIPS, "not the stream plus attention plus MLP"),
    **_rows("minimax", SKIPS, "not the stream plus attention plus MLP"),
}
# Right in memory, but no config of the architecture can say it.
NEVER_SAVED: dict[tuple[str, str], str] = {
    **_rows("deepseek_v3", _INWARD, "first_k_dense_replace = 2|mlp is a DeepseekV3MoE in the source"),
    **_rows("lfm2_moe", _INWARD, "num_dense_layers = 2|feed_forward is a Lfm2MoeSparseMoeBlock in the source"),
    **_rows("jamba", ["reverse 1:5"], "feed_forward is a JambaMLP in the source"),
    **_rows("gpt2-inverse", _MOVING, "scale_attn_by_inverse_layer_idx|attn.scaling is .* in the source"),
    **_rows("diffllama", _MOVING, "lambda_init is .* in the source"),
    **_rows("gpt_neox_japanese", ["drop -1"], "dense_bias is None in the source"),
}
REFUSED = NEVER | NEVER_SAVED

# Where transformers' own generation with a cache, with nothing edited, is not that without one.
CACHE_IS_WRONG = {
    "rwkv": "its state is not handed on to the next step",
    "minimax": "its linear attention with a cache computes something else",
}
BEAMS_ARE_WRONG = {
    **CACHE_IS_WRONG,
    "recurrent_gemma": "its state is in its modules, and does not follow the beams",
}
