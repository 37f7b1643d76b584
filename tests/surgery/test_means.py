"""Means in the place of branches: measured, in memory, in sweeps and on disk the same, and what hooks give."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import layersurgery as ls
from layersurgery.plans.visit import BRANCHES
from tests.checkpoints.test_zoo import reload
from tests.support.dense import BRANCH_MODULES, blocks_of
from tests.support.reference import logits_of
from tests.support.unsupported import UNSUPPORTED
from tests.support.zoo import rotate, tiny_model, tokens
from tests.surgery.test_zoo import state

MEAN_EDITS = ["skip-attention 2 mean", "skip-mlp 2 mean", "drop 2 mean"]


@pytest.fixture
def model(name: str) -> Any:
    model = tiny_model(name)
    logits_of(model, tokens())  # some note in their modules that they ran
    return model


def _kl(model: Any, edited: torch.Tensor) -> float:
    before, after = (torch.log_softmax(logits.double(), -1)[:, :-1] for logits in (logits_of(model, tokens()), edited))
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize(("name", "plan"), rotate(MEAN_EDITS))
def test_memory_is_sweep_is_disk_and_undo_is_exact(model: Any, name: str, plan: str, tmp_path: Path) -> None:
    try:
        means = ls.measure_means(model, tokens())
    except ls.UnsupportedEditError as error:
        with pytest.raises(ls.UnsupportedEditError, match=re.escape(str(error)[:60])):  # as for all sweeps
            ls.sweep(model, "drop 2", tokens())
        return
    model.save_pretrained(tmp_path / "source")
    before, logits = state(model), logits_of(model, tokens())
    blocked = [text for key, text in UNSUPPORTED.items() if key == (name, plan.removesuffix(" mean"))]
    if blocked or 2 in means.errors:
        with pytest.raises(ls.UnsupportedEditError), ls.operate(model, plan, means=means):
            pytest.fail("operated")
        assert state(model) == before
        return
    with ls.operate(model, plan, means=means):
        found = logits_of(model, tokens())
    assert not torch.equal(found, logits)
    swept = ls.sweep(model, [plan], tokens(), means=means)
    assert swept.kl_nats.iloc[-1] == pytest.approx(_kl(model, found), abs=2e-6)
    try:
        ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "out", means=means)
    except ls.UnsupportedEditError as error:
        assert "mean of block 2 cannot be written" in str(error) or "not supported" in str(error)  # noqa: PT017
        assert not (tmp_path / "out").exists()
        with pytest.raises(ls.UnsupportedEditError, match="mean"):
            ls.operate_(model, plan, means=means)
    else:
        assert torch.equal(logits_of(reload(tmp_path / "out"), tokens()), found)
    assert state(model) == before
    assert torch.equal(logits_of(model, tokens()), logits)


@pytest.mark.parametrize("name", BRANCH_MODULES)
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_mean_is_what_a_hook_returns(model: Any, name: str, branch: Any) -> None:
    """The stand-in gives what a hook gives that puts the vector in the place of what the branch adds."""
    means = ls.measure_means(model, tokens())
    vector = means[2, branch]
    pieces = BRANCH_MODULES[name][BRANCHES.index(branch)]
    seen: list[torch.Tensor] = []
    handles = []
    for number, (path, pick) in enumerate(pieces):

        def put(
            _m: Any, args: Any, kwargs: Any, output: Any, pick: Any = pick, constant: Any = vector * (number == 0)
        ) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            scale = model.config.residual_multiplier if name == "granite" else 1
            added = first * scale if name == "granite" else pick(args, kwargs, output)
            seen.append(added.detach().clone())
            value = (constant.double() / scale).float()
            changed = value.expand_as(first).clone() if added is first or name == "granite" else first - added + value
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles.append(blocks_of(model)[2].get_submodule(path).register_forward_hook(put, with_kwargs=True))
    meant = logits_of(model, tokens())
    for handle in handles:
        handle.remove()
    # The blocks before are as they were, so the hooks saw what the branch adds in the unedited model.
    added = torch.stack(seen).double().sum(0).view(*tokens().shape, -1)
    torch.testing.assert_close(vector.double(), added[:, 1:].flatten(0, 1).mean(0), rtol=1e-5, atol=1e-6)
    with ls.operate(model, f"skip-{branch} 2 mean", means=means):
        found = logits_of(model, tokens())
    if name in ("granite", "bloom", "mpt", "falcon_h1"):  # which also add, or multiply, outside the module
        torch.testing.assert_close(found, meant, rtol=0, atol=2e-6)
    else:
        assert torch.equal(found, meant)
    assert not torch.equal(found, logits_of(model, tokens()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_means_are_sums_that_merge(model: Any, name: str, tmp_path: Path) -> None:
    ids = torch.cat([tokens(), tokens().flip(-1)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # padding, and one token more that is the first
    whole = ls.measure_means(model, ids, attention_mask=mask, batch_size=3)
    halves = [ls.measure_means(model, ids[part], attention_mask=mask[part]) for part in (slice(0, 2), slice(2, None))]
    assert whole.tokens == int(mask.sum()) - len(ids)
    merged = halves[0].merged(halves[1])
    assert merged.tokens == whole.tokens
    for where in whole.vectors:
        torch.testing.assert_close(merged[where], whole[where], rtol=1e-5, atol=1e-6)
    streams = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    counted = (mask.cumsum(-1) > 1).bool()
    change = (streams[3] - streams[2]).double()[counted].mean(0)
    if not bool((mask == 0).any()) or name == "llama":
        torch.testing.assert_close(whole.of_block(2).double(), change, rtol=1e-4, atol=1e-5)
    whole.save(tmp_path / "means.safetensors")
    again = ls.Means.load(tmp_path / "means.safetensors")
    assert (again, again.fingerprint, again.text) == (whole, whole.fingerprint, whole.text)
    assert all(torch.equal(again[where], whole[where]) for where in whole.vectors)
    assert ls.measure_means(model, ids, attention_mask=mask, first_tokens=True).tokens == int(mask.sum())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_mean_of_zeros_is_a_skip_and_a_cache_changes_nothing(model: Any) -> None:
    from dataclasses import replace

    means = ls.measure_means(model, tokens())
    nothing = replace(means, vectors={at: replace(mean, vector=mean.vector * 0) for at, mean in means.vectors.items()})
    for plan in MEAN_EDITS[:2]:
        with ls.operate(model, plan, means=nothing):
            zeros = logits_of(model, tokens())
        with ls.operate(model, plan.removesuffix(" mean")):
            assert torch.equal(logits_of(model, tokens()), zeros)
    with ls.operate(model, "drop 2 mean; skip-attention 0 mean", means=means):
        cached, uncached = (
            model.generate(tokens()[:1], max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
        )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_hold_means_in_saved_models(model: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model.to(dtype).save_pretrained(tmp_path / "source")
    means = ls.measure_means(model, tokens())
    plan = "drop 2 mean; skip-mlp 4 mean; repeat 4"
    ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "out", means=means)
    ls.operate_(model, plan, means=means)
    meant = logits_of(model, tokens())
    model.save_pretrained(tmp_path / "saved")
    saved, written = (reload(tmp_path / path) for path in ("saved", "out"))
    assert saved.state_dict().keys() == written.state_dict().keys()
    assert all(torch.equal(value, written.state_dict()[key]) for key, value in saved.state_dict().items())
    assert torch.equal(logits_of(written.to(dtype), tokens()), meant)


@pytest.mark.parametrize("name", ["llama"])
def test_what_cannot_be_is_refused(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "source")
    means = ls.measure_means(model, tokens())
    with pytest.raises(ls.PlanError, match="measure the means first"), ls.operate(model, "drop 2 mean"):
        pytest.fail("operated")
    with pytest.raises(ls.PlanError, match="measure the means first"):
        ls.edit_checkpoint(tmp_path / "source", "drop 2 mean", tmp_path / "out")
    with pytest.raises(ls.UnsupportedEditError, match="no bias of its"):
        ls.edit_checkpoint(tmp_path / "source", "drop 2 mean", tmp_path / "out", means=means)
    with pytest.raises(ls.PlanError, match="has no effect on these edits"):
        ls.sweep(model, "drop", tokens(), means=means)
    with (
        ls.operate(model, "drop 3"),
        pytest.raises(ls.PlanError, match="of a model of 6 blocks"),
        ls.operate(model, "drop 2 mean", means=means),
    ):
        pytest.fail("operated")
    with pytest.raises(ls.UnsupportedEditError, match="is replaced by its mean"):
        ls.operate_(model, "drop 2 mean", means=means)
    model = ls.operate_(model, "drop 2 mean", means=means, verify=False)
    with pytest.raises(ls.UnsupportedEditError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    (tmp_path / "file").write_text("no means")
    with pytest.raises(ls.SourceError, match="holds no means"):
        ls.Means.load(tmp_path / "file")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_means_are_refused_where_another_block_has_the_number(model: Any, tmp_path: Path) -> None:
    means = ls.measure_means(model, tokens())
    means.save(tmp_path / "means.safetensors")
    loaded = ls.Means.load(tmp_path / "means.safetensors")
    other = "were measured with other weights"
    for given in (means, loaded):
        with ls.operate(model, "swap 1 4"):
            for plan in ("drop 1 mean", "skip-mlp 4 mean"):
                with pytest.raises(ls.PlanError, match=other), ls.operate(model, plan, means=given):
                    pytest.fail("operated")
            with pytest.raises(ls.PlanError, match=other):
                ls.sweep(model, ["skip-mlp 1 mean"], tokens(), means=given)
            with ls.operate(model, "skip-mlp 2 mean", means=given):  # this one is where it was
                pass
    model.save_pretrained(tmp_path / "source")
    ls.edit_checkpoint(tmp_path / "source", "swap 1 4", tmp_path / "swapped")
    with pytest.raises(ls.PlanError, match=other):
        ls.edit_checkpoint(tmp_path / "swapped", "skip-mlp 1 mean", tmp_path / "out", means=loaded)
    assert not (tmp_path / "out").exists()
    # Another data type, and light training, do not make another block of it.
    with ls.operate(model.to(torch.bfloat16), "drop 1 mean", means=loaded):
        pass
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(weight.std() * 0.01 if weight.ndim > 1 else 0)
    with ls.operate(model, "drop 1 mean", means=loaded):
        pass


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "mamba", "jamba", "mixtral"])
def test_means_are_refused_where_the_weights_that_write_the_stream_differ(name: str) -> None:
    """Also where a norm follows the branch, and where the first weights of all blocks are alike (those of Mamba)."""
    model = tiny_model(name)
    means = ls.measure_means(model, tokens())
    branch = "mlp" if (2, "mlp") in means.vectors else "attention"
    plan = f"skip-{branch} 2 mean" if name != "mamba" else "drop 2 mean"
    with ls.operate(model, plan, means=means):
        pass
    for change in ("swap 2 3", f"scale-{branch} 2 0.1" if name != "mamba" else "scale 2 0.1"):
        with (
            ls.operate(model, change),
            pytest.raises(ls.PlanError, match="with other weights"),
            ls.operate(model, plan, means=means),
        ):
            pytest.fail("operated")


def test_means_of_models_of_one_class_and_other_weights_are_not_merged() -> None:
    first, second = (ls.measure_means(tiny_model("llama", seed=seed), tokens()) for seed in (0, 1))
    with pytest.raises(ls.PlanError, match="with other weights"):
        first.merged(second)


def test_a_sweep_measures_the_means_first_and_keeps_them(tmp_path: Path) -> None:
    model = tiny_model("llama")
    in_memory = ls.sweep(model, "drop-mean,skip-attention-mean,skip-mlp-mean", tokens())
    given = ls.sweep(model, "drop-mean", tokens(), means=ls.measure_means(model, tokens()))
    assert list(given.kl_nats) == list(in_memory[in_memory.edit.isin(["none", "drop-mean"])].kl_nats)
    on_disk = ls.sweep(model, "drop-mean", tokens(), directory=tmp_path / "run")
    assert list(on_disk.kl_nats) == list(given.kl_nats)
    again = ls.sweep(
        model, "drop-mean", tokens(), directory=tmp_path / "other", means=tmp_path / "run/means.safetensors"
    )
    assert list(again.kl_nats) == list(given.kl_nats)
    assert not (tmp_path / "other/means.safetensors").exists()
    with pytest.raises(ls.OutputError, match="means"):
        ls.sweep(model, "drop-mean", tokens(), directory=tmp_path / "run", means=tmp_path / "run/means.safetensors")
    ls.sweep(model, "drop", tokens(), directory=tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run/means.safetensors").exists()


def test_a_sweep_that_was_killed_keeps_its_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layersurgery.runs import means as runs_means
    from layersurgery.sweeps.measurer import Measurer

    model, calls = tiny_model("llama"), []
    measure, batch = runs_means.means_of_text, Measurer.measure_batch

    def counted(*args: Any, **options: Any) -> ls.Means:
        calls.append(1)
        return measure(*args, **options)

    monkeypatch.setattr(runs_means, "means_of_text", counted)

    def stop(*_args: Any, **_options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Measurer, "measure_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        ls.sweep(model, "drop-mean", tokens(), directory=tmp_path / "run", batch_size=1)
    monkeypatch.setattr(Measurer, "measure_batch", batch)
    found = ls.sweep(model, "drop-mean", tokens(), directory=tmp_path / "run", batch_size=1)
    assert len(calls) == 1
    assert list(found.kl_nats) == list(ls.sweep(model, "drop-mean", tokens(), batch_size=1).kl_nats)
