"""Probes for the sense of a word: forms of data, positions of tokens, streams, and a model that knows the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import layersurgery as ls
from layersurgery.analyses.word_pairs import EncodedPairs, encode_pairs, read_pairs
from layersurgery.analyses.word_senses import (
    cross_validate,
    make_folds,
    pair_features,
    record_words,
    score_by_word,
)
from layersurgery.models.anatomy import anatomy
from layersurgery.runtime.block_runner import BlockRunner
from tests.cli.test_cli import result_of, run
from tests.support.demo_model import make_tokenizer
from tests.support.tiny_checkpoint import checkpoint, tiny_tokenizer
from tests.support.zoo import tiny_model

NOUNS = ("bank", "bat", "bar", "bark", "ring", "note", "seal", "spring", "match", "fair", "light", "sound")


def toy_rows(words: tuple[str, ...] = NOUNS, each: int = 4) -> list[dict[str, Any]]:
    """Return pairs in which the word before it decides what a word is: a verb after "to", a noun after "the"."""
    rows = []
    for word in words:
        for number in range(each):
            before = ("the", "to")[number // 2 % 2], ("the", "to")[(number + number // 2) % 2]
            sentences = [f"so {first} {word}s now" for first in before]
            start = [sentence.index(word) for sentence in sentences]
            rows.append(
                {
                    "word": word,
                    "sentence1": sentences[0],
                    "sentence2": sentences[1],
                    "start1": start[0],
                    "end1": start[0] + len(word) + 1,
                    "start2": start[1],
                    "end2": start[1] + len(word) + 1,
                    "label": before[0] == before[1],
                }
            )
    return rows


def write_public(directory: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as the public WiC data are written."""
    lines = [f"{row['word']}\tN\t2-2\t{row['sentence1']} .\t{row['sentence2']} ." for row in rows]
    (directory / "toy.gold.txt").write_text("".join(f"{'FT'[row['label']]}\n" for row in rows))
    path = directory / "toy.data.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_all_forms_of_data_give_the_same_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = toy_rows()
    pairs = read_pairs(rows)
    assert {pair.sentences[0][slice(*pair.spans[0])] for pair in pairs} == {f"{word}s" for word in NOUNS}
    assert {pair.same for pair in pairs} == {True, False}
    (tmp_path / "toy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame(rows).to_csv(tmp_path / "toy.tsv", sep="\t", index=False)
    for name in ("toy.jsonl", "toy.tsv"):
        assert read_pairs(tmp_path / name) == pairs
    public = read_pairs(write_public(tmp_path, rows))
    assert [(pair.word, pair.spans, pair.same) for pair in public] == [(p.word, p.spans, p.same) for p in pairs]

    asked = []

    def load(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((arguments, options["split"]))
        return rows

    monkeypatch.setattr("datasets.load_dataset", load)
    assert read_pairs("aps/super_glue:wic", "validation") == pairs
    assert asked == [(("aps/super_glue", "wic"), "validation")]


def test_the_position_is_the_words_last_token() -> None:
    row = {
        "word": "bank",
        "idx": "1-3",
        "sentence1": "The bänke, here",
        "sentence2": "Down by the rivérbanks.",
        "label": 1,
    }
    (pair,) = read_pairs([row])
    assert [sentence[slice(*span)] for sentence, span in zip(pair.sentences, pair.spans, strict=True)] == [
        "bänke",
        "rivérbanks",
    ]
    for tokenizer in (make_tokenizer(), tiny_tokenizer()):
        for first in (None, tokenizer.bos_token_id):
            encoded = encode_pairs([pair], tokenizer, first)
            for sentence, (start, stop), ids, position in zip(
                pair.sentences, pair.spans, encoded.ids, encoded.positions, strict=True
            ):
                assert ids[:1] == [first] or first is None
                own = ids[first is not None :]
                assert own == tokenizer(sentence, add_special_tokens=False)["input_ids"]
                # The tokens up to this one are enough for the word, and without it they are not.
                upto = [
                    tokenizer(sentence, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][place]
                    for place in range(position + 1 - (first is not None))
                ]
                assert upto[-1][1] >= stop
                assert all(a >= stop or b <= stop for a, b in upto[:-1] if b > start)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_the_streams_are_those_of_the_model(name: str) -> None:
    model, tokenizer = tiny_model(name, vocab_size=600), make_tokenizer()
    encoded = encode_pairs(read_pairs(toy_rows(NOUNS[:5])), tokenizer, tokenizer.bos_token_id)
    runner = BlockRunner(model, anatomy(model))
    streams = record_words(runner, encoded, 3, None)
    assert streams.shape[:3] == (runner.depth + 1, len(encoded.words), 2)
    last: list[torch.Tensor] = []
    hook = runner.blocks[-1].register_forward_hook(
        lambda _module, _args, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    for number, (ids, position) in enumerate(zip(encoded.ids, encoded.positions, strict=True)):
        with torch.no_grad():
            states = model.eval()(torch.tensor([ids]), output_hidden_states=True).hidden_states
        expected = torch.stack(
            [*[state[0, position] for state in states[:-1]], last.pop().view(-1, runner.width)[position]]
        )
        np.testing.assert_allclose(streams[:, number // 2, number % 2], expected, rtol=1e-4, atol=1e-5)
    hook.remove()


def test_words_stay_in_one_fold_and_answers_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    words = [f"word{number // 3}" for number in range(60)]
    same = rng.random(60) < 0.5
    encoded = EncodedPairs([], [], words, same)
    held_out = make_folds(encoded, 1)
    assert (np.sum(held_out, 0) == 1).all()
    for fold in held_out:
        assert not {word for word, held in zip(words, fold, strict=True) if held} & {
            word for word, held in zip(words, fold, strict=True) if not held
        }
    streams = rng.normal(size=(60, 2, 7))
    features = np.hstack([abs(streams[:, 0] - streams[:, 1]), streams[:, 0] * streams[:, 1]])
    assert np.array_equal(pair_features(streams), features)
    assert np.array_equal(pair_features(streams[:, ::-1]), features)  # the order of the sentences does not matter
    right = cross_validate(features, same, held_out, 0)
    for fold in held_out:
        theirs = make_pipeline(StandardScaler(), LogisticRegression(C=1 / 14, max_iter=1000))
        theirs.fit(features[~fold], same[~fold])
        assert np.array_equal(right[fold], theirs.predict(features[fold]) == same[fold])


def test_the_standard_error_is_that_of_words() -> None:
    rng = np.random.default_rng(0)
    estimates, errors = [], []
    for _ in range(300):
        chances = np.repeat(rng.beta(1, 1, 40), 10)  # pairs of one word are alike
        score = score_by_word(rng.random(400) < chances, [str(number // 10) for number in range(400)])
        estimates.append(score["accuracy"])
        errors.append(score["accuracy_sem"])
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.1)


def knowing() -> Any:
    """Return a model in which block 1 writes to a word's stream which word was before it."""
    model = tiny_model("llama", vocab_size=600)
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            block.self_attn.o_proj.weight.mul_(3 if number == 1 else 0)
            block.mlp.down_proj.weight.zero_()
    return model


def test_a_sense_that_one_block_writes_is_found_from_there_on() -> None:
    frame = ls.analyses.wic(knowing(), make_tokenizer(), toy_rows(each=8))
    assert frame.layer.tolist() == [-1, 0, 1, 2, 3, 4, 5]
    assert (frame.accuracy[frame.layer < 1] < 0.7).all()
    assert (frame.accuracy[frame.layer >= 1] > 0.9).all()
    assert (frame.shuffled < 0.75).all()
    assert frame.majority.unique().tolist() == [0.5]
    assert (frame.accuracy_low <= frame.accuracy).all()
    assert frame.kind == "wic"
    assert frame.figure().axes[0].get_lines()


def test_command_and_function_write_the_same_and_finished_runs_are_used(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    data = write_public(tmp_path, toy_rows())
    asked = ["analyze", "wic", path, "--pairs", data, "--bos", "yes", "-o", tmp_path / "out"]
    shown = run(*asked)
    assert shown.exit_code == 0, shown.output
    assert "embeddings" in shown.stdout
    assert "48 pairs of sentences for 12 words" in shown.stderr
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "run.json", "wic.parquet", "wic.csv", "wic.png", "wic.svg",
    }  # fmt: skip
    assert "Using the finished run in" in run(*asked).stderr
    table = ls.analyze("wic", str(path), pairs=str(data), bos="yes", directory=tmp_path / "python")
    pd.testing.assert_frame_equal(table, ls.read_results(tmp_path / "out"), check_dtype=False)
    in_memory = ls.analyses.wic(*ls.load(path), data, bos="yes")
    np.testing.assert_allclose(in_memory.accuracy, table.accuracy)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["pairs"] == {"pairs": 48, "words": 12, "same": 24}
    ls.report([tmp_path / "out"], tmp_path / "page.html")
    assert "Shuffled labels" in (tmp_path / "page.html").read_text()
    other = result_of(*asked[:-1], tmp_path / "few", "--samples", 30)
    assert other["pairs"]["pairs"] == 30
    refused = run(*asked, "--samples", 20)
    assert (refused.exit_code, "pairs samples nothing there, 20 now" in refused.stderr) == (1, True)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "holds no pairs"),
        ([{"word": "a"}], "row 1 has no sentence1"),
        ([toy_rows()[0] | {"label": -1}], "the label is -1, not true or false"),
        ([toy_rows()[0] | {"start1": 90, "end1": 95}], "sentence 1 has no characters 90 to 95"),
        ([toy_rows()[0] | {"start2": None, "idx": 3}], "row 1 does not say where the word is: give start2 and end2"),
        (
            [toy_rows()[0] | {"start1": None, "start2": None, "idx": "1-9"}],
            "sentence 2 has 4 words, so none of index 9",
        ),
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("no such thing", "no such thing does not exist; give a file"),
        ("plain.txt", "has no file of labels"),
        ("short.data.txt", "has 1 lines, and short.gold.txt has 2 labels"),
        ("fields.data.txt", "row 1: found 2 fields, not 5"),
        ("alone.data.txt", "alone.gold.txt"),
    ],
)
def test_data_in_another_form_are_refused(
    source: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "plain.txt": "a", "alone.data.txt": "a", "short.data.txt": "a\n", "short.gold.txt": "T\nF\n",
        "fields.data.txt": "a\tb\n", "fields.gold.txt": "T\n",
    }.items():  # fmt: skip
        Path(name).write_text(text, encoding="utf-8")
    with pytest.raises(ls.SourceError, match=words):
        read_pairs(source)


def test_too_little_is_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(ls.MeasurementError, match="16 pairs for 4 words, 8 of them with the same meaning, are too few"):
        ls.analyses.wic(model, tokenizer, toy_rows(NOUNS[:4]))
    with pytest.raises(ls.PlanError, match="wic reads the pairs of sentences that pairs names; give no text"):
        ls.analyze("wic", model, ["a text"], pairs=toy_rows(), directory=tmp_path / "out")
    with pytest.raises(ls.SourceError, match="more than the model's 8"):
        ls.analyses.wic(tiny_model("gpt2", max_position_embeddings=8), tokenizer, toy_rows())
