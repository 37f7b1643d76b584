"""Blocks of another checkpoint: in memory, on disk and by hand the same, and the other model stays as it is."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import layersurgery as ls
from tests.checkpoints.test_gguf import write_gguf
from tests.checkpoints.test_zoo import reload
from tests.support import dense
from tests.support.reference import logits_of
from tests.support.zoo import DEPTH, ZOO, tiny_model, tokens
from tests.surgery.test_zoo import state

edit_checkpoint = importlib.import_module("layersurgery.checkpoints.edit_checkpoint")
# What else a plan does with taken blocks.
RESTS = [
    "",
    "scale-mlp 2 0.5; skip-attention 5",
    "swap 1 2; repeat 5",
    "heads-off 0 of 2; neurons-off 1 of 5",
    "drop 1",
]


def blocks_of(model: Any) -> Any:
    return dense.blocks_of(model)


def pair(name: str) -> tuple[Any, Any]:
    models = tiny_model(name), tiny_model(name, seed=1)
    for model in models:
        logits_of(model, tokens())  # some note in their modules that they ran
    return models


def mixed(model: Any, other: Any, blocks: Iterable[int]) -> Any:
    """Merge the state dicts of two models by hand."""
    prefixes = tuple(
        f"{path}." for path, module in model.named_modules() for block in blocks if module is blocks_of(model)[block]
    )
    merged = type(model)(model.config).eval().float()
    merged.load_state_dict(
        {
            name: (other if name.startswith(prefixes) else model).state_dict()[name]
            for name in model.state_dict()
        }
    )  # fmt: skip
    logits_of(merged, tokens())
    return merged


# A part of the zoo, each with another plan; the others are slow.
CASES = [
    pytest.param(name, RESTS[number // 6 % len(RESTS)], marks=() if number % 6 == 0 else pytest.mark.slow)
    for number, name in enumerate(ZOO)
]


@contextmanager
def refusals() -> Iterator[list[str]]:
    """Collect the text of a refusal."""
    texts: list[str] = []
    try:
        yield texts
    except ls.UnsupportedEditError as refusal:
        texts.append(str(refusal).partition(" the route ")[0])  # it is written in another way


@pytest.mark.parametrize(("name", "rest"), CASES)
def test_memory_is_disk_is_by_hand_and_nothing_else_changes(name: str, rest: str, tmp_path: Path) -> None:
    model, other = pair(name)
    by_hand = mixed(model, other, (2, 5))
    by_hand.save_pretrained(tmp_path / "by_hand")
    model.save_pretrained(tmp_path / "model")
    other.save_pretrained(tmp_path / "other", max_shard_size="60KB")
    before, others, logits = state(model), state(other), logits_of(model, tokens())
    plan, sources = f"take 2 5 from base; {rest}".rstrip("; "), {"base": other}
    with refusals() as refused, ls.operate(model, plan, sources=sources):
        operated = logits_of(model, tokens())
    with refusals() as refused_by_hand, ls.operate(by_hand, rest or ls.Route.identity(DEPTH)):
        assert torch.equal(operated, logits_of(by_hand, tokens()))
        assert not torch.equal(operated, logits)
    assert refused == refused_by_hand
    assert rest or not refused
    with refusals() as refused:
        ls.edit_checkpoint(tmp_path / "model", plan, tmp_path / "out", sources={"base": tmp_path / "other"})
        assert torch.equal(logits_of(reload(tmp_path / "out"), tokens()), operated)
    if rest:
        with refusals() as refused_by_hand:
            ls.edit_checkpoint(tmp_path / "by_hand", rest, tmp_path / "hand")
    assert bool(refused) == bool(refused_by_hand)
    assert state(model) == before
    assert state(other) == others
    assert torch.equal(logits_of(model, tokens()), logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "jamba"])
def test_a_source_that_is_the_model_itself_changes_nothing(name: str, tmp_path: Path) -> None:
    model, _ = pair(name)
    model.save_pretrained(tmp_path / "model")
    logits = logits_of(model, tokens())
    plan = f"take 0:{DEPTH} from base"
    for source in (model, tmp_path / "model"):
        with ls.operate(model, plan, sources={"base": source}):
            assert torch.equal(logits_of(model, tokens()), logits)
    ls.edit_checkpoint(tmp_path / "model", plan, tmp_path / "out", sources={"base": tmp_path / "model"})
    weights, same = (reload(tmp_path / path).state_dict() for path in ("model", "out"))
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[key], same[key]) for key in weights)
    assert ls.sweep(model, "replace-from:base", tokens(), sources={"base": model}).kl_nats.eq(0).all()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_all_blocks_and_the_ends_are_the_other_model(name: str) -> None:
    model, other = pair(name)
    ls.operate_(model, f"take 0:{DEPTH} from base", sources={"base": other})
    inside = {id(parameter) for parameter in blocks_of(model).parameters()}
    for (path, parameter), its in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (id(parameter) in inside) == (parameter is its), path
        if parameter is not its:
            parameter.data.copy_(its.data)
    assert torch.equal(logits_of(model, tokens()), logits_of(other, tokens()))


@pytest.mark.parametrize("name", ["llama"])
def test_kept_blocks_save_generate_and_train(name: str, tmp_path: Path) -> None:
    model, other = pair(name)
    # The same block twice, next to the model's own, and a source that is the model itself.
    ls.operate_(model, "reorder 0 1 1@base 2@base 2@base[mlp*0.5] 3@me 3 4", sources={"base": other, "me": model})
    assert [block.self_attn.layer_idx for block in blocks_of(model)] == list(range(8))
    assert [block.self_attn.layer_idx for block in blocks_of(other)] == list(range(DEPTH))
    meant = logits_of(model, tokens())
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(reload(tmp_path / "out"), tokens()), meant)
    cached, uncached = (
        model.generate(tokens()[:1], max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, uncached)
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert blocks_of(other)[1].mlp.down_proj.weight.grad is not None  # it is the same parameter


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 2}, "block 3 cannot be taken from base, which has 2 blocks, 0 to 1"),
    ({"hidden_size": 64}, r"self_attn.q_proj.weight is \(32, 32\), and in the source \(\d+, 64\)"),
    ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 1e-06, and in the source 0.001"),
    ({"num_key_value_heads": 4}, "self_attn.k_proj.weight"),
    ({"hidden_act": "gelu"}, "mlp.act_fn is a SiLUActivation, and in the source a GELUActivation"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters is .*5*0000"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=[next(iter(fields)) for fields, _ in REFUSED])
def test_another_block_is_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", **fields)
    model.save_pretrained(tmp_path / "model")
    other.save_pretrained(tmp_path / "other")
    before = state(model)
    with (
        pytest.raises(ls.UnsupportedEditError, match=words),
        ls.operate(model, "take 3 from base", sources={"base": other}),
    ):
        pytest.fail("operated")
    assert state(model) == before
    on_disk = r"k_proj.weight is \(16, 32\) in the model" if "num_key_value_heads" in fields else words
    on_disk = r"layernorm.weight is \(32,\) in the model, and \(64,\)" if "hidden_size" in fields else on_disk
    with pytest.raises(ls.UnsupportedEditError, match=on_disk):
        ls.edit_checkpoint(
            tmp_path / "model", "take 3 from base", tmp_path / "out", sources={"base": tmp_path / "other"}
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["longrope", "default"])
def test_a_length_that_rotary_embeddings_read_must_be_the_same(kind: str, tmp_path: Path) -> None:
    """With longrope, the factors that are used depend on the largest number of positions."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4}
    if kind == "longrope":
        factors = [1.0, 2.0, 3.0, 4.0]
        rope |= {"short_factor": factors, "long_factor": factors[::-1], "original_max_position_embeddings": 16}
    models = [tiny_model("llama", max_position_embeddings=most, rope_parameters=rope) for most in (64, 128)]
    for name, each in zip(("model", "other"), models, strict=True):
        each.save_pretrained(tmp_path / name)
    sources = {"base": tmp_path / "other"}
    if kind == "longrope":
        with pytest.raises(ls.UnsupportedEditError, match="max_position_embeddings is 64, and in the source 128"):
            ls.edit_checkpoint(tmp_path / "model", "take 3 from base", tmp_path / "out", sources=sources)
        return
    ls.edit_checkpoint(tmp_path / "model", "take 3 from base", tmp_path / "out", sources=sources)
    with ls.operate(models[0], "take 3 from base", sources={"base": models[1]}):
        assert torch.equal(logits_of(reload(tmp_path / "out"), tokens()), logits_of(models[0], tokens()))


def test_another_kind_of_layer_is_refused_and_another_depth_is_not() -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    model = tiny_model("gemma3_text", layer_types=kinds)
    other = tiny_model("gemma3_text", num_hidden_layers=4, layer_types=[*kinds[:3], "sliding_attention"])
    with ls.operate(model, "take 2 from base", sources={"base": other}):
        assert blocks_of(model)[2].mlp.down_proj.weight is blocks_of(other)[2].mlp.down_proj.weight
    with (
        pytest.raises(ls.UnsupportedEditError, match="layer_types is 'full_attention', and in the source 'sliding_"),
        ls.operate(model, "take 3 from base", sources={"base": other}),
    ):
        pytest.fail("operated")


def test_another_data_type_is_refused(tmp_path: Path) -> None:
    model, half = tiny_model("llama"), tiny_model("llama", seed=1).bfloat16()
    model.save_pretrained(tmp_path / "model")
    half.save_pretrained(tmp_path / "half")
    with (
        pytest.raises(ls.UnsupportedEditError, match="is torch.bfloat16, and torch.float32 in the model; load both in"),
        ls.operate(model, "take 3 from base", sources={"base": half}),
    ):
        pytest.fail("operated")
    with ls.operate(model, "take 3 from base", sources={"base": tmp_path / "half"}):  # loaded in the model's own
        assert torch.equal(blocks_of(model)[3].mlp.up_proj.weight, blocks_of(half)[3].mlp.up_proj.weight.float())
    with pytest.raises(ls.UnsupportedEditError, match="is F32 in the model, and BF16 in the source; save one of them"):
        ls.edit_checkpoint(
            tmp_path / "model", "take 3 from base", tmp_path / "out", sources={"base": tmp_path / "half"}
        )


def test_offloaded_weights_are_refused() -> None:
    from accelerate import cpu_offload

    model, other = pair("llama")
    for offloaded in (model, other):
        cpu_offload(offloaded)
        with (
            pytest.raises(ls.UnsupportedEditError, match="is offloaded; load it without offloading"),
            ls.operate(model, "take 2 from base", sources={"base": other}),
        ):
            pytest.fail("operated")
        if offloaded is model:
            model = tiny_model("llama")


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (
            None,
            r"a block is taken from base, and no source has this name; none is given. Give it with --source base=MODEL",
        ),
        ({"bass": "x"}, "did you mean bass"),
        ({"other": "x"}, "given are other. Give it"),
        ({"base": "x", "more": "x"}, "no edit takes a block of the source more; leave it out"),
        ({"base": 3}, "a source is a transformers model or the name of one, not int"),
        ({"a b": "x"}, "a source has a name of letters"),
        ("base=x", "sources is a dictionary of models by name"),
        (["base"], "a source is given as NAME=MODEL"),
        (["base=x", "base=y"], "the source base is given twice"),
    ],
)
def test_sources_that_do_not_fit_are_named(sources: Any, words: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ls.PlanError, match=words), ls.operate(model, "take 2 from base", sources=sources):
        pytest.fail("operated")
    with pytest.raises(ls.PlanError, match=words):
        ls.edit_checkpoint(tmp_path / "model", "take 2 from base", tmp_path / "out", sources=sources)
    with pytest.raises(ls.PlanError, match=words):
        ls.sweep(model, "take 2 from base", tokens(), sources=sources)


def test_a_source_with_a_revision_is_of_the_hub(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "at@home")
    written = ls.edit_checkpoint(
        tmp_path / "model", "take 2 from base", tmp_path / "out", sources={"base": tmp_path / "at@home"}
    )
    assert written.sources["base"].label == str(tmp_path / "at@home")
    with pytest.raises(ls.SourceError, match="only Hub models have revisions"):
        ls.edit_checkpoint(
            tmp_path / "model", "take 2 from base", tmp_path / "no", sources={"base": f"{tmp_path / 'model'}@main"}
        )


def test_the_card_names_both_and_neither_is_replaced(tmp_path: Path) -> None:
    for seed, name in enumerate(("model", "other")):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
    sources = {"base": tmp_path / "other"}
    ls.edit_checkpoint(tmp_path / "model", "take 2 from base", tmp_path / "out", sources=sources)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Made from `model` by" in card
    assert "Blocks marked `@base` are those of `other`." in card
    assert "`0 1 2@base 3:6`" in card
    with pytest.raises(ls.OutputError):
        ls.edit_checkpoint(tmp_path / "model", "take 2 from base", tmp_path / "other", sources=sources, overwrite=True)
    assert torch.equal(
        logits_of(reload(tmp_path / "other"), tokens()), logits_of(tiny_model("llama", seed=1), tokens())
    )


def test_a_gguf_file_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSURGERY_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "one.gguf")
    write_gguf(tmp_path / "two.gguf")
    out = ls.edit_checkpoint(
        tmp_path / "one.gguf", "take 1 from base", tmp_path / "out", sources={"base": tmp_path / "two.gguf"}
    ).path
    one, two, made = (ls.load(path).model for path in (tmp_path / "one.gguf", tmp_path / "two.gguf", out))
    blocks_of(one)[1] = blocks_of(two)[1]
    assert torch.equal(logits_of(made, tokens()), logits_of(one, tokens()))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_zero_copy_of_a_taken_block_has_its_weights(name: str, tmp_path: Path) -> None:
    model, other = pair(name)
    model.save_pretrained(tmp_path / "model")
    other.save_pretrained(tmp_path / "other")
    plan, sources = "take 2 from base; insert-copy 2 after 2", {"base": other}
    with ls.operate(model, "take 2 from base", sources=sources):
        logits = logits_of(model, tokens())
    out = ls.edit_checkpoint(tmp_path / "model", plan, tmp_path / "out", sources={"base": tmp_path / "other"}).path
    written = reload(out)
    ls.operate_(model, plan, sources=sources)
    for edited in (model, written):
        assert torch.equal(logits_of(edited, tokens()), logits)
        copy = blocks_of(edited)[3]
        assert torch.equal(copy.mlp.up_proj.weight, blocks_of(other)[2].mlp.up_proj.weight)
        assert copy.mlp.up_proj.weight is not blocks_of(other)[2].mlp.up_proj.weight


def test_files_of_another_format_are_refused(tmp_path: Path) -> None:
    for seed, name in enumerate(("model", "other")):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    arguments: Any = (tmp_path / "model", "take 2 from base", tmp_path / "out")
    with pytest.raises(ls.UnsupportedEditError, match="settings of quantization in config.json differ"):
        ls.edit_checkpoint(*arguments, sources={"base": tmp_path / "other"})
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    save_file(tensors | {"model.layers.2.mlp.scale": torch.ones(1)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ls.UnsupportedEditError, match="only the source has mlp.scale"):
        ls.edit_checkpoint(*arguments, sources={"base": tmp_path / "other"})
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("model", "other")):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
    plan_edit = edit_checkpoint.plan_edit

    def then_rewrite(*args: Any, **kwargs: Any) -> Any:
        planned = plan_edit(*args, **kwargs)
        tiny_model("llama").save_pretrained(tmp_path / "other")
        return planned

    monkeypatch.setattr(edit_checkpoint, "plan_edit", then_rewrite)
    with pytest.raises(ls.SourceError, match="model.safetensors is not the file from which the header was read"):
        ls.edit_checkpoint(
            tmp_path / "model", "take 2 from base", tmp_path / "out", sources={"base": tmp_path / "other"}
        )
    assert not (tmp_path / "out").exists()


def test_a_source_with_a_branch_that_an_edit_skips_is_refused() -> None:
    source = ls.operate_(tiny_model("llama", seed=1), "skip-mlp 2")
    plan, sources = "take 2 from base", {"base": source}
    with (
        pytest.raises(ls.UnsupportedEditError, match="is skipped by an edit"),
        ls.operate(tiny_model("llama"), plan, sources=sources),
    ):
        pytest.fail("operated")
