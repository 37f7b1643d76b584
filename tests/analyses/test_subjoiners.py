"""Word windows and subjoiner heads: tested by a plain rule, eager attention, a head made by hand, and scipy."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_ind

import layersurgery as ls
from layersurgery.analyses.subjoiner_heads import BACK, describe_subjoiners, is_supported, score_heads
from layersurgery.analyses.word_windows import MIN_WINDOWS, WINDOW, WORD_TOKENS, WordWindows, find_word_windows
from layersurgery.checkpoints.loading import tokenizer_of
from layersurgery.checkpoints.sources import find_source
from layersurgery.runtime import attention_weights
from layersurgery.runtime.block_runner import BlockRunner
from layersurgery.runtime.contributions import find_contributions
from tests.analyses.test_signals import NO_EAGER
from tests.cli.test_cli import result_of, run
from tests.runtime.test_offload import dispatched
from tests.support.dense import BRANCH_MODULES, matrices, model_of
from tests.support.tiny_checkpoint import LETTERS, checkpoint, tiny_tokenizer
from tests.support.zoo import DEPTH, tiny_model, tokens

LETTER_PLACES = range(LETTERS.index("a") + 4, LETTERS.index("Z") + 5)


def story(lines: int = 400, seed: int = 0) -> str:
    """Return numbers mixed with words of four lower-case letters, words of one, and strings that are not words."""
    picked = random.Random(seed)
    letters = LETTERS[1:27]

    def line() -> str:
        numbers = " ".join(str(picked.randint(10, 99)) for _ in range(6))
        word = "".join(picked.choices(letters, k=picked.choice((1, 1, 1, 3, 4, 5))))
        return f"{numbers} {picked.choice((word, word, word.upper(), f'{word}7', f'_{word}'))}{picked.choice('., ')}"

    return "\n".join(line() for _ in range(lines))


def joiner() -> Any:
    """Return a model where head 2 of layer 1 attends to letters only; other branches add almost nothing."""
    model = tiny_model("gpt2")
    width, each = 32, 8
    direction = torch.randn(width, generator=torch.Generator().manual_seed(1))
    direction -= direction.mean()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight.copy_(-direction.expand_as(model.transformer.wte.weight))
        model.transformer.wte.weight[list(LETTER_PLACES)] = direction
        for block in model.transformer.h:
            # The branches stay detectable, but add too little to change anything else.
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                projection.weight.mul_(1e-4)
                projection.bias.zero_()
            block.attn.c_attn.weight[:, : 2 * width] = 0
            block.attn.c_attn.bias[: 2 * width] = 0
            block.ln_1.weight.fill_(1)
            block.ln_1.bias.zero_()
        attention = model.transformer.h[1].attn.c_attn
        normed = direction / direction.std(correction=0)
        attention.bias[2 * each] = 30
        attention.weight[:, width + 2 * each] = normed / width  # a key of 1 for letters, and of -1 for others
    return model


def test_windows_follow_the_rule() -> None:
    """Find the words with a plain loop; every token is a letter here."""
    text = story()
    found = find_word_windows([text], tiny_tokenizer(), samples=10_000)
    words = {4: set(), 1: set()}  # type: dict[int, set[str]]
    for match in re.finditer(r"[a-z]+", text):
        before, after = text[match.start() - 1], text[match.end() : match.end() + 1] or " "
        if (
            match.start() > 0
            and not before.isalnum()
            and before != "_"
            and not after.isalnum()
            and len(match[0]) in (1, 4)
        ):
            words[len(match[0])].add(match[0])
    assert {word for word, joined in zip(found.words, found.multi_token, strict=True) if joined} == words[4]
    assert {word for word, joined in zip(found.words, found.multi_token, strict=True) if not joined} <= words[1]
    assert found.multi_token.sum() == (~found.multi_token).sum()
    for ids, texts, word, joined in zip(found.ids, found.texts, found.words, found.multi_token, strict=True):
        assert len(ids) == len(texts) == WINDOW
        assert "".join(texts) in text
        assert "".join(texts[-WORD_TOKENS:] if joined else texts[-1:]) == word
        assert texts[-WORD_TOKENS - 1 if joined else -2] in LETTERS.replace("_", "")
    assert found.tokens == len(text)
    assert found.facts["four_token_words"] == len(words[4]) == found.found["four_token_words"]
    assert found.facts["four_token_windows_found"] >= found.facts["four_token_windows"] == found.multi_token.sum()


def test_windows_of_a_real_tokenizer() -> None:
    tokenizer = tokenizer_of(find_source("smollm2-135m", weights=False))
    text = (
        "The hexadecimal, the unparenthesized and the alphanumeric; xhexadecimal'x Hexadecimal hexadecimal2 it is "
        "disambiguated\n" * 9
    )
    found = find_word_windows([text, text[:300]], tokenizer)
    ends = {"hexadecimal", "unparenthesized", "alphanumeric", "disambiguated"}
    assert {word for word, joined in zip(found.words, found.multi_token, strict=True) if joined} == ends
    for ids, word, joined in zip(found.ids.tolist(), found.words, found.multi_token, strict=True):
        assert tokenizer.decode(ids[-WORD_TOKENS if joined else -1 :]).strip() == word
        assert tokenizer.decode(ids) in text
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == (WORD_TOKENS if joined else 1)


def test_words_are_spread_and_halves_share_none() -> None:
    few = " ".join(f"1234567890123 {word} 1234567890123456 a" for word in ("abcd", "bcde", "cdef"))
    text = "zzzz 12345678901234 " * 50 + f"{few} {few} {few} 1234567890123456 i 1234567890123456 o"
    found = find_word_windows([text], tiny_tokenizer(), samples=9)
    words = [word for word, joined in zip(found.words, found.multi_token, strict=True) if joined]
    assert len(words) == 9
    assert {word: words.count(word) for word in words} == {"zzzz": 3, "abcd": 2, "bcde": 2, "cdef": 2} or words.count(
        "zzzz"
    ) in (
        2,
        3,
    )
    assert set(words[:4]) == {"zzzz", "abcd", "bcde", "cdef"}
    halves = {
        half: {word for word, other in zip(found.words, found.held_out, strict=True) if other == half}
        for half in (True, False)
    }
    assert not halves[True] & halves[False]
    again = find_word_windows([text], tiny_tokenizer(), samples=9)
    assert again.fingerprint == found.fingerprint
    assert torch.equal(again.ids, found.ids)
    assert find_word_windows([text], tiny_tokenizer(), samples=9, seed=1).fingerprint != found.fingerprint


def test_windows_stay_in_their_document_and_within_the_tokens_asked() -> None:
    alone = [f"123456789012 {word} x" for word in ("abcd", "bcde")]
    with pytest.raises(
        ls.MeasurementError, match=r"2 windows that end in words of four tokens \(2 different\) in 38 tokens"
    ):
        find_word_windows(alone, tiny_tokenizer())
    text = story()
    half = find_word_windows([text], tiny_tokenizer(), tokens=5000, samples=1000)
    assert half.tokens == 5000
    assert all("".join(texts) in text[:5000] for texts in half.texts)


def test_too_few_words_say_how_much_text_it_would_take() -> None:
    text = "1234567890123456 a " * 30 + "1234567890 abcd bcde "
    needed = (
        rf"^2 windows that end in words of four tokens \(2 different\) in {len(text)} tokens of my.txt; "
        rf"{MIN_WINDOWS} are needed. At this rate, about 2,900 tokens of text are needed"
    )
    with pytest.raises(ls.MeasurementError, match=needed):
        find_word_windows([text], tiny_tokenizer(), name="my.txt")
    with pytest.raises(ls.MeasurementError, match=r"^0 windows .* Give more text, or text with rarer words"):
        find_word_windows(["1234567890123456 a " * 30], tiny_tokenizer())
    with pytest.raises(ls.MeasurementError, match="^0 windows that end in words of four tokens"):
        find_word_windows([], tiny_tokenizer())
    with pytest.raises(ls.SourceError, match="object does not give the positions of its tokens in a text"):
        find_word_windows([text], object())


def made(ids: torch.Tensor) -> WordWindows:
    """Make windows of any tokens, alternating between classes and halves."""
    rows = np.arange(len(ids))
    texts = [[str(token) for token in row] for row in ids.tolist()]
    return WordWindows(ids, rows % 2 == 0, rows % 4 < 2, [str(row) for row in rows], texts, 0, {})


@pytest.mark.parametrize("name", [name for name in BRANCH_MODULES if name not in NO_EAGER])
def test_scores_are_those_of_eager_attention(name: str) -> None:
    model, ids = model_of(name), tokens(16, WINDOW)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = score_heads(model, made(ids), batch_size=5, anatomy=ls.anatomy(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    heads = found.heads.set_index(["layer", "head"])
    assert list(found.heads["rank"]) == list(range(1, len(heads) + 1))
    assert found.heads.score.is_monotonic_decreasing
    joined = np.arange(16) % 2 == 0
    means = found.attention.set_index(["layer", "head", "word_tokens"])[BACK]
    for layer, matrix in enumerate(matrices(model, ids)):
        last = matrix[:, :, -1, :WINDOW]
        for head in range(last.shape[1]):
            inside, outside = last[joined, head, -4:-1].sum(-1), last[~joined, head, -4:-1].sum(-1)
            row = heads.loc[(layer, head)]
            assert row.score == pytest.approx(inside.mean() - outside.mean(), abs=3e-6)
            test = ttest_ind(inside, outside, equal_var=False)
            interval = test.confidence_interval(0.95)
            assert (row.score_low, row.score_high) == pytest.approx((interval.low, interval.high), abs=2e-5)
            spread = np.sqrt((inside.var(ddof=1) + outside.var(ddof=1)) / 2)
            assert row.effect_size == pytest.approx((inside.mean() - outside.mean()) / spread, rel=2e-2, abs=1e-3)
            np.testing.assert_allclose(means.loc[(layer, head, 4)], last[joined, head].mean(0), atol=3e-6)
            np.testing.assert_allclose(means.loc[(layer, head, 1)], last[~joined, head].mean(0), atol=3e-6)
    shown = found.examples[found.examples.example == 0]
    best = found.heads.loc[found.heads.score_chosen.idxmax()]
    assert set(shown.layer) == {best.layer}
    matrix = matrices(model, ids)[best.layer][:, best["head"], -1, :WINDOW]
    # The first windows of held-out words.
    np.testing.assert_allclose(shown[shown.word_tokens == 4].attention, matrix[0], atol=3e-6)
    np.testing.assert_allclose(shown[shown.word_tokens == 1].attention, matrix[1], atol=3e-6)
    assert shown[shown.word_tokens == 4].token.tolist() == [str(token) for token in ids[0].tolist()]


def test_a_head_made_to_join_words_is_found() -> None:
    found = ls.analyses.subjoiners(joiner(), tiny_tokenizer(), [story()])
    first = found.heads.iloc[0]
    assert (first.layer, first["head"]) == (1, 2)
    assert first.in_word == pytest.approx(0.75, abs=0.02)
    assert first.elsewhere < 0.1
    assert first.effect_size > 3
    assert is_supported(first)
    assert (found.heads.score[1:].abs() < 1e-6).all()
    assert describe_subjoiners(found.heads).startswith(
        "Found a subjoiner head: layer 1, head 2, the best head on half of the words. On the other half"
    )
    mine = found.attention[(found.attention.layer == 1) & (found.attention["head"] == 2)].set_index("word_tokens")
    np.testing.assert_allclose(mine.loc[4, BACK].astype(float), [*[0] * 12, *[0.25] * 4], atol=0.01)
    assert found.examples.groupby(["word_tokens", "example"]).attention.sum().to_numpy() == pytest.approx(1)
    assert len(found.examples) == 2 * 10 * WINDOW


def test_heads_that_look_at_places_alone_join_nothing() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight.copy_(
            model.transformer.wte.weight[0].expand_as(model.transformer.wte.weight).clone()
        )
        model.transformer.wpe.weight.mul_(30)
    found = ls.analyses.subjoiners(model, tiny_tokenizer(), [story()])
    assert (found.heads.in_word > 0.05).any()
    assert (found.heads.score.abs() < 1e-6).all()
    assert describe_subjoiners(found.heads).startswith(
        "No subjoiner head was found. The best head on half of the words is layer "
    )


def test_a_token_before_each_window_takes_its_share() -> None:
    model, tokenizer = joiner(), tiny_tokenizer()
    plain = ls.analyses.subjoiners(model, tokenizer, [story()])
    begun = ls.analyses.subjoiners(model, tokenizer, [story()], bos=True)
    assert begun.windows.fingerprint == plain.windows.fingerprint
    other = begun.attention[begun.attention.layer == 0][BACK].sum(axis=1)
    np.testing.assert_allclose(other, 16 / 17, atol=1e-5)
    with pytest.raises(ls.PlanError, match="no beginning-of-text token"):
        ls.analyses.subjoiners(model, tiny_tokenizer(bos_token=None), [story()], bos=True)


def test_weights_kept_on_disk_give_the_same(tmp_path: Path) -> None:
    plain, away = dispatched(tmp_path, "llama", {"": "disk"})
    one, other = (ls.analyses.subjoiners(model, tiny_tokenizer(), [story()]) for model in (plain, away))
    pd.testing.assert_frame_equal(one.heads, other.heads)


def test_batches_do_not_matter_and_what_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    model = tiny_model("jamba")
    found = [
        ls.analyses.subjoiners(
            model, tiny_tokenizer(), [story()], batch_size=size, progress=lambda done, of: seen.append((done, of))
        )
        for size in (7, 500)
    ]
    pd.testing.assert_frame_equal(found[0].attention, found[1].attention, atol=1e-6)
    assert seen[0] == (7, len(found[0].windows.ids))
    assert seen[-1] == (seen[-1][1], seen[-1][1])
    assert len(found[0].skipped) == 4
    assert found[0].skipped["attention of block 0"] == "JambaMambaMixer has no softmax attention"
    with pytest.raises(
        ls.UnsupportedEditError, match="MambaForCausalLM has no heads to score: MambaMixer has no softmax attention"
    ):
        ls.analyses.subjoiners(tiny_model("mamba"), tiny_tokenizer(), [story()])
    model = tiny_model("llama")
    anatomy, windows = ls.anatomy(model), find_word_windows([story()], tiny_tokenizer())
    found_members = find_contributions(BlockRunner(model, anatomy))
    monkeypatch.setattr("layersurgery.analyses.subjoiner_heads.find_contributions", lambda _runner: found_members)
    monkeypatch.setattr(attention_weights, "_KERNELS", {})
    with pytest.raises(
        ls.MeasurementError, match="block 0: attention on this text ran in a kernel .* that cannot be read"
    ):
        score_heads(model, windows, anatomy=anatomy)
    assert not any("_Capturing" in type(module).__name__ for module in model.modules())


def test_numbers_that_are_none_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(ls.LayerSurgeryError, match=r"block 2: its attention is NaN or infinite|not finite|NaN"):
        ls.analyses.subjoiners(model, tiny_tokenizer(), [story()], anatomy=ls.anatomy(tiny_model("llama")))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("subjoiners")
    checkpoint(path / "tiny", "gpt2")
    joiner().save_pretrained(path / "joiner")
    tiny_tokenizer().save_pretrained(path / "joiner")
    (path / "story.txt").write_text(story())
    return path


def test_on_the_command_line(place: Path, tmp_path: Path) -> None:
    words = ["analyze", "subjoiners", place / "joiner", "--data", place / "story.txt", "-o", tmp_path / "out"]
    value = result_of(*words)
    meant = ls.analyses.subjoiners(ls.load(place / "joiner").model, tiny_tokenizer(), [story()])
    assert value["summary"] == describe_subjoiners(meant.heads)
    assert value["windows"] == meant.windows.facts
    table = ls.read_results(tmp_path / "out")
    pd.testing.assert_frame_equal(
        table.drop(columns="model"), meant.heads.drop(columns="model"), check_exact=False, atol=1e-6
    )
    assert set(table.model) == {str(place / "joiner")}
    assert len(value["tables"]["examples"]) == len(meant.examples)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert sorted([*facts["files"], *facts["figures"], "run.json"]) == sorted(
        file.name for file in (tmp_path / "out").iterdir()
    )
    assert {"subjoiners.png", "examples.png"} <= set(facts["figures"])
    assert not facts["figure_error"]

    again = run(*words)
    assert again.exit_code == 0
    assert "Using the finished run in" in again.stderr
    assert "Found a subjoiner head: layer 1, head 2" in again.stdout
    assert next(line.split()[:3] for line in again.stdout.splitlines() if line.strip()[:1].isdigit()) == ["1", "1", "2"]
    other = run(*words, "--samples", 20)
    assert other.exit_code == 1
    assert "samples 200 there, 20 now" in other.stderr
    (place / "story.txt").write_text(story() + " 1234567890123456 wxyz")
    changed = run(*words)
    (place / "story.txt").write_text(story())
    assert changed.exit_code == 1
    assert "text fingerprint" in changed.stderr

    result_of(
        "analyze", "subjoiners", place / "tiny", "--data", place / "story.txt", "-o", tmp_path / "tiny", "--bos", "yes"
    )
    drawn = run("plot", tmp_path / "out", tmp_path / "tiny", "-o", tmp_path / "together")
    assert drawn.exit_code == 0, drawn.stderr
    assert {file.name for file in (tmp_path / "together").iterdir()} == {
        f"{name}.{kind}" for name in ("subjoiners", "examples") for kind in ("png", "svg")
    }


def test_what_is_refused_on_the_command_line(place: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("1234567890123456 a abcd " * 3)
    found = run("analyze", "subjoiners", place / "tiny", "--data", tmp_path / "short.txt", "-o", tmp_path / "out")
    assert found.exit_code == 1
    assert "3 windows that end in words of four tokens (1 different) in 72 tokens" in " ".join(found.stderr.split())
    assert "At this rate, about" in " ".join(found.stderr.split())
    assert not (tmp_path / "out").exists()
    assert run("analyze", "subjoiners", place / "tiny", "--samples", 3).exit_code == 2
    other = run(
        "analyze",
        "subjoiners",
        place / "tiny",
        "--tokenizer",
        "smollm2-135m",
        "--data",
        "pydoc",
        "-o",
        tmp_path / "out",
    )
    assert other.exit_code == 1
    assert "the model's vocabulary has 128 tokens: this is another model's tokenizer" in other.stderr
    missing = run("analyze", "subjoiners", place / "tiny", "--data", tmp_path / "nothing.txt")
    assert missing.exit_code == 1
    assert "does not exist" in missing.stderr


@pytest.mark.slow
def test_the_head_of_the_real_model() -> None:
    """Layer 3, head 2 of SmolLM2-135M, found on Python's help and tested on held-out words."""
    from pydoc_data.topics import topics

    model, tokenizer = ls.load("smollm2-135m", dtype="float32")
    found = ls.analyses.subjoiners(model, tokenizer, [topics[name] for name in sorted(topics)])
    first = found.heads.iloc[0]
    assert (first.layer, first["head"]) == (3, 2)
    assert is_supported(first)
    assert first.score > 0.6
    assert DEPTH < found.heads.layer.max() == 29
