"""Probes on neurons.

The tests cover token classes, windows that share no text, activations against hooks, effects against dense sums, and a
neuron made by hand.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from layersurgery_cli.terminal.console import Console
from layersurgery_cli.terminal.progress import counter
from rich.console import Console as RichConsole

import layersurgery as ls
from layersurgery.analyses.logistic_probe import ProbeData
from layersurgery.analyses.neuron_probes import KINDS, SHUFFLED, TOP_TOKEN, describe_probes
from layersurgery.analyses.token_classes import CONTEXT, MIN_WINDOWS, SHARED, find_balanced_windows, token_class
from layersurgery.checkpoints.loading import tokenizer_of
from layersurgery.checkpoints.sources import find_source
from layersurgery.runtime import neuron_activations
from layersurgery.runtime.block_runner import BlockRunner
from tests.cli.test_cli import result_of, run
from tests.runtime.test_offload import on_disk
from tests.support.tiny_checkpoint import LETTERS, tiny_tokenizer
from tests.support.zoo import tiny_model, tokens

PLACE = {letter: number for number, letter in enumerate(LETTERS, 4)}


def story(letters: int = 9000, seed: int = 0) -> str:
    """Return random letters, with an x after every q and nowhere else."""
    rng = random.Random(seed)
    others = [letter for letter in LETTERS[1:40] if letter not in "qx"]
    return "".join(rng.choice(["qx", *rng.choices(others, k=12)]) for _ in range(letters))


def knowing() -> Any:
    """Return a model where neuron 5 of block 2 is active after a q and raises the logit of x."""
    model = tiny_model("gpt2", tie_word_embeddings=False)
    q, x = torch.zeros(32), torch.zeros(32)
    q[0], q[1], x[2], x[3] = 1, -1, 1, -1
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight[:, :4] = 0
        model.transformer.wte.weight[PLACE["q"]] = 3 * q
        model.lm_head.weight[:, :4] = 0
        model.lm_head.weight[PLACE["x"]] = x
        for block in model.transformer.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                projection.weight.mul_(1e-3)
                projection.bias.zero_()
        mlp = model.transformer.h[2].mlp
        mlp.c_fc.weight[:, 5], mlp.c_fc.bias[5] = 2 * q, -6
        mlp.c_proj.weight[5] = 5 * x
    return model


def test_the_class_is_told_by_the_text_of_tokens() -> None:
    tokenizer = tokenizer_of(find_source("smollm2-135m", weights=False))
    found = token_class(tokenizer)
    assert found.description == "ends with 'ing'"
    texts = [tokenizer.decode([token]) for token in np.flatnonzero(found.inside)]
    assert all(text.strip().lower().endswith("ing") for text in texts)
    assert {" using", "ing", "ING"} <= set(texts)
    assert not (found.inside & found.rest).any()
    special = tokenizer.all_special_ids
    assert not found.inside[special].any()
    assert not found.rest[special].any()
    assert set(found.examples) <= set(texts)
    capitals = token_class(tokenizer, regex=r"^ [A-Z]")
    assert all(tokenizer.decode([token])[1].isupper() for token in np.flatnonzero(capitals.inside)[:100])
    assert token_class(tokenizer, suffix=" ED ").inside.sum() == token_class(tokenizer, suffix="ed").inside.sum()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"suffix": "ing", "regex": "ing"}, "give `suffix` or `regex`, not both"),
        (
            {"regex": "(ing"},
            r"'\(ing' is not a valid regular expression: missing \), unterminated subpattern at position 0",
        ),
        ({"suffix": "qqqq"}, "of the tokenizer's 76 tokens, no token ends with 'qqqq'"),
        ({"regex": "(?s)."}, "every token matches"),
    ],
)
def test_a_class_that_cannot_be_meant(given: dict[str, str], said: str) -> None:
    with pytest.raises(ls.PlanError, match=said):
        token_class(tiny_tokenizer(), **given)


def test_windows_share_no_text_and_are_balanced() -> None:
    tokenizer = tiny_tokenizer()
    chosen = token_class(tokenizer, regex="^x$")
    text = story()
    again = [text[:3000], text, text[500:4000]]  # the same text several times
    found = find_balanced_windows(again, tokenizer, chosen, samples=200)
    runs: set[tuple[int, ...]] = set()
    for row, following, inside in zip(found.ids.tolist(), found.following, found.inside, strict=True):
        mine = {tuple(row[first : first + SHARED]) for first in range(CONTEXT - SHARED + 1)}
        assert not runs & mine
        runs |= mine
        shown = tokenizer.decode([*row, following])
        assert any(shown in document for document in again)
        assert (shown[-1] == "x") == inside
    for half in (True, False):
        assert found.inside[found.held_out == half].mean() == 0.5
        assert (found.held_out == half).sum() > 2 * MIN_WINDOWS
    assert found.facts["training"] + found.facts["held_out"] == len(found.ids) <= 400
    same = find_balanced_windows(again, tokenizer, chosen, samples=200)
    assert same.fingerprint == found.fingerprint
    assert find_balanced_windows(again, tokenizer, chosen, samples=200, seed=1).fingerprint != found.fingerprint


def test_too_little_text_says_how_much_it_would_take() -> None:
    chosen = token_class(tiny_tokenizer(), regex="^x$")
    with pytest.raises(
        ls.MeasurementError,
        match=r"of 600 tokens of the text .* 16 are needed. At this rate, about [\d,]+ tokens",
    ):
        find_balanced_windows([story()[:600]], tiny_tokenizer(), chosen)
    with pytest.raises(ls.MeasurementError, match="^0 of 400 tokens .* Give more text, other text, or another class"):
        find_balanced_windows(["abcd" * 100], tiny_tokenizer(), chosen)
    with pytest.raises(ls.MeasurementError, match="^0 of 0 tokens"):
        find_balanced_windows([], tiny_tokenizer(), chosen)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gpt2", "mlp.c_proj"), ("llama", "mlp.down_proj"), ("gpt_neox", "mlp.dense_4h_to_h"),
        ("gemma2", "mlp.down_proj"),
        ("phi", "mlp.fc2"), ("opt", "fc2"), ("bloom", "mlp.dense_4h_to_h"),
    ],
)  # fmt: skip
def test_activations_are_what_the_output_projection_is_given(name: str, path: str) -> None:
    model, ids = tiny_model(name), tokens(3, 9)
    runner = BlockRunner(model, ls.anatomy(model))
    before = [id(module) for module in model.modules()]
    readable, skipped = neuron_activations.projections(runner)
    assert (len(readable), skipped) == (runner.depth, {})
    caught: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda value: caught.__setitem__(layer, value.clone())

    with runner.inference_mode():
        with neuron_activations.capture_neurons(runner, {one: keep(one.layer) for one in readable}):
            model(ids)
        assert [id(module) for module in model.modules()] == before
        meant: dict[int, torch.Tensor] = {}
        handles = [
            block.get_submodule(path).register_forward_pre_hook(
                lambda _, args, layer=layer: meant.__setitem__(layer, args[0].clone())
            )
            for layer, block in enumerate(runner.blocks)
        ]
        model(ids)
    for handle in handles:
        handle.remove()
    for layer, value in meant.items():
        assert torch.equal(caught[layer], value)
        assert readable[layer].neurons == value.shape[-1]


def test_experts_are_left_out_by_name_and_nothing_stays_behind() -> None:
    model = tiny_model("mixtral")
    readable, skipped = neuron_activations.projections(BlockRunner(model, ls.anatomy(model)))
    assert readable == []
    assert len(skipped) == 6
    assert all("expert" in why for why in skipped.values())
    with pytest.raises(ls.UnsupportedEditError, match="nothing to probe"):
        ls.analyses.probe(model, tiny_tokenizer(), [story()], regex="^x$")
    model = knowing()
    before = [id(module) for module in model.modules()]

    def stop(_done: int, _of: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        ls.analyses.probe(model, tiny_tokenizer(), [story()], regex="^x$", progress=stop)
    assert [id(module) for module in model.modules()] == before


@pytest.fixture(scope="module")
def found() -> Any:
    return ls.analyses.probe(knowing(), tiny_tokenizer(), [story()], regex="^x$", samples=120)


def test_a_neuron_made_to_know_is_found(found: Any) -> None:
    first = found.single_neurons[found.single_neurons.kind == "prediction"].iloc[0]
    assert (first.layer, first.neuron, first["rank"]) == (2, 5, 1)
    assert first.effect > 3
    assert first.slope > 0
    assert first.accuracy == 1
    assert first.low > 0.95
    by = found.probes.set_index("probe")
    assert by.loc[TOP_TOKEN].accuracy == 1
    assert by.loc["majority"].accuracy == 0.5
    shuffled = by.loc[SHUFFLED]
    assert shuffled.low < 0.5 < shuffled.high
    assert shuffled.held_out == 20 * by.loc[TOP_TOKEN].held_out
    assert (found.probes.low <= found.probes.accuracy).all()
    assert (found.probes.high >= found.probes.accuracy).all()
    words = describe_probes(found.probes)
    assert "Held-out accuracy (95 %): 100.0 % (9" in words
    assert words.endswith("chance.")
    assert "not chance" not in words
    shown = found.effects[found.effects["rank"] == 1]
    assert set(shown.neuron) == {5}
    assert shown.class_tokens.sum() == 1
    assert shown.rest_tokens.sum() == found.tokens.rest.sum()


def test_effects_are_the_dense_ones(found: Any) -> None:
    """Fold in the final norm, center rows over the width, and subtract the mean over the vocabulary."""
    model = knowing().double()
    with torch.no_grad():
        rows = model.lm_head.weight * model.transformer.ln_f.weight
        rows = rows - rows.mean(-1, keepdim=True)
        rows = rows - rows.mean(0)
        for row in found.single_neurons.itertuples():
            weight = model.transformer.h[row.layer].mlp.c_proj.weight[row.neuron]
            values = rows @ (weight - weight.mean())
            inside, rest = (np.flatnonzero(mask) for mask in (found.tokens.inside, found.tokens.rest))
            assert row.effect == pytest.approx(float(values[inside].mean() - values[rest].mean()), abs=1e-6)


def test_the_same_seed_gives_the_same_digits(found: Any) -> None:
    again = ls.analyses.probe(knowing(), tiny_tokenizer(), [story()], regex="^x$", samples=120, batch_size=7)
    for name in ("probes", "single_neurons", "top_k", "effects"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name), atol=1e-9)
    for kind, rows in found.top_k.groupby("kind"):
        assert rows.k.tolist() == list(range(1, len(rows) + 1))
        assert kind in KINDS


def test_labels_that_mean_nothing_are_told_by_chance_and_a_leak_is_seen() -> None:
    """Held-out accuracy is chance on random numbers, and above chance if the halves share windows."""
    rng = np.random.default_rng(0)
    inside, held_out = np.tile([True, False], 100), np.repeat([False, True], 100)
    alone = ProbeData(rng.normal(size=(200, 60)), inside, held_out, 0)
    right, _ = alone.fit(list(range(60)))
    judged = alone.score(right)
    assert judged["train_accuracy"] > 0.8
    assert judged["low"] < 0.5 < judged["high"]
    shared = np.concatenate([alone.x_WN[:100], alone.x_WN[:100]])
    leaking = ProbeData(shared, inside, held_out, 0)
    assert leaking.score(leaking.fit(list(range(60)))[0])["low"] > 0.6


def test_weights_kept_on_disk_give_the_same(tmp_path: Path, found: Any) -> None:
    knowing().save_pretrained(tmp_path / "knowing")
    away = ls.load(tmp_path / "knowing", device_map={"": "disk"}, offload_folder=tmp_path / "offload").model
    other = ls.analyses.probe(away, tiny_tokenizer(), [story()], regex="^x$", samples=120)
    pd.testing.assert_frame_equal(other.single_neurons, found.single_neurons)
    assert on_disk(away)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe")
    knowing().save_pretrained(path / "knowing")
    tiny_tokenizer().save_pretrained(path / "knowing")
    (path / "story.txt").write_text(story())
    return path


def test_on_the_command_line(place: Path, tmp_path: Path, found: Any) -> None:
    words = [
        "analyze",
        "probe",
        place / "knowing",
        "--regex",
        "^x$",
        "--data",
        place / "story.txt",
        "--samples",
        120,
        "-o",
        tmp_path / "out",
    ]
    value = result_of(*words)
    assert value["summary"] == describe_probes(found.probes)
    table = ls.read_results(tmp_path / "out", "single_neurons")
    meant = found.single_neurons.drop(columns="model")
    pd.testing.assert_frame_equal(table.drop(columns="model"), meant, check_exact=False, atol=1e-6, check_like=True)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["class"]["class"] == "matches '^x$'"
    assert facts["arguments"]["class"] == "matches '^x$'"
    assert {"probe.png", "effects.png"} <= set(facts["figures"])
    assert sorted([*facts["files"], *facts["figures"], "run.json"]) == sorted(
        file.name for file in (tmp_path / "out").iterdir()
    )
    again = run(*words)
    assert "Using the finished run in" in again.stderr
    assert "…" not in again.stdout
    assert "shuffled labels" in again.stdout
    other = run(*[word if word != "^x$" else "^q$" for word in words])
    assert other.exit_code == 1
    assert "class matches '^x$' there, matches '^q$' now" in other.stderr


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["--suffix", "x", "--regex", "x"], 2, "give --suffix or --regex, not both"),
        (["--regex", "[x"], 2, "'[x' is not a valid regular expression: unterminated character set at position 0"),
        (["--suffix", "ing"], 2, "no token ends with 'ing'"),
        (["--suffix", "x", "-n", 500], 1, "tokens of text are needed: give more text (--data, --tokens)"),
    ],
)
def test_what_is_refused_on_the_command_line(
    place: Path, tmp_path: Path, given: list[Any], code: int, said: str
) -> None:
    found = run("analyze", "probe", place / "knowing", "--data", place / "story.txt", *given, "-o", tmp_path / "out")
    assert found.exit_code == code, found.stderr
    assert said in " ".join(found.stderr.split())
    assert not (tmp_path / "out").exists()


def test_one_bar_at_a_time() -> None:
    """Versions of rich before 14.1 refuse a second bar, and a spinner while a bar is shown."""
    console = Console()
    shown = io.StringIO()
    console.err = RichConsole(file=shown, force_terminal=True)
    with counter(console, "blocks") as on_layer, counter(console, "windows") as on_window:
        assert shown.getvalue() == ""
        on_layer(1, 2)
        assert "blocks" in shown.getvalue()
        on_layer(2, 2)
        on_window(1, 2)
        assert "windows" in shown.getvalue()
    assert "\x1b[?25h" in shown.getvalue().rpartition("windows")[2]  # the cursor is back
