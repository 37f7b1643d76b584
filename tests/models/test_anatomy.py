"""Test what `anatomy` finds in a model, and that it leaves the model unchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.table import Table
from torch import nn

import layersurgery as ls
from layersurgery.models.block_parts import BlockParts
from layersurgery.models.block_view import share_parameters
from layersurgery.models.call_tracing import Call, random_like
from layersurgery.models.weight_conventions import fit_norm
from layersurgery.runtime.block_runner import BlockRunner
from tests.support.reference import logits_of
from tests.support.zoo import DEPTH, tiny_model, tokens


def parts_of(name: str, block: int = 0, **overrides: Any) -> BlockParts:
    return ls.anatomy(tiny_model(name, **overrides)).parts(block)


def test_a_llama() -> None:
    model = tiny_model("llama")
    found = ls.anatomy(model)
    assert (found.model, found.blocks, found.depth) == ("LlamaForCausalLM", "model.layers", DEPTH)
    assert (found.embedding, found.final_norm, found.unembedding) == ("model.embed_tokens", "model.norm", "lm_head")
    assert found.kind_of == (0,) * DEPTH
    parts = found.parts(3)
    assert (parts.attention, parts.mlp, parts.parallel, parts.skip_error) == (("self_attn",), ("mlp",), False, "")
    assert parts.norms_before == ("input_layernorm", "post_attention_layernorm")
    assert parts.norms_after == ()
    assert parts.outputs("attention") == ("self_attn.o_proj.weight",)
    assert parts.outputs("mlp") == ("mlp.down_proj.weight",)


def test_attention_and_mlp_in_parallel() -> None:
    for name in ("gpt_neox", "phi", "gptj", "cohere", "falcon"):
        assert parts_of(name).parallel is True, name
    assert parts_of("gpt_neox", use_parallel_residual=False).parallel is False


def test_norms_after_the_branches() -> None:
    assert parts_of("gemma2").norms_after == ("post_attention_layernorm", "post_feedforward_layernorm")
    assert parts_of("olmo2").norms_before == ()


def test_an_mlp_without_its_own_module() -> None:
    parts = parts_of("opt")
    assert parts.mlp == ("fc1", "fc2")
    assert parts.outputs("mlp") == ("fc2.weight", "fc2.bias")
    assert [skip.passthrough for skip in parts.mlp_skips] == [True, False]


def test_a_residual_added_inside_the_module() -> None:
    assert [skip.residual for skip in parts_of("bloom").attention_skips + parts_of("bloom").mlp_skips] == [1, 1]
    assert parts_of("mpt").mlp_skips[0].residual == 1


def test_attention_inside_a_module_with_norms() -> None:
    assert parts_of("dbrx").attention == ("norm_attn_norm.attn",)


def test_mamba_and_attention_side_by_side() -> None:
    parts = parts_of("falcon_h1")
    assert parts.attention == ("mamba", "self_attn")
    assert [skip.updates_cache for skip in parts.attention_skips] == [True, False]


def test_kinds_of_blocks() -> None:
    found = ls.anatomy(tiny_model("lfm2"))
    assert [found.parts(block).attention for block in range(2)] == [("conv",), ("self_attn",)]
    assert [row["blocks"] for row in found.rows()] == list("012345")
    assert len(found.kinds) == 2


def test_a_norm_with_a_bias_after_a_branch_is_skipped_with_it() -> None:
    """The norm of zeros is its bias, which would be added to the stream."""
    model = tiny_model("gpt2")
    for block in model.transformer.h:
        block.norm_after = nn.LayerNorm(32)
        block.norm_after.bias.data.normal_()
        block.__class__ = _WithNormAfter
    with torch.no_grad():
        before = logits_of(model, tokens())
        with ls.operate(model, "skip-mlp 2"), ls.operate(model, "skip-attention 2"):
            both = logits_of(model, tokens())
        with ls.operate(model, "drop 2"):
            assert torch.equal(logits_of(model, tokens()), both)
    assert ls.anatomy(model).parts(0).norms_after == ("norm_after",)
    assert ls.anatomy(model).parts(0).outputs("mlp") == ("mlp.c_proj.weight", "mlp.c_proj.bias", "norm_after.bias")
    assert not torch.equal(before, both)


class _WithNormAfter(type(tiny_model("gpt2").transformer.h[0])):  # type: ignore[misc]
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("output_attentions", None)
        attended = self.attn(self.ln_1(hidden_states), *args, **kwargs)[0] + hidden_states
        return self.norm_after(self.mlp(self.ln_2(attended))) + attended


def test_printed_table() -> None:
    found = ls.anatomy(tiny_model("deepseek_v3"))
    assert isinstance(found.__rich__(), Table)
    text = str(found)
    for words in (
        "DeepseekV3ForCausalLM: 6 blocks at model.layers",
        "0:2",
        "2:6",
        "self_attn.o_proj",
        "final norm model.norm",
    ):
        assert words in text
    assert "\x1b" not in text


def test_html_table() -> None:
    found = ls.anatomy(tiny_model("deepseek_v3"))
    html = found._repr_html_()
    assert html.count("<tr>") == html.count("</tr>") == 3
    assert html.count("<th>") * 2 == html.count("<td>") == len(found.__rich__().columns) * 2
    for words in ("<b>DeepseekV3ForCausalLM: 6 blocks at model.layers</b>", "<td>2:6</td>", "final norm model.norm"):
        assert words in html
    odd = replace(found, model="<M>", blocks="a&b", kinds=tuple(("<i>", parts) for _, parts in found.kinds))
    assert "&lt;M&gt;: 6 blocks at a&amp;b" in odd._repr_html_()
    assert odd._repr_html_().count("<td>&lt;i&gt;</td>") == 2


def test_the_model_is_restored() -> None:
    model = tiny_model("llama").train()
    model.model.layers[2].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    modules = {name: id(module) for name, module in model.named_modules()}
    generator = torch.get_rng_state()
    ls.anatomy(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_compiled_model_is_not_recompiled() -> None:
    compilations = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    model: Any = torch.compile(tiny_model("llama"), backend=backend)
    assert ls.anatomy(model).depth == DEPTH
    assert compilations == []
    logits_of(model, tokens())
    assert len(compilations) > 0


def test_the_model_is_restored_after_an_error() -> None:
    model = tiny_model("llama")
    model.model.layers[3].forward = _raise
    modules = [id(module) for module in model.modules()]
    with pytest.raises(ls.UnsupportedEditError, match=r"could not be run on 7 tokens \(ValueError: no\)"):
        ls.anatomy(model)
    assert [id(module) for module in model.modules()] == modules


def test_memory_that_runs_out_is_not_a_property_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model = tiny_model("llama")
    model.model.layers[3].forward = run_out
    with pytest.raises(torch.OutOfMemoryError, match="2.00 GiB"):
        ls.anatomy(model)
    with pytest.raises(torch.OutOfMemoryError, match="2.00 GiB"):
        BlockRunner(model, ls.anatomy(tiny_model("llama")))
    monkeypatch.setattr(nn.RMSNorm, "forward", run_out)
    with pytest.raises(torch.OutOfMemoryError, match="2.00 GiB"):
        fit_norm(nn.RMSNorm(8), 8, torch.zeros(1))


def _raise(*_: Any, **__: Any) -> None:
    raise ValueError("no")


def test_two_possible_lists_of_blocks() -> None:
    model = tiny_model("llama")
    model.model.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(DEPTH))
    with pytest.raises(ls.UnsupportedEditError, match=r'model.layers, model.more. Choose one: blocks="model.layers"'):
        ls.anatomy(model)
    assert ls.anatomy(model, blocks="model.layers").depth == DEPTH
    with ls.operate(model, "skip-mlp 2", blocks="model.layers"):
        pass
    with pytest.raises(ls.UnsupportedEditError, match=r"does not run the 6 blocks at model.more .*\(it ran none\)"):
        ls.anatomy(model, blocks="model.more")
    with pytest.raises(
        ls.UnsupportedEditError,
        match=r"blocks='model.mine' is not the path of a list of 6 modules .*model.layers \(6\)",
    ):
        ls.anatomy(model, blocks="model.mine")


def test_no_list_of_blocks() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 4
    with pytest.raises(ls.UnsupportedEditError, match=r"no list of 4 modules.*model.layers \(6\)"):
        ls.anatomy(model)


def test_blocks_that_run_twice() -> None:
    model = tiny_model("llama")
    block = model.model.layers[2]
    model.model.layers[3].forward = lambda hidden_states, **kwargs: model.model.layers[2](
        block(hidden_states, **kwargs), **kwargs
    )
    with pytest.raises(ls.UnsupportedEditError, match=r"once each and in order \(it ran 0, 1, 2, 3, 2, 4, 5\)"):
        ls.anatomy(model)


def test_blocks_that_are_not_one_stream() -> None:
    model = tiny_model("llama")
    inner = model.model.layers[3].forward
    model.model.layers[3].forward = lambda hidden_states, **kwargs: inner(hidden_states, **kwargs)
    assert ls.anatomy(model).depth == DEPTH

    class Shifted(nn.ModuleList):
        def __getitem__(self, index: Any) -> Any:
            return [lambda x, block=block, **kwargs: block(x + 1, **kwargs) for block in super().__getitem__(index)]

    model.model.layers = Shifted(model.model.layers)
    with pytest.raises(ls.UnsupportedEditError, match="the input of block 1 is not the output of block 0"):
        ls.anatomy(model)


def test_a_view_shares_parameters_and_no_module() -> None:
    block = tiny_model("mixtral").model.layers[0]
    view = share_parameters(block)
    assert type(view) is type(block)
    assert [name for name, _ in view.named_modules()] == [name for name, _ in block.named_modules()]
    assert not {id(module) for module in view.modules()} & {id(module) for module in block.modules()}
    assert all(shared is original for shared, original in zip(view.parameters(), block.parameters(), strict=True))


def test_random_like_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    like = torch.full((1, 7, 4), 3.0)
    assert torch.equal(random_like(like, 1), random_like(like, 1))
    assert not torch.equal(random_like(like, 1), random_like(like, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_which_argument_holds_the_hidden_states() -> None:
    hidden, other = torch.zeros(1, 7, 4), torch.ones(1, 7, 4)
    assert Call("m", (other,), {"hidden_states": hidden}).hidden_states_argument() == "hidden_states"
    assert Call("m", (torch.zeros(3), other), {}).hidden_states_argument() == 1
    assert Call("m", (torch.arange(7)[None],), {}).hidden_states_argument() is None
