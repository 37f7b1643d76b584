"""Signals measured on text match hooks, eager attention and dense tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import layersurgery as ls
from layersurgery.analyses.signal_tables import SignalTables, make_measurer
from layersurgery.metrics.reference import METRICS, measure
from layersurgery.plans.route import Route
from layersurgery.runtime import attention_weights
from layersurgery.runtime.block_runner import BlockRunner
from layersurgery.runtime.contributions import capture_contributions, find_contributions
from layersurgery.sweeps.batch_metrics import check_readout
from layersurgery.sweeps.sweep import collect_sums
from tests.runtime.test_offload import dispatched, on_disk
from tests.support.dense import BRANCH_MODULES, blocks_of, contributions, matrices, model_of, previous_five
from tests.support.reference import logits_along, logits_of
from tests.support.zoo import DEPTH, ZOO, tiny_model, tokens
from tests.surgery.test_zoo import state

SIGNALS = ["lens", "attention", "norms", "similarity"]
# Without a mask, transformers' eager attention of falcon is not causal; in falcon_h1, Mamba mixes tokens as well.
NO_EAGER = ("falcon", "falcon_h1")


def assert_same(found: pd.DataFrame, meant: pd.DataFrame, **options: Any) -> None:
    """Compare two tables; public functions put the columns to look at first."""
    pd.testing.assert_frame_equal(pd.DataFrame(found), pd.DataFrame(meant), check_like=True, **options)


@pytest.mark.parametrize("name", BRANCH_MODULES)
def test_every_signal_is_what_the_dense_way_gives(name: str) -> None:
    model, ids = model_of(name), tokens(2, 11)
    final = logits_of(model, ids)
    before = state(model)
    tables = ls.analyses.measure(model, ids, SIGNALS)
    assert state(model) == before
    assert torch.equal(logits_of(model, ids), final)
    target = ids[:, 1:].flatten()

    lens = tables["lens"]
    for layer in range(DEPTH):
        read = logits_along(model, Route.identity(layer + 1), ids)
        meant = dict(
            zip(METRICS, measure(final[:, :-1].flatten(0, 1), read[:, :-1].flatten(0, 1), target).mean(-1), strict=True)
        )
        for column, metric in (
            ("lens_kl_nats", "kl_nats"),
            ("lens_entropy_bits", "entropy_bits"),
            ("lens_agreement", "agreement"),
        ):
            assert lens[column][layer] == pytest.approx(float(meant[metric]), abs=1e-5), (layer, column)
    assert (lens.lens_kl_nats[DEPTH - 1], lens.lens_agreement[DEPTH - 1]) == (0, 1)

    own = contributions(model, name, ids)
    norms = tables["norms"]
    for part in ("attention", "mlp"):
        meant_norms = [float(own[part, layer].norm(dim=-1).mean()) for layer in range(DEPTH)]
        np.testing.assert_allclose(norms[f"{part}_norm"], meant_norms, rtol=1e-4)
    np.testing.assert_allclose(norms.attention_to_mlp_ratio, norms.attention_norm / norms.mlp_norm)

    similarity = tables["similarity"].set_index(["layer", "part"])
    for layer in range(DEPTH - 1):
        with ls.operate(model, f"swap {layer} {layer + 1}"):
            moved = contributions(model, name, ids)  # by places in the edited model
        for part in ("attention", "mlp", "block"):
            pairs = {
                "self": (own[part, layer], moved[part, layer + 1]),
                "index": (own[part, layer], moved[part, layer]),
                "adjacent": (own[part, layer], own[part, layer + 1]),
            }
            for kind, (one, other) in pairs.items():
                cosine = torch.nn.functional.cosine_similarity(one, other, dim=-1).mean()
                assert similarity.loc[(layer, part), kind] == pytest.approx(float(cosine), abs=1e-4), (
                    layer,
                    part,
                    kind,
                )


@pytest.mark.parametrize("name", [name for name in BRANCH_MODULES if name not in NO_EAGER])
def test_attention_is_read_off_the_kernel_as_eager_attention_writes_it(name: str) -> None:
    model, ids = model_of(name), tokens(2, 11)
    table = ls.analyses.attention(model, ids)
    meant = [previous_five(matrix) for matrix in matrices(model, ids)]
    assert len(meant) == DEPTH
    np.testing.assert_allclose(table.attention_prev5, [share for share, _ in meant], atol=2e-6)
    np.testing.assert_allclose(table.attention_prev5_mean, [mean for _, mean in meant], atol=2e-6)
    assert (table.attention_prev5 <= 1).all()
    assert set(table.tokens) == {2 * 6}
    assert table.mixer.nunique() == 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "gpt_oss", "xglm", "deepseek_v3"])
def test_short_text_without_five_tokens_before_any(name: str) -> None:
    table = ls.analyses.attention(tiny_model(name), tokens(2, 4))
    assert table.attention_prev5.isna().all()
    assert (table.attention_prev5_mean > 0).all()


@pytest.mark.parametrize("name", ZOO)
def test_contributions_are_all_that_a_block_adds(name: str) -> None:
    """Captured contributions sum to a block's output minus its input, or the block is named as skipped."""
    model, ids = tiny_model(name), tokens(2, 9)
    found = find_contributions(BlockRunner(model, ls.anatomy(model)))
    caught: dict[int, torch.Tensor] = {}
    added: dict[int, torch.Tensor] = {}

    def catch(number: int, times: float) -> Callable[[torch.Tensor], None]:
        return lambda value: caught.__setitem__(number, caught.get(number, 0) + times * value)

    def add(number: int) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            added[number] = after - before[number]

        return hook

    before: dict[int, torch.Tensor] = {}
    with ExitStack() as runner, torch.no_grad():
        for number, (block, member) in enumerate(zip(blocks_of(model), found, strict=True)):
            taps = [(tap, catch(number, tap.scale)) for tap in member.capture_points]
            runner.enter_context(capture_contributions(block, taps, member.mixers, None, ids.shape))
            enter = block.register_forward_pre_hook(
                lambda _m, args, kwargs, number=number: before.__setitem__(
                    number, (args[0] if args else kwargs["hidden_states"]).clone()
                ),
                with_kwargs=True,
            )
            leave = block.register_forward_hook(add(number), with_kwargs=True)
            runner.callback(enter.remove)
            runner.callback(leave.remove)
        model(ids, use_cache=False)
    for number, member in enumerate(found):
        if not member.error:
            torch.testing.assert_close(caught[number], added[number], rtol=1e-4, atol=1e-4)
    skipped = {name: 1 for name, member in enumerate(found) if member.error}
    assert len(skipped) == {"rwkv": DEPTH, "opt-postnorm": DEPTH, "minimax": DEPTH, "gpt_neox_japanese": 1}.get(name, 0)


def test_what_a_hybrid_mixes_tokens_with_is_named_and_what_it_lacks_is_said() -> None:
    model = tiny_model("jamba")
    tables = ls.analyses.measure(model, tokens(2, 12), ["attention", "norms"])
    assert list(tables["norms"].mixer) == ["JambaMambaMixer", "JambaAttention", "JambaMambaMixer"] * 2
    assert list(tables["attention"].attention_prev5.notna()) == [False, True, False] * 2
    assert tables["norms"].attention_norm.notna().all()
    observer = make_measurer(tiny_model("mamba"), ["norms"], DEPTH).observer
    assert observer is not None
    assert observer.skipped["mlp norm of block 2"] == "the block has no mlp"
    rwkv = make_measurer(tiny_model("rwkv"), ["norms"], DEPTH).observer
    assert rwkv is not None
    assert "both mix tokens" in rwkv.skipped["attention norm of block 0"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "gemma2", "jamba"])
@pytest.mark.parametrize("left", [False, True])
def test_padding_counts_for_nothing(name: str, left: bool) -> None:
    model, ids = tiny_model(name), tokens(1, 9)
    if name == "jamba" and left:
        pytest.skip("its Mamba blocks see what is padded in front, also by themselves")
    padding = torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat([padding, ids] if left else [ids, padding], 1)
    mask = torch.cat([padding, torch.ones_like(ids)] if left else [torch.ones_like(ids), padding], 1)
    meant = ls.analyses.measure(model, ids, SIGNALS)
    found = ls.analyses.measure(model, padded, SIGNALS, attention_mask=mask)
    for signal in SIGNALS:
        numbers = meant[signal].select_dtypes("float").columns
        np.testing.assert_allclose(found[signal][numbers], meant[signal][numbers], atol=1e-5, rtol=1e-4)
        assert list(found[signal].tokens) == list(meant[signal].tokens)


def test_padding_behind_a_sequence_beside_a_longer_one_counts_for_nothing() -> None:
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, 9:] = 0
    measurer = make_measurer(tiny_model("llama"), SIGNALS, DEPTH)
    together = collect_sums(measurer, ids, mask, None, None)
    alone = collect_sums(measurer, ids[1:, :9], mask[1:, :9], None, None)
    assert together.counts.tolist() == [12, 8]
    np.testing.assert_allclose(together.observed[1], alone.observed[0], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(together.values[1], alone.values[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("signals", [["lens"], ["attention"], ["norms"], ["similarity"], [*SIGNALS, "drop"]])
def test_signals_measured_together_are_those_measured_apart(signals: list[str]) -> None:
    model, ids = tiny_model("gpt_neox"), tokens(5, 10)
    together = ls.analyses.measure(model, ids, [*SIGNALS, "drop"], batch_size=2)
    apart = ls.analyses.measure(model, ids, signals, batch_size=2)
    assert list(apart) == signals
    for signal in signals:
        assert_same(apart[signal], together[signal])
    swept = ls.sweep(model, "drop", ids, batch_size=2)
    assert_same(together["drop"], swept, atol=1e-9)


@pytest.mark.parametrize("order", ["depth-first", "layer-major"])
def test_swapped_blocks_are_compared_in_either_order(order: str) -> None:
    model, ids = tiny_model("gpt2"), tokens(2, 10)
    measurer = make_measurer(model, ["similarity", "drop"], DEPTH, order=order)
    found = SignalTables(measurer, collect_sums(measurer, ids, torch.ones_like(ids), None, None), "m").similarity()
    meant = ls.analyses.similarity(model, ids).assign(model="m")
    assert_same(found, meant, atol=1e-9)


def test_the_cosine_of_a_thing_with_itself_is_one() -> None:
    """Swap two blocks with the same weights: the model stays the same, and so do their contributions."""
    model, ids = tiny_model("llama"), tokens(2, 10)
    model.model.layers[3].load_state_dict(model.model.layers[2].state_dict())
    table = ls.analyses.similarity(model, ids).set_index(["layer", "part"]).loc[2]
    np.testing.assert_allclose(table["index"], 1, atol=1e-6)
    np.testing.assert_allclose(table["self"], table["adjacent"], atol=1e-6)
    assert (table["self"] < 0.999).all()


def test_what_it_costs() -> None:
    """A lens costs no block calls, a swap costs two, and no state of a swap is kept."""
    model, ids = tiny_model("llama"), tokens(2, 10)
    mask = torch.ones_like(ids)
    for signals, calls in (
        (["lens"], DEPTH),
        (["attention", "norms"], DEPTH),
        (["similarity"], DEPTH + 2 * (DEPTH - 1)),
    ):
        measurer = make_measurer(model, signals, DEPTH)
        assert measurer.measure(ids, mask).calls == calls == measurer.schedule.calls
    measurer = make_measurer(model, ["similarity"], DEPTH)
    assert measurer.measure(ids, mask).states_at_peak <= 4
    readouts = []
    measurer = make_measurer(model, ["lens"], DEPTH)
    final = type(measurer.readout).normalize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(measurer.readout), "normalize", lambda *given: (readouts.append(1), final(*given))[1])  # type: ignore[func-returns-value]
        measurer._check_pending = False
        measurer.measure(ids, mask)
    assert len(readouts) == DEPTH


def test_no_matrix_of_tokens_by_tokens_is_made() -> None:
    class Widest(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            for value in output if isinstance(output, tuple) else (output,):
                if isinstance(value, torch.Tensor) and "mask" not in str(func):
                    Widest.most = max(Widest.most, value.numel())
            return output

    model = tiny_model("llama", max_position_embeddings=512)
    ids = tokens(1, 500)
    with Widest():  # type: ignore[no-untyped-call]
        ls.analyses.attention(model, ids)
    assert 0 < Widest.most < 500 * 500


def test_a_head_that_attends_to_the_token_before_scores_one() -> None:
    """Make queries and keys of a head from positions, so that each token attends to the previous one."""
    model = tiny_model("gpt2", n_positions=64)
    width, length = 32, 12
    with torch.no_grad():
        for block in model.transformer.h:
            block.ln_1.weight.fill_(1)
            block.ln_1.bias.zero_()
        first = model.transformer.h[0]
        model.transformer.wte.weight.zero_()
        places = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(3)))[0]
        places = places - places.mean(-1, keepdim=True)
        model.transformer.wpe.weight[:width] = places
        normed = first.ln_1(places)
        # In every head, queries are the position's own direction, keys the direction of the next position.
        project = torch.randn(width, 3 * width)
        wanted = 40 * torch.randn(length, 8, generator=torch.Generator().manual_seed(4))
        solve = torch.linalg.lstsq(normed[:length], torch.nn.functional.normalize(wanted) * 10).solution
        shifted = torch.linalg.lstsq(normed[: length - 1], torch.nn.functional.normalize(wanted)[1:] * 10).solution
        for head in range(4):
            project[:, 8 * head : 8 * head + 8] = solve
            project[:, width + 8 * head : width + 8 * head + 8] = shifted
        first.attn.c_attn.weight.copy_(project)
        first.attn.c_attn.bias.zero_()
    table = ls.analyses.attention(model, tokens(2, length))
    assert table.attention_prev5[0] > 0.98
    assert table.attention_prev5_mean[0] == pytest.approx(11 / 45, abs=0.02)
    assert (table.attention_prev5[1:] < 0.9).all()


def test_several_attention_modules_of_a_block_count_by_their_heads() -> None:
    observer = make_measurer(tiny_model("llama"), ["attention"], DEPTH).observer
    assert observer is not None
    with observer.observing(torch.ones(2, 8, dtype=torch.long)):
        batch = observer._current_batch()
        for heads, weight in ((4, 0.1), (2, 0.4)):
            summed = torch.full((2, 8, 5), heads * weight)
            recorded: Any = SimpleNamespace(heads=heads, weights_BTK=summed, unreadable_kernels=())
            batch.add_attention(0, recorded)
        found = batch.sums[observer.quantities.column(0, "attention", "attention_prev5")]
    mean = (4 * 0.1 + 2 * 0.4) / 6
    assert found.tolist() == pytest.approx([3 * 5 * mean] * 2)  # three of eight tokens have five before them


def test_the_lens_must_end_in_the_models_own_output() -> None:
    model, ids = tiny_model("llama"), tokens(2, 10)
    measurer = make_measurer(model, ["lens"], DEPTH)
    with torch.no_grad():
        check_readout(measurer.runner, measurer.readout, ids[:1], torch.ones_like(ids[:1]))
    model.register_forward_hook(lambda _m, _a, output: setattr(output, "logits", output.logits * 1.01))
    with pytest.raises(ls.MeasurementError, match="after its last block differ from the model's own"):
        measurer.measure(ids, torch.ones_like(ids))


def test_half_precision() -> None:
    model, ids = tiny_model("llama"), tokens(3, 12)
    full = ls.analyses.measure(model, ids, SIGNALS)
    half = ls.analyses.measure(model.to(torch.bfloat16), ids, SIGNALS)
    np.testing.assert_allclose(half["attention"].attention_prev5, full["attention"].attention_prev5, atol=5e-3)
    np.testing.assert_allclose(half["norms"].mlp_norm, full["norms"].mlp_norm, rtol=2e-2)
    np.testing.assert_allclose(half["lens"].lens_entropy_bits, full["lens"].lens_entropy_bits, atol=2e-2)
    np.testing.assert_allclose(half["similarity"].self, full["similarity"].self, atol=3e-2)


def test_errors_cover_sequences_of_different_lengths() -> None:
    """Means weigh tokens, not sequences, and their errors are errors of a ratio."""
    model, ids = tiny_model("gpt2"), tokens(6, 12)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    mask[4, 8:] = 0
    table = ls.analyses.norms(model, ids, attention_mask=mask, batch_size=4)
    each = [ls.analyses.norms(model, ids[n : n + 1, : int(mask[n].sum())]).mlp_norm[2] for n in range(6)]
    counts = mask.sum(-1).numpy()
    mean = np.average(each, weights=counts)
    assert table.mlp_norm[2] == pytest.approx(mean, rel=1e-5)
    error = np.sqrt(6 / 5 * ((counts * (each - mean)) ** 2).sum()) / counts.sum()
    assert table.mlp_norm_sem[2] == pytest.approx(error, rel=1e-3)


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ls.PlanError, match="unknown signals: loss; choose from lens, attention"):
        ls.analyses.measure(tiny_model("llama"), tokens(), ["loss"])
    model = tiny_model("llama")
    with pytest.raises(ls.PlanError, match="no position has a next token"):
        ls.analyses.norms(model, tokens(2, 1))
    with torch.no_grad():
        model.model.embed_tokens.weight[100] = float("nan")
    ids = tokens()
    norms = ls.analyses.norms(model, ids)
    assert norms.mlp_norm.notna().all()
    ids[1, 7] = 100
    with pytest.raises(ls.MeasurementError, match="returns NaN or infinite logits"):
        ls.analyses.lens(model, ids)
    assert ls.analyses.norms(model, ids).mlp_norm.isna().all()


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt_oss", "jamba"])
def test_weights_may_be_kept_on_disk(name: str, tmp_path: Path) -> None:
    plain, away = dispatched(tmp_path, name, {"": "disk"})
    ids, signals = tokens(2, 10), [*SIGNALS, "drop"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        meant, found = (ls.analyses.measure(model, ids, signals) for model in (plain, away))
    for signal in signals:
        assert_same(found[signal], meant[signal])
    assert on_disk(away)


@pytest.mark.parametrize("name", ["llama", "bloom", "deepseek_v3"])
def test_inference_mode_sees_the_same(name: str) -> None:
    model, ids = tiny_model(name), tokens(2, 10)
    meant = ls.analyses.measure(model, ids, SIGNALS)
    with torch.inference_mode():
        found = ls.analyses.measure(model, ids, SIGNALS)
    for signal in SIGNALS:
        assert_same(found[signal], meant[signal], atol=1e-9)


def test_half_precision_with_logits_in_full() -> None:
    """Mamba returns float32 logits of bfloat16 products."""
    model = tiny_model("mamba", tie_word_embeddings=False).to(torch.bfloat16)
    table = ls.analyses.lens(model, tokens(2, 10))
    assert table.lens_kl_nats.iloc[-1] == 0
    assert table.lens_kl_nats.iloc[0] > 0


def test_a_model_of_one_block() -> None:
    model, ids = tiny_model("llama", num_hidden_layers=1), tokens(2, 10)
    table = ls.analyses.lens(model, ids)
    assert table.lens_agreement.tolist() == [1]
    assert table.lens_entropy_bits[0] > 1
    both = ls.analyses.measure(model, ids, ["lens", "norms"])
    assert_same(both["lens"], table)


def test_what_is_left_out_is_said() -> None:
    with pytest.warns(
        UserWarning, match="attention of block 0 was skipped: JambaMambaMixer attends to no tokens by softmax"
    ):
        table = ls.analyses.attention(tiny_model("jamba"), tokens(2, 8))
    assert len(table.attrs["skipped"]) == 4
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_weights, "_SOFTMAX", set())
        observer = make_measurer(model, ["attention"], DEPTH).observer
        assert observer is not None
        assert "attends to no tokens by softmax" in observer.skipped["attention of block 3"]
        model.set_attn_implementation("sdpa")
        patch.setattr(attention_weights, "_KERNELS", {})
        blind = make_measurer(model, ["attention"], DEPTH).observer
        assert blind is not None
        assert (
            "its attention kernel (_scaled_dot_product_flash_attention_for_cpu) does not report its weights"
            in blind.skipped["attention of block 3"]
        )


def test_a_kernel_that_is_chosen_for_this_text_only_is_named() -> None:
    model, ids = tiny_model("llama"), tokens(2, 10)
    measurer = make_measurer(model, ["attention"], DEPTH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_weights, "_KERNELS", {})
        with pytest.raises(
            ls.MeasurementError,
            match="block 0: for this text, attention ran in a kernel .* from which the weights",
        ):
            measurer.measure(ids, torch.ones_like(ids))
    assert not any("_Capturing" in type(module).__name__ for module in model.modules())


def test_single_precision_of_products_is_kept() -> None:
    """On CPUs with bfloat16 products, "medium" rounds the model's products; attention weights must stay exact."""
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn((2, 3, 40, 16), generator=random) for _ in range(2))
    causal = torch.ones(40, 40).triu(1).bool()
    scores = (query.double() @ key.double().transpose(-1, -2) / 4).masked_fill(causal, -np.inf)
    lse = scores.logsumexp(-1)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = attention_weights.banded_attention(query, key, lse.float(), None, 0.25, 5)
    finally:
        torch.set_float32_matmul_precision(before)
    for back in range(1, 6):
        meant = (scores - lse[..., None]).exp().diagonal(-back, -2, -1)
        np.testing.assert_allclose(found[..., back:, back - 1], meant, atol=1e-6)
