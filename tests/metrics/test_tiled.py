"""The streaming metrics, judged by the dense definition in float64, on awkward shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from layersurgery import registry
from layersurgery.metrics import dispatch, reference, tiled
from layersurgery.metrics.reference import METRICS


@dataclass
class Plain:
    """A readout without a model: x W + b, soft-capped or not; in tiles, or all at once."""

    matrix: torch.Tensor
    bias: torch.Tensor | None = None
    cap: float | None = None
    tokens_at_once: int | None = None
    description: str = "for tests"

    @property
    def vocabulary(self) -> int:
        return len(self.matrix)

    @property
    def affine(self) -> bool:
        return self.cap is None and self.tokens_at_once is None

    def normalize(self, stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return stream[chosen]

    def logits_tile(self, x_TD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        logits = x_TD @ self.matrix[start:stop].T
        if self.bias is not None:
            logits = logits + self.bias[start:stop]
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    def mean_weight_row(self, p_TC: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return p_TC @ self.matrix[start:stop]


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def both(readout: Plain, p: torch.Tensor, q: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    base = dispatch.baseline(readout, p, target)
    found = dispatch.measure(readout, q, base)
    p_logits, q_logits = (readout.logits_tile(x, 0, readout.vocabulary) for x in (p, q))
    return found, reference.measure(p_logits, q_logits, target)


@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("vocabulary", [2, 31, 257, 1009])
@pytest.mark.parametrize("kind", ["plain", "bias", "cap", "all at once"])
def test_equals_the_definition(tokens: int, vocabulary: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 100)
    monkeypatch.setattr(tiled, "ROWS", 13)
    readout = Plain(
        drawn(vocabulary, 19),
        bias=drawn(vocabulary, seed=1, scale=3) if kind == "bias" else None,
        cap=4.0 if kind == "cap" else None,
        tokens_at_once=5 if kind == "all at once" else None,
    )
    p, q = drawn(tokens, 19, seed=2), drawn(tokens, 19, seed=3)
    target = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(4))
    found, meant = both(readout, p, q, target)
    assert found.dtype == torch.float64
    assert found.shape == (len(METRICS), tokens)
    torch.testing.assert_close(found, meant, rtol=1e-5, atol=2e-5)
    for name in ("agreement", "accuracy"):
        assert torch.equal(found[METRICS.index(name)], meant[METRICS.index(name)])
    with_tails = dispatch.measure(readout, q, dispatch.baseline(readout, p, target, tails=True))
    assert torch.equal(with_tails[: len(METRICS)], found)
    p_logits, q_logits = (readout.logits_tile(x, 0, vocabulary) for x in (p, q))
    tails = reference.measure_tails(p_logits, q_logits, target)
    torch.testing.assert_close(with_tails[len(METRICS) :], tails, rtol=1e-5, atol=1e-6)
    assert torch.equal(with_tails[len(METRICS) + 1], tails[1])


def test_the_definition_and_the_streaming_metrics_have_the_registry_s_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(column.name for column in registry.METRICS) == METRICS
    stacked: list[list[str]] = []
    stack = reference.stack_metrics

    def noted(values: dict[str, torch.Tensor]) -> torch.Tensor:
        stacked.append(list(values))
        return stack(values)

    monkeypatch.setattr(reference, "stack_metrics", noted)
    monkeypatch.setattr(dispatch, "stack_metrics", noted)
    readout = Plain(drawn(31, 4))
    both(readout, drawn(3, 4), drawn(3, 4, seed=1), torch.arange(3))
    assert [sorted(names) for names in stacked] == [sorted(METRICS)] * 2
    with pytest.raises(KeyError, match=r"differ: \['accuracy', 'other'\]"):
        stack({name: torch.zeros(1) for name in (*METRICS[:-1], "other")})


def test_small_divergences_in_single_precision() -> None:
    """Dense float32 is off by about 6e-7 at most here; our method is off by a few millionths, but reads p only once."""
    readout = Plain(drawn(5003, 64, scale=0.5))
    p = drawn(256, 64, seed=2)
    q = p + drawn(256, 64, seed=3, scale=0.03)
    found = dispatch.measure(readout, q, dispatch.baseline(readout, p, torch.zeros(256, dtype=torch.long)))[0]
    matrix = readout.matrix.double()
    exact = reference.measure(p.double() @ matrix.T, q.double() @ matrix.T, torch.zeros(256, dtype=torch.long))[0]
    assert 0.001 < exact.mean() < 0.05
    assert (found - exact).abs().max() < 1e-5
    assert abs(found.mean() - exact.mean()) < 1e-6


def test_the_same_model_has_no_divergence_at_all() -> None:
    for readout in (Plain(drawn(301, 8)), Plain(drawn(301, 8), cap=3.0)):
        x = drawn(50, 8, seed=1)
        base = dispatch.baseline(readout, x, torch.arange(50))
        found = dispatch.measure(readout, x.clone(), base)
        assert found[METRICS.index("kl_nats")].eq(0).all()
        assert found[METRICS.index("agreement")].eq(1).all()
        assert torch.equal(found, dispatch.measure_unedited(base))


def test_laws_of_divergence_and_entropy() -> None:
    readout = Plain(drawn(211, 8, scale=2))
    base = dispatch.baseline(readout, drawn(100, 8, seed=1), torch.zeros(100, dtype=torch.long))
    for seed in range(5):
        found = dict(
            zip(METRICS, dispatch.measure(readout, drawn(100, 8, seed=seed, scale=10.0**-seed), base), strict=True)
        )
        assert found["kl_nats"].ge(0).all()
        assert found["entropy_bits"].ge(-1e-6).all()
        assert found["entropy_bits"].le(math.log2(211) + 1e-5).all()


def test_the_first_of_equal_logits_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 3)
    matrix = torch.tensor([[0.0], [2.0], [1.0], [2.0], [2.0]])
    readout = Plain(matrix)
    base = dispatch.baseline(readout, torch.ones(1, 1), torch.tensor([1]))
    assert base.stats.top.tolist() == [1]
    assert dispatch.measure_unedited(base)[METRICS.index("accuracy")].item() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_nan_in_every_metric(bad: float) -> None:
    for readout in (Plain(drawn(50, 4)), Plain(drawn(50, 4), tokens_at_once=8), Plain(drawn(50, 4), cap=2.0)):
        base = dispatch.baseline(readout, drawn(3, 4, seed=1), torch.tensor([0, 1, 2]))
        q = drawn(3, 4, seed=2)
        q[1] = bad
        if readout.cap and math.isinf(bad):
            continue  # the cap makes a number of it
        found = dispatch.measure(readout, q, base)
        assert found[:, 1].isnan().all()
        assert found[:, [0, 2]].isfinite().all()


def test_where_the_unedited_model_gives_no_number_every_metric_is_nan() -> None:
    p = drawn(3, 4, seed=1)
    p[1] = math.nan
    readout = Plain(drawn(50, 4))
    found = dispatch.measure(readout, drawn(3, 4, seed=2), dispatch.baseline(readout, p, torch.tensor([0, 1, 2])))
    assert found[:, 1].isnan().all()
    assert found[:, [0, 2]].isfinite().all()


def test_large_logits_do_not_overflow() -> None:
    readout = Plain(drawn(100, 4, scale=1e4))
    p, q = drawn(9, 4, seed=1), drawn(9, 4, seed=2)
    found, meant = both(readout, p, q, torch.arange(9))
    torch.testing.assert_close(found, meant, rtol=1e-4, atol=1e-2)
