"""Models with offloaded weights: same digits, each block loaded once a batch, weights offloaded again afterwards."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import OffloadedWeightsLoader

import layersurgery as ls
from layersurgery.plans.variants import variants
from layersurgery.runtime.block_runner import BlockRunner
from layersurgery.runtime.offload import OffloadedWeights, device_of, offload_hooks, offloaded
from layersurgery.runtime.unembedding import Unembedding
from layersurgery.sweeps.measurer import Measurer
from tests.cli.test_cli import result_of, run
from tests.support.reference import logits_of
from tests.support.zoo import DEPTH, tiny_model, tokens

EDITS = "swap,drop,skip-attention,skip-mlp"


def dispatched(path: Path, name: str, device_map: Any, **options: Any) -> tuple[Any, Any]:
    """A model of the zoo, in memory and by a device map, from the same checkpoint."""
    tiny_model(name).save_pretrained(path / "plain")
    plain = ls.load(path / "plain").model
    return plain, ls.load(path / "plain", device_map=device_map, offload_folder=path / "offload", **options).model


def on_disk(model: Any) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


class Reads:
    """Bytes that accelerate has read from its files, by the weight's name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_name: dict[str, int] = {}
        self.lock = threading.Lock()
        original = OffloadedWeightsLoader.__getitem__

        def counted(loader: OffloadedWeightsLoader, key: str) -> torch.Tensor:
            value: torch.Tensor = original(loader, key)
            with self.lock:
                self.by_name[key] = self.by_name.get(key, 0) + value.nbytes
            return value

        monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)

    @property
    def total(self) -> int:
        return sum(self.by_name.values())


@pytest.mark.parametrize("order", ["layer-major", "depth-first"])
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_neox", "falcon", "bloom", "gemma2", "mixtral", "phi", "opt", "gpt_bigcode", "ctrl"]
)
def test_on_disk_the_digits_are_those_of_the_model_in_memory(tmp_path: Path, name: str, order: str) -> None:
    plain, away = dispatched(tmp_path, name, {"": "disk"})
    assert on_disk(away)
    logits = logits_of(away, tokens())
    meant = ls.sweep(plain, EDITS, tokens(3))
    found = ls.sweep(away, EDITS, tokens(3), schedule=order)
    pd.testing.assert_frame_equal(found, meant.assign(model=found.model), check_exact=True)
    assert on_disk(away)
    assert all(
        hook.offload for module in away.modules() for hook in offload_hooks(module) if hook.weights_map is not None
    )
    assert torch.equal(logits_of(away, tokens()), logits)


@pytest.mark.parametrize("order", ["layer-major", "depth-first"])
def test_in_memory_both_ways_give_the_same_digits(order: str) -> None:
    model = tiny_model("llama")
    meant = ls.sweep(model, [EDITS, "swap-pairs", "repeat 5", "reverse 0:6", "repeat 1 x3; drop 0"], tokens(3))
    found = ls.sweep(
        model, [EDITS, "swap-pairs", "repeat 5", "reverse 0:6", "repeat 1 x3; drop 0"], tokens(3), schedule=order
    )
    pd.testing.assert_frame_equal(found, meant, check_exact=True)


def test_partly_on_disk(tmp_path: Path) -> None:
    blocks = {f"model.layers.{number}": "disk" if number in (1, 2, 5) else "cpu" for number in range(DEPTH)}
    rest = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    plain, away = dispatched(tmp_path, "llama", rest | blocks)
    assert 0 < sum(parameter.is_meta for parameter in away.parameters()) < len(list(away.parameters()))
    plans = [EDITS, "reverse 0:6"]
    found = ls.sweep(away, plans, tokens(3))
    pd.testing.assert_frame_equal(found, ls.sweep(plain, plans, tokens(3)).assign(model=found.model), check_exact=True)
    for plan in ("swap 1 2; drop 5", "skip-attention 2", "repeat 5"):
        assert ls.compare(away, plan, tokens(3)) == ls.compare(plain, plan, tokens(3))
    with ls.operate(plain, "swap 1 4; drop 2"), ls.operate(away, "swap 1 4; drop 2"):
        assert torch.equal(logits_of(away, tokens()), logits_of(plain, tokens()))


def test_the_fast_readout_and_the_right_device(tmp_path: Path) -> None:
    _, away = dispatched(tmp_path, "llama", {"": "disk"})
    measurer = Measurer(away, variants("swap,drop", DEPTH))
    assert isinstance(measurer.readout, Unembedding)
    assert device_of(away) == torch.device("cpu")
    assert measurer.schedule.name == "layer-major"
    assert Measurer(tiny_model("llama"), variants("drop", DEPTH)).schedule.name == "depth-first"


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("gpt2", True)])
def test_a_batch_reads_every_weight_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tied: bool
) -> None:
    plain, away = dispatched(tmp_path, name, {"": "disk"})
    assert plain.config.tie_word_embeddings is tied
    weights = sum(parameter.nbytes for parameter in plain.parameters())  # tied ones counted once
    measurer = Measurer(away, variants("swap,drop,skip-mlp", DEPTH))
    measurer.measure(tokens(2), torch.ones_like(tokens(2)))
    assert measurer.bytes_to_read == weights
    reads = Reads(monkeypatch)
    for batch in (1, 2):
        measured = measurer.measure(tokens(2), torch.ones_like(tokens(2)))
        assert measured.bytes_read == weights
        assert reads.total == batch * weights, reads.by_name
    by_route = Measurer(away, variants("swap,drop,skip-mlp", DEPTH), order="depth-first")
    before = reads.total
    by_route.measure(tokens(2), torch.ones_like(tokens(2)))
    assert reads.total - before > 3 * weights


def test_every_block_but_the_first_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, away = dispatched(tmp_path, "llama", {"": "disk"})
    measurer = Measurer(away, variants("swap", DEPTH))
    ahead: list[bool] = []
    load = OffloadedWeights.load

    def noted(weights: OffloadedWeights, *modules: torch.nn.Module) -> None:
        ahead.extend(id(module) in weights._prefetching for module in modules if module in measurer.runner.blocks)
        load(weights, *modules)

    monkeypatch.setattr(OffloadedWeights, "load", noted)
    measurer.measure(tokens(2), torch.ones_like(tokens(2)))
    assert ahead == [False] + [True] * (DEPTH - 1)


def test_whatever_goes_wrong_weights_go_away_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, away = dispatched(tmp_path, "llama", {"": "disk"})
    measurer = Measurer(away, variants("swap,drop", DEPTH))
    meant = measurer.measure(tokens(), torch.ones_like(tokens()))
    original, calls = BlockRunner.run, 0

    def failing(self: BlockRunner, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise ValueError("no more")
        return original(self, *args)

    monkeypatch.setattr(BlockRunner, "run", failing)
    with pytest.raises(ValueError, match="no more"):
        measurer.measure(tokens(), torch.ones_like(tokens()))
    assert on_disk(away)
    again = measurer.measure(tokens(), torch.ones_like(tokens()))
    assert (again.values == meant.values).all()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("layersurgery-weights")]


@pytest.mark.parametrize(
    "name", ["llama", "gpt_bigcode"]
)  # of which the second has a tensor of its own above the blocks
def test_no_more_blocks_are_at_hand_than_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _, away = dispatched(tmp_path, name, {"": "disk"})
    measurer = Measurer(away, variants("swap,drop", DEPTH))
    assert measurer.schedule.resident_blocks == 2
    most = 0
    bring = OffloadedWeights._load_all

    def watched(self: OffloadedWeights, wanted: Any) -> None:
        nonlocal most
        bring(self, wanted)
        most = max(most, sum(not offloaded(block) for block in measurer.runner.blocks))

    monkeypatch.setattr(OffloadedWeights, "_load_all", watched)
    measurer.measure(tokens(), torch.ones_like(tokens()))
    assert most == 2


def test_weights_in_main_memory_while_computing_elsewhere() -> None:
    """What a GPU's offloading does, with the CPU in the GPU's place."""
    model = tiny_model("llama")
    meant = ls.sweep(model, EDITS, tokens())
    logits = logits_of(model, tokens())
    cpu_offload(model, execution_device="cpu")
    found = ls.sweep(model, EDITS, tokens())
    pd.testing.assert_frame_equal(found, meant, check_exact=True)
    assert torch.equal(logits_of(model, tokens()), logits)


def test_from_the_command_line(small: list[Any], tmp_path: Path) -> None:
    meant = result_of(*small, "--device", "cpu")
    (tmp_path / "map.json").write_text('{"model": "disk", "lm_head": "cpu"}')
    found = run(*small[:-1], tmp_path / "away", "--device-map", tmp_path / "map.json")
    assert found.exit_code == 0, found.stderr
    frame, whole = ls.read_results(tmp_path / "away"), ls.read_results(tmp_path / "out")
    pd.testing.assert_frame_equal(frame, whole, check_exact=True)
    assert "float32 on disk and cpu" in found.stderr
    assert "Weights are loaded layer by layer, 2 blocks in memory at a time: 2" in found.stderr
    assert frame.attrs["run"]["schedule"]["order"] == "layer-major"
    assert frame.attrs["run"]["schedule"]["bytes_read_a_batch"] > 200_000
    assert frame.attrs["run"]["model"]["parameters"] == whole.attrs["run"]["model"]["parameters"]
    again = run(*small[:-1], tmp_path / "out", "--device-map", tmp_path / "map.json")
    assert (again.exit_code, "--device-map nothing there, {" in again.stderr) == (1, True)
    # The way through the models is not among the arguments: it changes no digit.
    assert result_of(*small, "--device", "cpu", "--schedule", "layer-major")["results"] == meant["results"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--device", "cpu", "--device-map", "auto"], "give either --device or --device-map"),
        (["--max-memory", "cpu=1GB"], "need --device-map"),
        (["--device-map", "auto", "--max-memory", "lots"], "max-memory 'lots' is not DEVICE=SIZE"),
        (["--device-map", "nowhere.json"], "is not a map and not a file"),
        (["--schedule", "breadth"], "schedule 'breadth' is unknown; use depth-first or layer-major"),
        (
            ["--estimate", "--device-map", '{"model": "cpu"}'],
            "the device map gives no device for lm_head.weight; give one to each",
        ),
    ],
)
def test_options_that_cannot_be_meant(small: list[Any], tmp_path: Path, more: list[str], said: str) -> None:
    found = run(*small, *more)
    assert (found.exit_code, said in " ".join(found.stderr.split())) == (2, True), found.stderr
    assert not (tmp_path / "out").exists()
