"""What a sweep would take, from a config alone, beside what it does take."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig

import layersurgery as ls
from benchmarks.timing import run_timed
from layersurgery.analyses.signal_tables import make_measurer
from layersurgery.plans.variants import variants
from layersurgery.sweeps import estimate as estimates
from layersurgery.sweeps.estimate import estimate
from layersurgery.sweeps.measurer import Measurer
from layersurgery.sweeps.read_positions import ReadPositions
from tests.cli.test_cli import COMMAND, result_of, run
from tests.support.zoo import DEPTH, tiny_config, tiny_model, tokens


@pytest.mark.parametrize("families", ["drop", "swap-pairs,skip-attention"])
def test_it_counts_what_propagation_keeps(families: str) -> None:
    chosen = variants(families, DEPTH)
    found = estimate(tiny_config("llama"), chosen, tokens=60, context=12, batch_size=2, propagation=True)
    measurer = Measurer(tiny_model("llama"), chosen, propagation=True)
    assert found.memory == measurer.memory_use(2, 12)
    assert found.order == measurer.schedule.name
    assert measurer.propagation is not None
    assert found.sums == 5 * measurer.propagation.size * 8
    plain = estimate(tiny_config("llama"), chosen, tokens=60, context=12, batch_size=2, order=found.order)
    more = found.memory.streams - plain.memory.streams + found.sums
    assert found.peak["cpu"] - found.program == plain.peak["cpu"] - plain.program + more


@pytest.mark.parametrize("order", ["depth-first", "layer-major"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_config_says_what_the_loaded_model_says(name: str, order: str) -> None:
    chosen = variants("swap,drop,skip-mlp", DEPTH)
    found = estimate(tiny_config(name), chosen, tokens=60, context=12, batch_size=2, order=order)
    model = tiny_model(name)
    measurer = Measurer(model, chosen, order=order)
    assert found.memory == measurer.memory_use(2, 12)
    assert found.weights == {"cpu": found.memory.weights}
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    measured = measurer.measure(tokens(2), torch.ones_like(tokens(2)))
    assert (found.block_calls, found.order) == (measured.calls, order)
    assert found.memory.streams == measured.states_at_peak * 2 * 12 * measurer.runner.width * 4
    assert (found.batches, found.sequences, found.readouts) == (3, 2, len(measurer.routes) + 1)
    assert found.bytes_loaded_per_batch == 0


def test_of_an_offloaded_model(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    away = ls.load(tmp_path / "tiny", device_map={"": "disk"}, offload_folder=tmp_path / "offload").model
    for families in ("swap,drop", "swap-pairs"):
        chosen = variants(families, DEPTH)
        found = estimate(tiny_config("llama"), chosen, tokens=24, context=12, device_map={"": "disk"})
        measured = Measurer(away, chosen).measure(tokens(2), torch.ones_like(tokens(2)))
        assert found.bytes_loaded_per_batch == measured.bytes_read
        assert found.order == "layer-major"
        assert (
            found.peak["cpu"]
            == found.weights["cpu"] + found.in_flight_bytes + found.memory.working + found.text + found.program
        )


def neox(width: int, depth: int, vocabulary: int) -> Any:
    return GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=16,
        intermediate_size=4 * width,
    )


@pytest.mark.parametrize(
    ("shape", "parameters", "petaflops"), [((2048, 24, 50304), 1.41e9, 73), ((4096, 32, 50432), 6.86e9, 457)]
)
def test_the_papers_protocol(shape: tuple[int, int, int], parameters: float, petaflops: float) -> None:
    """Swap and drop of every layer on a million tokens: Pythia-1.4b and 6.9b."""
    found = estimate(
        neox(*shape), variants("swap,drop", shape[1]), tokens=1_000_000, context=2048, dtype="float16", batch_size=8
    )
    assert found.parameters == pytest.approx(parameters, rel=0.01)
    assert found.weights["cpu"] == pytest.approx(2 * parameters, rel=0.01)
    assert found.flops / 1e15 == pytest.approx(petaflops, rel=0.02)


def test_memory_shared_out_by_accelerate() -> None:
    found = estimate(
        neox(4096, 32, 50432), variants("swap,drop", 32), tokens=2048, context=2048, dtype="float16", device_map="auto",
        max_memory={"cpu": 6_000_000_000},
    )  # fmt: skip
    assert found.weights["cpu"] < 6e9
    assert sum(found.weights.values()) == pytest.approx(13.7e9, rel=0.01)
    assert found.bytes_loaded_per_batch == found.weights["disk"]
    assert found.resident_blocks == 2


def test_it_loads_and_writes_nothing(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path / "bare")  # a config, and nothing else
    value = result_of("sweep", tmp_path / "bare", "--estimate", "-n", 100, "--context", 20, "-o", tmp_path / "out")
    assert value["block_calls"] == 36
    assert value["peak"]["cpu"] > value["program"]
    shown = run("sweep", tmp_path / "bare", "--estimate", "-n", 100, "--context", 20).stdout
    for words in ("total", "11 edited models; arithmetic:", "36 block calls (66 without sharing) and 12 readouts each"):
        assert words in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare"]


def test_the_least_time_of_a_run_counts_only_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "_WORTH_SAYING", 0)
    monkeypatch.setattr(estimates, "matmul_rate", lambda *_: 1.0)

    def least(measurer: Measurer) -> float:
        return estimates.shortest_time(measurer, 1600, 16) or 0.0

    def measurer(families: str, **options: Any) -> Measurer:
        return Measurer(tiny_model("llama"), variants(families, DEPTH), **options)

    drops, skips = measurer("drop"), measurer("skip-mlp")
    readout = 2.0 * drops.runner.width * tiny_config("llama").vocab_size
    block = (least(drops) / 1600 - 7 * readout) / drops.schedule.calls
    # A call whose MLP is skipped is not counted.
    assert least(skips) / 1600 == pytest.approx((skips.schedule.calls - DEPTH) * block + 7 * readout)
    # Three of the fifteen positions are read.
    few = least(measurer("drop", read=ReadPositions(3))) / 1600
    assert few == pytest.approx(drops.schedule.calls * block + 7 * readout * 3 / 15)
    # No logits are read.
    assert least(make_measurer(tiny_model("llama"), ["norms"], DEPTH)) / 1600 == pytest.approx(DEPTH * block)
    for each in (drops, skips, measurer("drop", read=ReadPositions(3))):
        cost = estimate(tiny_config("llama"), each.variants[1:], tokens=1600, context=16, read=each.read)  # type: ignore[arg-type]
        assert least(each) == pytest.approx(cost.flops)
    assert estimates.shortest_time(Measurer(tiny_model("llama").bfloat16(), variants("drop", 6)), 1600, 16) is None


def test_where_edits_stop_early_it_gives_no_lower_bound_of_the_time(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path / "bare")
    words = [tmp_path / "bare", "--estimate", "-n", 100, "--context", 20]
    assert result_of("sweep", *words)["seconds"] > 0
    assert result_of("sweep", *words, "--until", "kl=2%")["seconds"] is None
    shown = " ".join(run("sweep", *words, "--until", "kl=2%").stdout.split())
    assert "; at most, since an edit stops at kl_nats to 2 %" in shown
    assert "at least" not in shown


@pytest.mark.weekly
def test_the_real_model_takes_what_was_said(tmp_path: Path) -> None:
    words = [
        "sweep",
        "smollm2-135m",
        "-n",
        "1024",
        "--context",
        "512",
        "--edits",
        "drop",
        "--layers",
        "27:30",
        "-b",
        "2",
        "--device",
        "cpu",
    ]
    command = [*COMMAND, *words, "-o", str(tmp_path / "out")]
    said = subprocess.run([*command, "--estimate", "--json"], capture_output=True, text=True, check=True)
    ran = run_timed(command)
    assert ran.exit_code == 0, ran.output
    assert json.loads(said.stdout)["peak"]["cpu"] == pytest.approx(ran.bytes_peak, rel=0.2)
