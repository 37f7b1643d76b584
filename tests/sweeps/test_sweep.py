"""`layersurgery.sweep`, and what measures a batch."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import layersurgery as ls
from layersurgery.metrics.reference import METRICS
from layersurgery.plans.variants import variants
from layersurgery.runtime.block_runner import BlockRunner
from layersurgery.sweeps.measurer import Measurer
from tests.support.zoo import DEPTH, VOCAB, tiny_model, tokens
from tests.surgery.test_zoo import state


def test_the_table() -> None:
    model = tiny_model("llama")
    frame = ls.sweep(model, "swap,drop", tokens(3))
    assert list(frame.edit) == ["none"] + ["swap"] * 5 + ["drop"] * 6
    assert list(frame.layer[1:]) == [*range(5), *range(6)]
    assert list(frame.plan[:3]) == ["", "swap 0 1", "swap 1 2"]
    assert list(frame.route[:2]) == ["0:6", "1 0 2:6"]
    assert frame.relative_depth[1:6].tolist() == [0, 0.2, 0.4, 0.6, 0.8]
    assert set(frame.tokens) == {3 * 11}
    assert set(frame.sequences) == {3}
    assert set(frame.depth) == {6}
    none = frame.iloc[0]
    assert (none.kl_nats, none.agreement, none.entropy_change_bits, none.loss_change_nats, none.kl_nats_sem) == (
        0,
        1,
        0,
        0,
        0,
    )
    for row in frame.iloc[1:].itertuples():
        assert row.kl_nats > 0
        assert 0 < row.kl_nats_sem < row.kl_nats
        assert 0 <= row.agreement <= 1
        assert 0 <= row.entropy_bits <= math.log2(VOCAB)
        assert row.entropy_change_bits == pytest.approx(row.entropy_bits - none.entropy_bits, abs=1e-12)
        assert row.loss_change_nats == pytest.approx(row.loss_nats - none.loss_nats, abs=1e-12)


def test_the_table_of_a_map_has_the_place_of_each_edit(tmp_path: Path) -> None:
    model, ids = tiny_model("llama"), tokens(2)
    assert "from" not in ls.sweep(model, "drop", ids)
    frame = ls.sweep(model, "drop,jump", ids, max_span=2, directory=tmp_path / "run")
    assert (frame["from"].dtype, frame["to"].dtype) == ("Int64", "Int64")
    assert frame[frame.edit != "jump"]["from"].isna().all()
    cells = frame[frame.edit == "jump"].set_index(["from", "to"])
    assert cells.index.is_unique
    assert (cells.plan[3, 5], cells.plan[5, 3], cells.plan[4, 3]) == ("drop 3:5", "repeat 3:5", "repeat 3")
    dropped = frame[frame.edit == "drop"].set_index("layer")
    assert [cells.kl_nats[block, block + 1] for block in range(6)] == [dropped.kl_nats[block] for block in range(6)]
    written = pd.read_csv(tmp_path / "run" / "results.csv")
    assert written["from"].dropna().tolist() == frame["from"].dropna().tolist()


def test_one_route_is_run_once_and_said_of_all_its_plans() -> None:
    model = tiny_model("llama")
    measurer = Measurer(
        model, variants(["swap", {"same": "swap 2 3", "nothing": "swap 1 2; swap 1 2"}, "swap-pairs"], DEPTH)
    )
    assert len(measurer.routes) == 15 + 1
    frame = ls.sweep(model, ["swap", {"same": "swap 2 3", "nothing": "swap 1 2; swap 1 2"}], tokens())
    values = frame.set_index("name")[list(METRICS)]
    assert values.loc["same"].equals(values.loc["swap 2 3"])
    assert values.loc["nothing"].equals(values.loc["unedited"])
    assert values.loc["nothing"].kl_nats == 0


def close(one: pd.DataFrame, other: pd.DataFrame, atol: float = 1e-6) -> bool:
    numbers = [name for metric in METRICS for name in (metric, f"{metric}_sem")]
    return bool(((one[numbers] - other[numbers]).abs() < atol).all(axis=None)) and one.plan.equals(other.plan)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_the_batch_size_changes_no_more_than_rounding(batch_size: int) -> None:
    model = tiny_model("llama")
    assert close(
        ls.sweep(model, "swap,drop", tokens(5), batch_size=batch_size), ls.sweep(model, "swap,drop", tokens(5))
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "falcon-alibi", "gemma3_text"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(name: str, side: str) -> None:
    model = tiny_model(name)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    if side == "left":
        mask[0, :5] = 0
    else:
        mask[0, 7:] = 0
    frame = ls.sweep(model, ["drop", "swap 1 2"], ids, attention_mask=mask, batch_size=2)
    assert set(frame.tokens) == {6 + 11}
    for row in frame.iloc[1:].itertuples():
        meant = ls.compare(model, row.plan, ids, attention_mask=mask, batch_size=2)
        assert row.kl_nats == pytest.approx(meant.kl_nats, abs=1e-5)
        assert row.agreement == meant.agreement
        assert row.loss_nats == pytest.approx(meant.loss_nats, abs=1e-5)
    alone = ls.compare(model, "drop 2", ids[:1, mask[0].bool()])
    both = [alone, ls.compare(model, "drop 2", ids[1:])]
    whole = sum(one.kl_nats * one.tokens for one in both) / 17
    assert frame.set_index("plan").kl_nats["drop 2"] == pytest.approx(whole, abs=1e-5)


def test_a_sequence_without_any_pair_of_tokens_is_passed_over() -> None:
    mask = torch.tensor([[1] * 12, [1] + [0] * 11])
    for batch_size in (1, 2):
        frame = ls.sweep(tiny_model("llama"), "drop", tokens(), attention_mask=mask, batch_size=batch_size)
        assert set(frame.sequences) == {1}
        assert set(frame.tokens) == {11}


def test_padding_behind_every_sequence_is_not_run() -> None:
    model, mask = tiny_model("llama"), torch.tensor([[1] * 7 + [0] * 5, [1] * 5 + [0] * 7])
    measurer = Measurer(model, variants("drop", DEPTH))
    lengths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, output: lengths.append(output.shape[1]))
    measurer.measure(tokens(), mask)
    assert set(lengths) == {7}


def test_inside_inference_mode() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        frame = ls.sweep(model, "drop", tokens())
    assert close(frame, ls.sweep(model, "drop", tokens()))


def test_only_some_layers() -> None:
    frame = ls.sweep(tiny_model("llama"), "swap,drop", tokens(), layers=range(2, 5))
    assert list(frame.plan[1:]) == ["swap 2 3", "swap 3 4", "drop 2", "drop 3", "drop 4"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_blocks_run_in_it_and_logits_are_read_in_single(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    ids = tokens(4, 16)
    frame = ls.sweep(model, "drop,swap", ids, batch_size=4).set_index("plan")
    same = [
        frame.agreement[plan] == pytest.approx(ls.compare(model, plan, ids, batch_size=4).agreement, abs=0.1)
        for plan in frame.index[1:]
    ]
    assert all(same)
    for plan in frame.index[1:]:
        assert frame.kl_nats[plan] == pytest.approx(
            ls.compare(model, plan, ids, batch_size=4).kl_nats, rel=0.1, abs=5e-3
        )
    assert frame.kl_nats[""] == 0


def test_the_model_is_as_it_was_also_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2").train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    before, random = state(model), torch.get_rng_state()
    ls.sweep(model, "swap,skip-mlp", tokens())
    assert state(model) == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(model.transformer.h[3].mlp, "forward", fail)
    with pytest.raises(Exception, match="division|ZeroDivision|could not be run"):
        ls.sweep(model, "swap", tokens())
    monkeypatch.undo()
    assert state(model) == before


def test_edits_of_an_edited_model() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    ls.operate_(other, "repeat 1; drop 4", verify=False)
    with ls.operate(model, "repeat 1; drop 4"):
        frame = ls.sweep(model, "drop", tokens())
    assert close(frame, ls.sweep(other, "drop", tokens()), 1e-9)
    assert frame.set_index("plan").kl_nats["drop 2"] == pytest.approx(
        ls.compare(other, "drop 2", tokens()).kl_nats, abs=1e-6
    )


def test_families_leave_out_what_an_architecture_cannot_do_and_say_so() -> None:
    model = tiny_model("nemotron_h")
    with pytest.warns(
        UserWarning, match=r"\d edits are not measured; the first of them is 'skip-attention \d': .* has no attention"
    ):
        frame = ls.sweep(model, "skip-attention", tokens())
    assert list(frame.plan[1:]) == [
        f"skip-attention {block}" for block in range(DEPTH) if f"skip-attention {block}" in set(frame.plan)
    ]
    with pytest.raises(ls.UnsupportedEditError, match="has no attention"):
        ls.sweep(model, "skip-attention 2", tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.sweep(model, "drop", tokens())


def test_what_is_refused() -> None:
    model = tiny_model("llama")
    cases: list[tuple[Any, Any, str]] = [
        ("swap", torch.zeros(2, 1, dtype=torch.long), "no position has a next token"),
        ("swap", [[1, 2], [3]], "sequences of one length"),
        ("drop 9", tokens(), "block 9 is out of range: the model has 6 blocks"),
        (ls.Route((0, 8)), tokens(), "the route visits block 8"),
    ]
    for wanted, ids, words in cases:
        with pytest.raises(ls.PlanError, match=words):
            ls.sweep(model, wanted, ids)
    with pytest.raises(ls.UnsupportedEditError, match="shares one block's weights|zamba"):
        ls.sweep(_renamed(tiny_model("llama"), "zamba"), "swap", tokens())


def _renamed(model: Any, model_type: str) -> Any:
    model.config.model_type = model_type
    return model


class _Handing(nn.Module):
    """A block that hands its neighbour something beside the stream."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.layer_type = getattr(block, "layer_type", None)

    def forward(self, hidden_states: torch.Tensor, _beside: Any = None, **kwargs: Any) -> Any:
        return self.block(hidden_states, **kwargs), hidden_states.mean(-1)


def test_blocks_that_hand_on_more_than_the_stream_are_refused() -> None:
    model = tiny_model("llama")
    inner = model.model
    inner.layers = nn.ModuleList(map(_Handing, inner.layers))

    def forward(input_ids: torch.Tensor, **_: Any) -> Any:
        stream, beside = inner.embed_tokens(input_ids), None
        embeddings = inner.rotary_emb(stream, torch.arange(input_ids.shape[1])[None])
        for layer in inner.layers:
            stream, beside = layer(stream, beside, position_embeddings=embeddings)
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=model.lm_head(inner.norm(stream)))

    model.forward = forward
    with pytest.raises(ls.UnsupportedEditError, match="block 0 hands block 1 more than the residual stream"):
        ls.sweep(model, "swap", tokens())


def test_what_is_no_number_is_not_averaged_away() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        # Harmless at its own place, where the stream is small; behind block 2 it overflows.
        model.model.layers[5].mlp.down_proj.weight.mul_(math.nan)
    with pytest.raises(ls.MeasurementError, match="LlamaForCausalLM, unedited, returns NaN or infinite logits"):
        ls.sweep(model, "drop 1", tokens())
    blind = tiny_model("llama")
    blind.model.layers[3].register_forward_pre_hook(_nan_if_shifted(blind), with_kwargs=True)
    frame = ls.sweep(blind, ["drop", "swap 3 4"], tokens(3)).set_index("plan")
    for plan in ("drop 0", "drop 2"):
        assert frame.loc[plan, list(METRICS)].isna().all()
    assert frame.loc[["drop 3", "drop 4", "drop 5"], list(METRICS)].notna().all(axis=None)


def _nan_if_shifted(model: Any) -> Any:
    """Simulate an overflow: block 3 returns NaN unless its input is exactly that of the unedited model."""
    with torch.no_grad():
        usual = model(tokens(3), output_hidden_states=True, use_cache=False).hidden_states[3]
    probing: list[int] = []

    def hook(_: Any, args: Any, kwargs: Any) -> Any:
        stream = args[0]
        if stream.shape != usual.shape or torch.equal(stream, usual):
            probing.append(1)
            return None
        return (stream * math.nan, *args[1:]), kwargs

    return hook


def test_streams_are_let_go_as_early_as_the_forecast_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    measurer = Measurer(model, variants("swap,drop", DEPTH))
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    run = BlockRunner.run

    def watched(self: BlockRunner, *args: Any) -> torch.Tensor:
        nonlocal most
        result = run(self, *args)
        alive.append(weakref.ref(result))
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return result

    monkeypatch.setattr(BlockRunner, "run", watched)
    gc.freeze()  # so that each collection looks only at what is newer
    try:
        measurer.measure(tokens(), torch.ones_like(tokens()))
        gc.collect()
    finally:
        gc.unfreeze()
    assert most <= 3
    assert measurer.schedule.states_at_peak <= DEPTH + 2
    assert not [ref for ref in alive if ref() is not None]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: out of memory"),
        MemoryError(),
    ],
    ids=["torch", "triton", "cublas", "cpu", "new-cublas", "cuda", "driver", "python"],
)
def test_a_batch_that_does_not_fit_is_halved(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    meant = ls.sweep(model, "drop", tokens(6), batch_size=1)
    tried: list[int] = []
    record = BlockRunner.record

    def crowded(self: BlockRunner, inputs: dict[str, Any], keep: Any, *more: Any) -> Any:
        if keep:  # and not one of the small tries
            tried.append(len(inputs["input_ids"]))
            if tried[-1] > 2:
                raise error
        return record(self, inputs, keep, *more)

    monkeypatch.setattr(BlockRunner, "record", crowded)
    with pytest.warns(UserWarning, match="memory ran out with 3 sequences at once; continuing with 1"):
        assert close(ls.sweep(model, "drop", tokens(6)), meant)
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(
        BlockRunner, "run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried"))
    )
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(
            ls.MeasurementError, match="memory is too small for one sequence of 12 tokens: use a shorter context"
        ),
    ):
        ls.sweep(model, "drop", tokens(6))


def test_a_batch_in_parts_is_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out during a later part: its results so far are not counted, and the rows of tokens are in order."""
    measurer = Measurer(tiny_model("llama"), variants("swap,drop", DEPTH))
    ids = tokens(7)
    mask = torch.ones_like(ids)
    mask[3, 5:] = 0
    meant = measurer.measure(ids, mask, per_token=True)
    run, calls = BlockRunner.run, 0

    def crowded(self: BlockRunner, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 45:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"
            )
        return run(self, *args)

    monkeypatch.setattr(BlockRunner, "run", crowded)
    measurer.max_sequences = 4
    shares: list[float] = []
    with pytest.warns(UserWarning, match="continuing with 1"):
        found = measurer.measure(ids, mask, per_token=True, on_fraction=shares.append)
    assert measurer.max_sequences == found.max_sequences == 1
    assert meant.max_sequences is None
    assert found.counts == meant.counts
    np.testing.assert_allclose(found.values, meant.values, atol=1e-5)
    assert found.token_metrics is not None
    assert meant.token_metrics is not None
    assert found.token_metrics.keys() == meant.token_metrics.keys()
    for key, metrics in found.token_metrics.items():
        torch.testing.assert_close(metrics, meant.token_metrics[key], atol=1e-5, rtol=1e-5)
    assert shares[-1] == 1


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    ls.sweep(tiny_model("llama"), "drop", tokens(5), batch_size=2, progress=lambda *now: told.append(now))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_intervals_end_where_a_metric_does() -> None:
    """The intervals of two short sequences are wide."""
    frame = ls.sweep(tiny_model("llama"), "drop,swap", tokens(2)[:, :5])
    for name in ("kl_nats", "agreement", "entropy_bits", "loss_nats", "accuracy"):
        assert frame[f"{name}_low"].min() >= 0
    assert frame[["agreement_high", "accuracy_high"]].max().max() <= 1
    assert frame.loss_change_nats_low.min() < 0


def test_the_headline_in_five_lines_of_pandas() -> None:
    frame = ls.sweep(tiny_model("llama", num_hidden_layers=9), "swap,drop", tokens(4))
    said = ls.summary_sentence(frame)
    for edit in ("swap", "drop"):
        rows = frame[frame.edit == edit].sort_values("layer")
        kept = 100 * rows.agreement.iloc[2:-2]
        assert f"{kept.min():.0f}-{kept.max():.0f} % " in said
        assert f"under {edit}, median {kept.median():.0f} %" in said
    frame.loc[frame.edit == "drop", "agreement"] = 0.94
    assert ls.summary_sentence(frame).endswith("; 94 % under drop")
    assert said.startswith("intermediate layers keep ")
    assert ls.summary_sentence(ls.sweep(tiny_model("llama", num_hidden_layers=4), "swap", tokens())) == ""


def test_a_wrapped_model() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    ids = tokens(2)
    frame = ls.sweep(model, "drop,skip-attention", ids, batch_size=2)
    for row in frame.iloc[1:].itertuples():
        assert row.kl_nats == pytest.approx(ls.compare(model, row.plan, ids, batch_size=2).kl_nats, abs=1e-5)
