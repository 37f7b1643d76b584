"""List the edits that are refused for good reasons, by architecture, with a pattern of the message."""

from __future__ import annotations

BLOCK_EDITS = ["swap 1 2", "drop 0", "drop -1", "move 1 after 3", "repeat 2:4", "replace 1 4", "reverse 1:5"]
SKIP_EDITS = ["skip-attention 2", "skip-mlp 2"]
_MOVING_EDITS = [plan for plan in BLOCK_EDITS if plan != "drop -1"]
_INNER_EDITS = ["swap 1 2", "move 1 after 3", "reverse 1:5"]


def _rows(name: str, plans: list[str], pattern: str) -> dict[tuple[str, str], str]:
    return {(name, plan): pattern for plan in plans}


# Refused in memory and on disk.
UNSUPPORTED: dict[tuple[str, str], str] = {
    **_rows("jamba", ["swap 1 2", "drop 0", "move 1 after 3", "repeat 2:4"], "computes .*layer"),
    **_rows("rwkv", ["drop 0"], "block 0 holds the norm of the embedding"),
    **_rows("mamba", ["skip-mlp 2"], "has no mlp"),
    **_rows("mamba2", ["skip-mlp 2"], "has no mlp"),
    **_rows("falcon_mamba", ["skip-mlp 2"], "has no mlp"),
    **_rows("nemotron_h", ["skip-attention 2"], "has no attention"),
    # Its channel mixing also reads the token before.
    **_rows("rwkv", SKIP_EDITS, "attention and feed_forward both mix tokens"),
    # The whole stream is normalized between the branches.
    **_rows("opt-postnorm", SKIP_EDITS, "not the stream plus attention plus MLP"),
    **_rows("minimax", SKIP_EDITS, "not the stream plus attention plus MLP"),
}
BRANCH_EDITS = ["scale-attention 2 0.5", "scale-mlp 2 -1.5", "scale 2 0.5", "heads-off 0 of 2", "neurons-off 0:3 of 2"]
_SCALES, _HEADS, _NEURONS = BRANCH_EDITS[:3], BRANCH_EDITS[3:4], BRANCH_EDITS[4:]
_NO_HEADS, _EXPERTS = "is not the outputs of heads side by side", "its mlp has experts, or several output projections"
_MIXERS = (
    "mamba", "mamba2", "falcon_mamba", "jamba", "lfm2", "lfm2_moe", "bamba", "granitemoehybrid",
)  # fmt: skip
_MIXTURES = (
    "mixtral", "qwen2_moe", "gpt_oss", "olmoe", "deepseek_v3", "granitemoe", "qwen3_next", "glm4_moe", "minimax_m2",
    "ernie4_5_moe", "afmoe", "granitemoehybrid", "phimoe", "hunyuan_v1_moe", "jetmoe", "lfm2_moe",
)  # fmt: skip
# Changes of a branch that are refused, in memory and on disk.
UNSUPPORTED_CHANGES: dict[tuple[str, str], str] = {
    **{row: text for name in _MIXERS for row, text in _rows(name, _HEADS, _NO_HEADS).items()},
    **{row: text for name in _MIXTURES for row, text in _rows(name, _NEURONS, _EXPERTS).items()},
    **{
        row: text
        for name in ("mamba", "mamba2", "falcon_mamba")
        for row, text in _rows(name, ["scale-mlp 2 -1.5", *_NEURONS], "the mlp of block 2 .* it has none").items()
    },
    **_rows("nemotron_h", ["scale-attention 2 0.5", *_HEADS], "the attention of block 2 .* it has none"),
    **_rows("dbrx", _NEURONS, "is not used as one linear map"),
    **_rows("falcon_h1", _HEADS, "several output projections"),
    # The experts of its attention have a bias that they share.
    **_rows("jetmoe", ["scale-attention 2 0.5", "scale 2 0.5"], "no weights were found that scale"),
    **_rows("jetmoe", _HEADS, "its attention has experts"),
    **_rows("rwkv", BRANCH_EDITS, "attention and feed_forward both mix tokens"),
    **_rows("opt-postnorm", BRANCH_EDITS, "not the stream plus attention plus MLP"),
    **_rows("minimax", BRANCH_EDITS, "not the stream plus attention plus MLP"),
}
# Allowed in memory, but the architecture's config cannot express the result.
UNSUPPORTED_ON_DISK: dict[tuple[str, str], str] = {
    **_rows("deepseek_v3", _INNER_EDITS, "first_k_dense_replace = 2|mlp is a DeepseekV3MoE in the source"),
    **_rows("lfm2_moe", _INNER_EDITS, "num_dense_layers = 2|feed_forward is a Lfm2MoeSparseMoeBlock in the source"),
    **_rows("jamba", ["replace 1 4", "reverse 1:5"], "feed_forward is a JambaMLP in the source"),
    **_rows("gpt2-inverse", _MOVING_EDITS, "scale_attn_by_inverse_layer_idx|attn.scaling is .* in the source"),
    **_rows("diffllama", _MOVING_EDITS, "lambda_init is .* in the source"),
    **_rows("gpt_neox_japanese", ["drop -1"], "dense_bias is None in the source"),
}
ALL_UNSUPPORTED = UNSUPPORTED | UNSUPPORTED_ON_DISK

# Unedited models for which transformers generates other tokens with a cache than without one.
WRONG_WITH_CACHE = {
    "rwkv": "its state is not passed to the next step",
    "minimax": "its linear attention computes another result with a cache",
}
WRONG_WITH_BEAMS = {
    **WRONG_WITH_CACHE,
    "recurrent_gemma": "its state is kept in its modules and does not follow the beams",
}
# Copies with zero output projections, in memory and on disk.
UNSUPPORTED_COPIES: dict[str, str] = {
    "jamba": "computes .*layer",
    "rwkv": "attention and feed_forward both mix tokens",
    "opt-postnorm": "not the stream plus attention plus MLP",
    "minimax": "not the stream plus attention plus MLP",
}
UNSUPPORTED_COPIES_ON_DISK: dict[str, str] = {
    "gpt2-inverse": "scale_attn_by_inverse_layer_idx|attn.scaling is .* in the source",
    "diffllama": "lambda_init is .* in the source",
}
# Edits that leave the first tokens as they are and are refused in memory. Dropping a block never is.
LATER_EDITS = [
    "drop 2 from 1",
    "skip-attention 2 from 3",
    "skip-mlp 2 from 1",
    "scale-mlp 2 0.5 from 4",
    "scale 2 -0.7 from 2",
]
_BRANCHES_LATER = LATER_EDITS[1:]
UNSUPPORTED_LATER: dict[tuple[str, str], str] = {
    **{
        row: text
        for name in ("mamba", "mamba2", "falcon_mamba")
        for row, text in _rows(name, LATER_EDITS[2:4], "the mlp of block 2 .* it has none").items()
    },
    **_rows("nemotron_h", ["skip-attention 2 from 3"], "the attention of block 2 .* it has none"),
    **_rows("rwkv", _BRANCHES_LATER, "attention and feed_forward both mix tokens"),
    **_rows("opt-postnorm", _BRANCHES_LATER, "not the stream plus attention plus MLP"),
    **_rows("minimax", _BRANCHES_LATER, "not the stream plus attention plus MLP"),
}
# Architectures whose blocks are given no positions, and whose cache does not count tokens.
NO_POSITIONS = {"mamba", "mamba2", "falcon_mamba", "granitemoehybrid"}
