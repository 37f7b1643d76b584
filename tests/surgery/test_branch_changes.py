"""Scaled branches, heads and neurons off: in memory, on disk and by hand the same, for every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layersurgery as ls
from tests.checkpoints.test_zoo import reload
from tests.support.dense import BRANCH_MODULES, blocks_of
from tests.support.reference import logits_of
from tests.support.unsupported import BRANCH_EDITS, UNSUPPORTED_CHANGES
from tests.support.zoo import rotate, tiny_model, tokens
from tests.surgery.test_zoo import state


@pytest.fixture
def model(name: str) -> Any:
    model = tiny_model(name)
    logits_of(model, tokens())  # some note in their modules that they ran
    return model


@pytest.mark.parametrize(("name", "plan"), rotate(BRANCH_EDITS))
def test_memory_is_disk_and_undo_is_exact(model: Any, name: str, plan: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "source")
    before, logits = state(model), logits_of(model, tokens())
    if words := UNSUPPORTED_CHANGES.get((name, plan)):
        with pytest.raises(ls.UnsupportedEditError, match=words), ls.operate(model, plan):
            pytest.fail("operated")
        with pytest.raises(ls.UnsupportedEditError, match=words):
            ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        with ls.operate(model, plan):
            found = logits_of(model, tokens())
        assert not torch.equal(found, logits)
        ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "out")
        assert torch.equal(logits_of(reload(tmp_path / "out"), tokens()), found)
    assert state(model) == before
    assert torch.equal(logits_of(model, tokens()), logits)


@pytest.mark.parametrize("name", BRANCH_MODULES)
@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_a_scaled_branch_is_one_whose_output_a_hook_scales(model: Any, name: str, branch: str) -> None:
    factor = -0.7
    index = ["attention", "mlp"].index(branch)
    handles = []
    for path, pick in BRANCH_MODULES[name][index]:

        def scale(_m: Any, args: Any, kwargs: Any, output: Any, pick: Any = pick) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            # What is added: all that is returned, or that without the stream that the module adds itself.
            added = first if name == "granite" else pick(args, kwargs, output)
            changed = first + (factor - 1) * added
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        block = blocks_of(model)[2]
        handles.append(block.get_submodule(path).register_forward_hook(scale, with_kwargs=True))
    meant = logits_of(model, tokens())
    for handle in handles:
        handle.remove()
    with ls.operate(model, f"scale-{branch} 2 {factor}"):
        found = logits_of(model, tokens())
    torch.testing.assert_close(found, meant, rtol=0, atol=2e-6)
    assert (found - logits_of(model, tokens())).abs().max() > 1e-4


def _without_values(block: Any, name: str, group: int, size: int) -> list[tuple[torch.Tensor, slice]]:
    """Return the weights, and their rows or columns, that compute the values of one group of heads."""
    rows = slice(group * size, (group + 1) * size)
    if name == "gpt2":
        width = block.attn.c_proj.weight.shape[0]
        columns = slice(2 * width + rows.start, 2 * width + rows.stop)
        return [(block.attn.c_attn.weight.T, columns), (block.attn.c_attn.bias, columns)]
    if name == "gpt_neox":
        projection = block.attention.query_key_value
        rows = slice((3 * group + 2) * size, (3 * group + 3) * size)
        return [(projection.weight, rows), (projection.bias, rows)]
    projection = block.self_attn.v_proj
    return [(projection.weight, rows)] + ([] if projection.bias is None else [(projection.bias, rows)])


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "phi", "gemma2", "opt"])
def test_heads_off_are_heads_without_values(model: Any, name: str) -> None:
    config, block = model.config, blocks_of(model)[2]
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    of_group = range(heads // groups * (groups - 1), heads)  # the query heads of the last group
    with ls.operate(model, ls.heads_off(2, of_group)):
        found = logits_of(model, tokens())
    assert not torch.equal(found, logits_of(model, tokens()))
    for weight, rows in _without_values(block, name, groups - 1, size):
        weight.data[rows] = 0
    torch.testing.assert_close(found, logits_of(model, tokens()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_all_off_is_skipped_where_there_is_no_bias(model: Any) -> None:
    heads = model.config.num_attention_heads
    for parts, skip in ((f"heads-off 0:{heads} of 2", "skip-attention 2"), (None, "skip-mlp 2")):
        branch = "attention" if parts else "mlp"
        names = ls.anatomy(model).parts(2).outputs(branch)  # type: ignore[arg-type]
        weights = {name: blocks_of(model)[2].get_parameter(name) for name in names}
        (matrix,) = (weight for weight in weights.values() if weight.dim() == 2)
        for weight in weights.values():
            if weight.dim() == 1:
                weight.data.zero_()
        neurons = max(matrix.shape) if branch == "mlp" else 0
        with ls.operate(model, parts or f"neurons-off 0:{neurons} of 2"):
            found = logits_of(model, tokens())
        with ls.operate(model, skip):
            torch.testing.assert_close(found, logits_of(model, tokens()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_scaling_by_nothing_and_by_zero(model: Any) -> None:
    with ls.operate(model, ls.Route([ls.Visit(block, attention=1.0, mlp=1.0) for block in range(6)])) as same:
        assert all(now is then for now, then in zip(blocks_of(same), blocks_of(model), strict=True))
    with ls.operate(model, "scale-mlp 2 0"):
        zero = logits_of(model, tokens())
    with ls.operate(model, "skip-mlp 2"):
        assert torch.equal(logits_of(model, tokens()), zero)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_in_memory_and_on_disk(
    model: Any, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model.to(dtype).save_pretrained(tmp_path / "source")
    plan = "scale-mlp 2 0.3; scale-attention 2 1.7; heads-off 1 of 2; neurons-off 3 of 4; repeat 2"
    with ls.operate(model, plan):
        ls.save(model, tmp_path / "saved")
    ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    saved, written = (reload(tmp_path / path).state_dict() for path in ("saved", "out"))
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[key], written[key]) for key in saved)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_kept_changes_save_train_and_generate(model: Any, tmp_path: Path) -> None:
    ls.operate_(model, "scale-mlp 1 0.5; repeat 1; heads-off 0 of 3")
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


@pytest.mark.parametrize("name", ["llama"])
def test_what_is_not_there_is_refused(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "source")
    heads = model.config.num_attention_heads
    plan, words = f"heads-off {heads} of 2", f"block 2 has no head {heads}: it has {heads} heads, 0 to {heads - 1}"
    with pytest.raises(ls.PlanError, match=words), ls.operate(model, plan):
        pytest.fail("operated")
    with pytest.raises(ls.PlanError, match=words):
        ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    with pytest.raises(ls.PlanError, match=words):
        ls.sweep(model, plan, tokens())
    with pytest.raises(ls.PlanError, match="has no neuron 5000"), ls.operate(model, "neurons-off 5000 of 2"):
        pytest.fail("operated")


@pytest.mark.parametrize("name", ["llama"])
def test_an_adapter_on_the_output_projection_is_seen(model: Any) -> None:
    """Refuse an adapter: it adds to the output what zeros and factors of the base weight do not reach."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], r=2, init_lora_weights=False))
    for plan in ("scale-attention 2 0.5", "heads-off 0 of 2"):
        with pytest.raises(ls.UnsupportedEditError, match="cannot be changed"), ls.operate(adapted, plan):
            pytest.fail("operated")


@pytest.mark.parametrize("name", ["llama"])
def test_offloaded_weights_are_not_scaled(model: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model)
    with pytest.raises(ls.UnsupportedEditError, match="is offloaded"), ls.operate(model, "scale-mlp 2 0.5"):
        pytest.fail("operated")


class _Squared(nn.Module):
    """Linear layer that is not linear: what is found by its shape must not be believed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight) ** 2


@pytest.mark.parametrize("name", ["llama"])
def test_a_projection_that_is_not_linear_is_not_scaled(model: Any) -> None:
    config = model.config
    for block in blocks_of(model):
        block.get_submodule("mlp").down_proj = _Squared(config.intermediate_size, config.hidden_size)
    with (
        pytest.raises(ls.UnsupportedEditError, match="no weights were found that scale"),
        ls.operate(model, "scale-mlp 2 0.5"),
    ):
        pytest.fail("operated")


def test_a_factor_that_overflows_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama").half()
    model.save_pretrained(tmp_path / "source")
    before = state(model)
    words = "a factor of 1e\\+09 makes numbers of .* larger than float16 can hold"
    with pytest.raises(ls.PlanError, match=words), ls.operate(model, "scale 2 1e9"):
        pytest.fail("operated")
    assert state(model) == before
    with pytest.raises(ls.PlanError, match=words):
        ls.edit_checkpoint(tmp_path / "source", "scale 2 1e9", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_blocks_of_one_kind_may_have_other_numbers_of_heads() -> None:
    model = tiny_model("gpt2")
    attention: Any = blocks_of(model)[3].attn
    attention.num_heads, attention.head_dim = attention.num_heads // 2, attention.head_dim * 2
    alone = ls.sweep(model, ["heads-off 1 of 3"], tokens())
    after_another = ls.sweep(model, ["heads-off 0 of 2", "heads-off 1 of 3"], tokens())
    assert after_another.kl_nats.iloc[-1] == pytest.approx(alone.kl_nats.iloc[-1], abs=1e-7)
    with (
        pytest.raises(ls.PlanError, match="block 3 has no head 2: it has 2 heads"),
        ls.operate(model, "heads-off 2 of 3"),
    ):
        pytest.fail("operated")


@pytest.mark.parametrize(("name", "block"), [("afmoe", 2), ("qwen3_next", 2)])
def test_heads_behind_a_gate_are_columns_of_the_output_projection(name: str, block: int) -> None:
    model = tiny_model(name)
    attention: Any = blocks_of(model)[block].get_submodule("self_attn")
    size = model.config.head_dim

    def without_head_1(_module: Any, args: Any) -> Any:
        hidden = args[0].clone()
        hidden[..., size : 2 * size] = 0
        return (hidden,)

    handle = attention.o_proj.register_forward_pre_hook(without_head_1)
    meant = logits_of(model, tokens())
    handle.remove()
    with ls.operate(model, f"heads-off 1 of {block}"):
        found = logits_of(model, tokens())
    torch.testing.assert_close(found, meant, rtol=0, atol=1e-6)
    assert not torch.equal(found, logits_of(model, tokens()))
