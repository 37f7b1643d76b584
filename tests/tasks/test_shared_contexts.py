"""A context that several requests share is run once, and the answers are those of the requests by themselves."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import layersurgery as ls
from layersurgery.errors import LayerSurgeryWarning
from layersurgery.metrics.aggregation import BatchResult
from layersurgery.metrics.reference import METRICS
from layersurgery.plans.variants import variants
from layersurgery.sweeps import context_sharing
from layersurgery.sweeps.batches import Batches
from layersurgery.sweeps.context_sharing import SHARED
from layersurgery.sweeps.measurer import Measurer
from layersurgery.sweeps.read_positions import ScoredPositions
from layersurgery.sweeps.shared_contexts import fill_sequences, find_trees, pack_requests
from layersurgery.tasks.request_text import Request, RequestText
from tests.support.dense import blocks_of
from tests.support.unsupported import UNSUPPORTED
from tests.support.zoo import VOCAB, ZOO, slow, tiny_config, tiny_model

PLANS = ["swap 1 2", "drop 0", "repeat 2:4", "skip-attention 2", "skip-mlp 2"]
LOSS, ACCURACY = METRICS.index("loss_nats"), METRICS.index("accuracy")
WINDOWS = ["sliding_window", "attention_chunk_size", "window_size", "attention_window_size"]
QUICK = ["llama", "gpt2", "bloom"]
# What these blocks keep of earlier tokens reads no mask, or their positions are those of the sequence.
SEPARATE = {
    **dict.fromkeys(["mamba", "mamba2", "falcon_mamba", "rwkv", "bloom", "mpt"], "takes no position ids"),
    "falcon-alibi": "cannot run them: ValueError",
    **dict.fromkeys(
        [
            "jamba", "qwen3_next", "lfm2", "recurrent_gemma", "falcon_h1", "bamba", "granitemoehybrid", "nemotron_h",
            "minimax", "qwen3_5_text", "lfm2_moe", "olmo_hybrid",
        ],
        "predictions of .* differ by",
    ),
}  # fmt: skip


def make_requests(contexts: list[int], continuations: list[int], seed: int = 0) -> list[Request]:
    """Make requests of random tokens with these lengths: each context with each continuation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())

    return [Request(context, draw(length)) for context in map(draw, contexts) for length in continuations]


REQUESTS = [*make_requests([9, 7, 5], [3, 1, 4, 2]), *make_requests([10], [2], seed=1)]


def wide_model(name: str, **overrides: Any) -> Any:
    """Return a tiny model whose attention sees whole sequences."""
    config = tiny_config(name)
    windows = {field: 64 for field in WINDOWS if isinstance(getattr(config, field, None), int)}
    return tiny_model(name, **windows, **overrides)


def measurer_of(model: Any, plans: list[str], text: RequestText, **options: Any) -> Measurer:
    return Measurer(model, variants(plans, len(blocks_of(model))), read=ScoredPositions(text.scored), **options)


def answers(text: RequestText, result: BatchResult) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return log-likelihoods and greedy flags, (requests, rows), in the order of the requests."""
    rows = list(text.sequence_of)
    counts = np.asarray(result.counts)[rows]
    return -result.values[rows][:, :, LOSS], result.values[rows][:, :, ACCURACY] == counts[:, None]


@torch.no_grad()
def one_by_one(model: Any, plans: list[str], requests: list[Request]) -> tuple[Any, Any]:
    """Return what transformers says to each request by itself, on the unedited and the edited models."""
    likely, greedy = [], []
    for request in requests:
        ids = torch.tensor([[*request.context, *request.continuation]])
        for plan in ["", *plans]:
            with ls.operate(model, plan) if plan else nullcontext():
                logits = model(ids[:, :-1], use_cache=False).logits[0, len(request.context) - 1 :].double()
            target = ids[0, len(request.context) :]
            likely.append(float(logits.log_softmax(-1)[range(len(target)), target].sum()))
            greedy.append(bool((logits.argmax(-1) == target).all()))
    shape = len(requests), 1 + len(plans)
    return np.reshape(likely, shape), np.reshape(greedy, shape)


# Their linear attention runs token by token without its kernels.
_MINUTES = ("qwen3_next", "qwen3_5_text")


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("llama", "gpt2", "bloom", "falcon_h1")
        else pytest.param(name, marks=pytest.mark.weekly)
        if name in _MINUTES
        else slow(name)
        for name in ZOO
    ],
)
def test_the_answers_are_those_of_requests_by_themselves(name: str) -> None:
    model = wide_model(name)
    plans = [plan for plan in PLANS if (name, plan) not in UNSUPPORTED]
    text = RequestText.of(REQUESTS)
    measurer = measurer_of(model, plans, text)
    found = answers(text, measurer.measure(text.ids, text.mask))
    expected = one_by_one(model, plans, REQUESTS)
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-5)
    assert (found[1] == expected[1]).all()
    outcome, apart = measurer.contexts.outcome, measurer.contexts.tokens_apart
    assert outcome is not None
    if name in SEPARATE:
        assert re.search(SEPARATE[name], outcome)
        assert measurer.contexts.tokens == apart
    else:
        assert outcome == SHARED
        assert measurer.contexts.tokens < apart / 2


def count_tokens(model: Any, measurer: Measurer, text: RequestText) -> int:
    """Return how many tokens the fourth block is called on."""
    seen = []
    handle = blocks_of(model)[3].register_forward_hook(lambda _, _args, output: seen.append(output.shape[:2].numel()))
    measurer.measure(text.ids, text.mask)
    handle.remove()
    return sum(seen)


@pytest.mark.parametrize("order", ["depth-first", "layer-major"])
def test_blocks_run_on_fewer_tokens(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    text = RequestText.of(make_requests([30, 29, 28, 20], [4, 3, 3, 2]))
    plans = ["swap 1 3", "drop 2", "drop 4"]
    shared = measurer_of(model, plans, text, order=order)
    tokens = count_tokens(model, shared, text)
    monkeypatch.setattr(context_sharing.ContextSharing, "pack", lambda *_: None)
    apart = count_tokens(model, measurer_of(model, plans, text, order=order), text)
    assert tokens < apart / 2  # with the check before the first batch


@pytest.mark.parametrize(
    ("part", "dtype"), [("mask", torch.float32), ("mask", torch.bfloat16), ("positions", torch.float32)]
)
def test_one_block_that_reads_no_mask_or_no_positions_is_noticed(part: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    text = RequestText.of(REQUESTS)

    def measure() -> str | None:
        measurer = measurer_of(model, ["drop 2"], text)
        measurer.measure(text.ids, text.mask)
        return measurer.contexts.outcome

    assert measure() == SHARED

    def ignore(_module: Any, args: Any, kwargs: Any) -> Any:
        if part == "mask":
            return args, kwargs | {"attention_mask": None}
        stream = kwargs["hidden_states"]
        rotary = model.model.rotary_emb(stream, torch.arange(stream.shape[1])[None])
        return args, kwargs | {"position_embeddings": rotary}

    attention: Any = blocks_of(model)[3].self_attn
    attention.register_forward_pre_hook(ignore, with_kwargs=True)
    assert "the predictions of LlamaForCausalLM differ by" in str(measure())


def test_hybrids_are_refused_in_half_precision() -> None:
    model, text = tiny_model("falcon_h1").bfloat16(), RequestText.of(REQUESTS)
    measurer = measurer_of(model, ["drop 2"], text)
    measurer.measure(text.ids, text.mask)
    assert "differ by" in str(measurer.contexts.outcome)


def test_memory_that_runs_out_divides_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny_model("llama"), RequestText.of(REQUESTS)
    whole = measurer_of(model, PLANS, text).measure(text.ids, text.mask)
    measurer = measurer_of(model, PLANS, text)
    record = measurer.runner.record

    def with_little_memory(inputs: Any, *args: Any) -> Any:
        if inputs["input_ids"].numel() > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(inputs, *args)

    monkeypatch.setattr(measurer.runner, "record", with_little_memory)
    with pytest.warns(LayerSurgeryWarning, match="memory ran out with 13 sequences at once; continuing with 6"):
        parts = measurer.measure(text.ids, text.mask)
    assert parts.max_sequences in (3, 6)
    assert measurer.contexts.outcome == SHARED
    np.testing.assert_allclose(parts.values, whole.values, atol=1e-5)


def test_trees_stay_inside_the_window_of_the_attention() -> None:
    text = RequestText.of(REQUESTS)
    for window, outcome in {
        5: "the requests are longer than the window of the model's attention, 5 tokens",
        11: "the requests are longer than the window of the model's attention, 11 tokens",
        13: SHARED,
    }.items():
        model = tiny_model("mistral", sliding_window=window)
        measurer = measurer_of(model, PLANS[:1], text)
        found = answers(text, measurer.measure(text.ids, text.mask))
        expected = one_by_one(model, PLANS[:1], REQUESTS)
        np.testing.assert_allclose(found[0], expected[0], rtol=2e-5)
        assert measurer.contexts.outcome == outcome


def test_requests_longer_than_the_window_do_not_hide_that_others_share() -> None:
    text, model = RequestText.of(make_requests([15, 6], [2, 2, 2])), tiny_model("mistral", sliding_window=13)
    measurer = measurer_of(model, PLANS[:1], text)
    for span, outcome in ((slice(0, 3), "longer than the window"), (slice(3, 6), SHARED), (slice(0, 3), SHARED)):
        measurer.measure_batch(text.ids, text.mask, span)
        assert outcome in str(measurer.contexts.outcome)


@pytest.mark.parametrize(("positions", "outcome"), [(16, None), (24, SHARED), (64, SHARED)])
def test_no_sequence_is_longer_than_the_positions(positions: int, outcome: str | None) -> None:
    requests = make_requests([13], [4, 3, 3])  # 16 tokens are run of the longest one
    text, model = RequestText.of(requests), tiny_model("gpt2", max_position_embeddings=positions)
    measurer = measurer_of(model, PLANS[:2], text)
    found = answers(text, measurer.measure(text.ids, text.mask))
    np.testing.assert_allclose(found[0], one_by_one(model, PLANS[:2], requests)[0], rtol=2e-5)
    assert measurer.contexts.outcome == outcome


def test_longer_sequences_are_checked_again_and_compiled_blocks_get_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    text = RequestText.of(make_requests([20, 8], [2, 2]))
    measurer = measurer_of(model, ["drop 2"], text)
    asked: list[int] = []
    check = measurer.contexts._find_reason

    def count(*args: Any) -> str | None:
        asked.append(1)
        return check(*args)

    monkeypatch.setattr(measurer.contexts, "_find_reason", count)
    for span in (slice(2, 4), slice(0, 2), slice(2, 4)):
        measurer.measure(text.ids[span], text.mask[span], first=span.start)
    assert len(asked) == 2
    compiled = measurer_of(model, ["drop 2"], text, compiled=True)
    reads = text.scored[:, 1:]
    assert compiled.contexts.pack(text.ids, text.mask, reads) is None
    assert "compiled" in str(compiled.contexts.outcome)
    assert compiled.batches(text.ids, text.mask, 3, fixed=False) == Batches.of(4, 3)
    assert measurer.batches(text.ids, text.mask, 3, fixed=False).ends == (2, 4)


@given(st.data())
@settings(deadline=None)
def test_every_token_that_is_read_sees_its_request(data: st.DataObject) -> None:
    tokens = st.integers(0, 2)  # few, so that contexts are equal by chance
    drawn = st.tuples(*(st.lists(tokens, min_size=1, max_size=4).map(tuple) for _ in range(2)))
    text = RequestText.of([Request(*pair) for pair in data.draw(st.lists(drawn, min_size=1, max_size=12))])
    lengths, reads = text.mask.sum(-1) - 1, text.scored[:, 1:] & text.mask[:, :-1].bool()
    longest = data.draw(st.sampled_from([5, 8, float("inf")]))
    trees = find_trees(text.ids, lengths, reads, longest)
    assert all(tree.length <= longest or len(tree.requests) == 1 for tree in trees)
    packed = pack_requests(text.ids, lengths, reads, fill_sequences(trees))
    assert packed.ids.numel() <= len(trees) * max(tree.length for tree in trees)
    flat = iter(packed.reads.positions.tolist())
    for number, read in enumerate(reads):
        for position in read.nonzero()[:, 0].tolist():
            row, column = divmod(next(flat), packed.ids.shape[1])
            seen = packed.visible[row, column]
            assert packed.positions[row][seen].tolist() == [*range(position + 1)]
            assert packed.ids[row][seen].tolist() == text.ids[number, : position + 1].tolist()
    assert next(flat, None) is None
    assert packed.reads.targets.tolist() == text.ids[text.scored].tolist()
    assert packed.reads.counts == text.scored.sum(-1).tolist()


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=8), st.integers(9, 40))
def test_batches_have_so_many_tokens_and_cut_no_context_without_need(groups: list[list[int]], tokens: int) -> None:
    lengths = [length for group in groups for length in group]
    batches = Batches.of_groups(lengths, [*map(len, groups)], tokens)
    spans = [batches.span(number) for number in range(len(batches))]
    assert [number for span in spans for number in range(span.start, span.stop)] == [*range(len(lengths))]
    assert all(0 < batches.size(number) * max(lengths[span]) <= tokens for number, span in enumerate(spans))
    start = 0
    for group in groups:
        cut = [end for end in batches.ends if start < end < start + len(group)]
        assert not cut or len(group) * max(group) > tokens or start in (0, *batches.ends)
        assert not cut or len(group) * max(group) > tokens
        start += len(group)
