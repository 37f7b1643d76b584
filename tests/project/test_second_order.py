"""Test the benchmark of the second-order estimate: without a right estimate, its poor choices would mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import layersurgery as ls
from benchmarks import second_order, timing
from tests.support.tiny_checkpoint import checkpoint
from tests.support.zoo import tiny_model

QUICK = ("llama", "gpt_neox", "gemma2", "bloom")
STEPS = {"opt": 1e-5}  # its ReLU has a kink that a large step would cross
SLOW = ("gpt2", "opt", "falcon", "falcon-alibi", "cohere", "gemma3_text", "olmo2", "phi", "mpt", "granite", "mamba")


def tokens() -> torch.Tensor:
    return torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def double_model(name: str) -> nn.Module:
    model: nn.Module = tiny_model(name).double().eval()
    return model.requires_grad_(False)


@contextmanager
def gated(model: nn.Module, gates: dict[int, float]) -> Iterator[None]:
    """Multiply what blocks add to the stream by 1 - gate, with hooks."""
    blocks: Any = model.get_submodule(ls.anatomy(model).blocks)
    kept: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            kept[number] = (args[0] if args else kwargs["hidden_states"]).clone()  # a block may overwrite its input

        return hook

    def close(number: int, gate: float) -> Any:
        def hook(_: nn.Module, _args: Any, output: Any) -> Any:
            after = output[0] if isinstance(output, tuple) else output
            changed = after - gate * (after - kept[number])
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    with ExitStack() as stack:
        for number, gate in gates.items():
            stack.callback(blocks[number].register_forward_pre_hook(keep(number), with_kwargs=True).remove)
            stack.callback(blocks[number].register_forward_hook(close(number, gate)).remove)
        yield


def log_p(model: nn.Module, ids: torch.Tensor, gates: dict[int, float] | None = None) -> torch.Tensor:
    """Return log-probabilities at the positions with a next token, (sequences, length - 1, vocabulary)."""
    with torch.no_grad(), gated(model, gates or {}):
        return model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)  # type: ignore[no-any-return]


def slopes(model: nn.Module, ids: torch.Tensor, step: float = 0.02) -> torch.Tensor:
    """Return d log p / d gate by central differences, (blocks, sequences, length - 1, vocabulary).

    Of fourth order, with a large step, since many norms round to float32 inside.
    """

    def difference(block: int, gate: float) -> torch.Tensor:
        return log_p(model, ids, {block: gate}) - log_p(model, ids, {block: -gate})

    depth = ls.anatomy(model).depth
    return torch.stack(
        [(8 * difference(block, step) - difference(block, 2 * step)) / (12 * step) for block in range(depth)]
    )


def exact_interactions(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return half of the Fisher matrix of the gates for each sequence, summed over all tokens of the vocabulary."""
    slope, p = slopes(model, ids), log_p(model, ids).exp()
    return torch.einsum("stv,bstv,cstv->sbc", p, slope, slope) / 2


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_scores_are_derivatives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = double_model(name), tokens()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(second_order, "_HEAD_TOKENS", 3)  # the last chunk is shorter
    monkeypatch.setattr(torch, "multinomial", lambda p, count, **_: p.topk(count).indices)
    found = second_order.gate_scores(model, ids, 3)
    drawn = log_p(model, ids).topk(3).indices
    expected = (
        slopes(model, ids, STEPS.get(name, 0.02))[..., None, :]
        .expand(-1, -1, -1, 3, -1)
        .gather(-1, drawn[None, ..., None].expand(found.shape[2], -1, -1, -1, -1))
    )
    expected_scores = expected[..., 0].sum(2).permute(2, 1, 0).numpy()
    np.testing.assert_allclose(found, expected_scores, rtol=1e-4, atol=1e-4 * abs(expected_scores).max())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_scores_of_drawn_tokens_give_the_fisher_matrix() -> None:
    model, ids, draws = double_model("llama"), tokens(), 300
    exact = exact_interactions(model, ids).numpy()
    scores = second_order.gate_scores(model, ids, draws)
    samples = scores[..., :, None] * scores[..., None, :] / 2
    error = samples.std(0, ddof=1) / draws**0.5
    assert (abs(samples.mean(0) - exact) <= 5 * error).all()
    sizes = np.sqrt(exact.diagonal(axis1=1, axis2=2))
    assert (error < 0.2 * sizes[:, :, None] * sizes[:, None, :]).all()
    found = second_order.interactions(scores, ids[:, 1:].numel())
    np.testing.assert_allclose(found, samples.mean(0).sum(0) / ids[:, 1:].numel(), rtol=1e-9)


@pytest.mark.parametrize("name", QUICK[:2])
def test_small_gates_cost_what_the_matrix_says(name: str) -> None:
    model, ids = double_model(name), tokens()
    pairs, base = exact_interactions(model, ids).sum(0) / ids[:, 1:].numel(), log_p(model, ids)
    for blocks in ([1], [0, 4], [2, 3, 5]):
        edited = [log_p(model, ids, dict.fromkeys(blocks, gate)) for gate in (0.03, -0.03)]
        # The mean of both signs is free of the third order.
        kl = sum(float((base.exp() * (base - q)).sum(-1).mean()) for q in edited) / 2
        assert kl == pytest.approx(0.03**2 * float(pairs[blocks][:, blocks].sum()), rel=0.02)


def test_greedy_order_adds_the_least_each_time() -> None:
    factor = np.random.default_rng(0).normal(size=(6, 6))
    pairs = factor @ factor.T
    chosen = second_order.greedy_order(pairs, 5)
    for count in range(1, 6):
        kept = chosen[: count - 1]
        totals = {b: pairs[np.ix_([*kept, b], [*kept, b])].sum() for b in range(6) if b not in kept}
        assert chosen[count - 1] == min(totals, key=totals.__getitem__)


def test_the_table_is_measured_on_other_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    path = checkpoint(tmp_path / "model")
    rows = second_order.measure(str(path), 64, 16, 2, (1, 2), as_json=True, name="second-order-quick")
    assert len(rows) == 10
    model, tokenizer = ls.load(path, dtype="float32")
    choosing, other = second_order._texts(tokenizer, 64, 16)
    assert choosing.shape == other.shape == (4, 16)
    assert not torch.equal(choosing, other)
    lowest = int(ls.rank(model, choosing).kl_nats.argmin())
    one = next(row for row in rows if row["criterion"] == "measured KL" and row["removed"] == 1)
    assert one["layers"] == str(lowest)
    assert one["kl_nats"] == pytest.approx(ls.compare(model, f"drop {lowest}", other).kl_nats, rel=1e-4)
