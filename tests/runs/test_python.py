"""From Python, one call does what a command does: the same files, resumed in the same way, from any form of text."""

from __future__ import annotations

import html.parser
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from layersurgery_cli.app import app
from typer.testing import CliRunner

import layersurgery as ls
from layersurgery.errors import LayerSurgeryWarning
from layersurgery.runs.model_fingerprint import model_fingerprint
from tests.support.tiny_checkpoint import checkpoint, tiny_tokenizer
from tests.support.zoo import DEPTH, tiny_model, tokens

STORY = "Once upon a time there was a small model. " * 12
SIZE: dict[str, Any] = {"tokens": 96, "context": 24, "batch_size": 2}
WORDS = ["--tokens", "96", "--context", "24", "--batch-size", "2", "--device", "cpu", "-q"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("place")
    checkpoint(directory / "tiny")
    (directory / "story.txt").write_text(STORY)
    return directory


def command(*words: Any) -> str:
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == 0, found.stderr
    return found.stdout


def same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.glob("*.parquet"))
    assert names
    assert names == sorted(path.name for path in other.glob("*.parquet"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert ls.read_results(one).attrs["run"]["arguments"] == ls.read_results(other).attrs["run"]["arguments"]


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (["sweep"], lambda *given, **options: ls.sweep(given[0], "swap,drop", given[1], **options)),
        (["stages"], lambda *given, **options: ls.analyses.stages(*given, **options)),
        (["analyze", "lens"], lambda *given, **options: ls.analyses.lens(*given, **options)),
        (["rank"], lambda *given, **options: ls.rank(*given, **options)),
    ],
    ids=["sweep", "stages", "lens", "rank"],
)
def test_python_writes_the_commands_files(place: Path, tmp_path: Path, words: list[str], call: Any) -> None:
    command(*words, place / "tiny", "--data", place / "story.txt", *WORDS, "-o", tmp_path / "command")
    frame = call(str(place / "tiny"), str(place / "story.txt"), directory=tmp_path / "python", device="cpu", **SIZE)
    same_files(tmp_path / "command", tmp_path / "python")
    pd.testing.assert_frame_equal(frame, ls.read_results(tmp_path / "command"))


def test_neurons_and_pruning_too(place: Path, tmp_path: Path) -> None:
    command("analyze", "neurons", place / "tiny", "-q", "--device", "cpu", "-o", tmp_path / "command")
    ls.analyses.neurons(str(place / "tiny"), directory=tmp_path / "python", device="cpu")
    same_files(tmp_path / "command", tmp_path / "python")
    asked = ["--remove", 2, "--greedy", "--data", place / "story.txt", *WORDS]
    command("prune", place / "tiny", *asked, "-o", tmp_path / "cut")
    found = ls.prune(
        str(place / "tiny"),
        place / "story.txt",
        remove=2,
        greedy=True,
        output=tmp_path / "cut2",
        device="cpu",
        **SIZE,
    )
    for step in ("rank", "step-01", "step-02", "costs"):
        same_files(tmp_path / "cut-results" / step, tmp_path / "cut2-results" / step)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "cut2")]
    assert weights[0] == weights[1]
    assert found.written is not None
    assert found.written.path == tmp_path / "cut2"


def test_an_interrupted_sweep_resumes_from_python(place: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"directory": tmp_path / "out", "device": "cpu", **SIZE}
    seen: list[int] = []

    def stop(done: int, _total: int) -> None:
        seen.append(done)
        if done > 2:  # the first batch of two is stored
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="run the same command again to resume"):
        ls.sweep(str(place / "tiny"), "drop", place / "story.txt", progress=stop, **asked)
    begun: list[int] = []
    frame = ls.sweep(
        str(place / "tiny"), "drop", place / "story.txt", progress=lambda done, _: begun.append(done), **asked
    )
    assert begun[0] >= 2
    whole = ls.sweep(str(place / "tiny"), "drop", place / "story.txt", device="cpu", **SIZE)
    pd.testing.assert_frame_equal(frame, whole, check_exact=True)
    with pytest.raises(ls.OutputError, match="with other arguments: edits"):
        ls.sweep(str(place / "tiny"), "swap", place / "story.txt", **asked)
    assert set(ls.sweep(str(place / "tiny"), "swap", place / "story.txt", overwrite=True, **asked).edit) == {
        "none",
        "swap",
    }


def test_a_loaded_model_resumes_only_with_its_own_weights(tmp_path: Path) -> None:
    model = tiny_model("llama")
    first = ls.sweep(model, "drop", tokens(), directory=tmp_path / "out")
    pd.testing.assert_frame_equal(ls.sweep(model, "drop", tokens(), directory=tmp_path / "out"), first)
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1
    with pytest.raises(ls.OutputError, match="model weights"):
        ls.sweep(model, "drop", tokens(), directory=tmp_path / "out")


def test_every_form_of_text_gives_the_same_numbers(place: Path, tmp_path: Path) -> None:
    model, tokenizer = ls.load(place / "tiny")
    texts = ["A small model.", "Once upon a time there was one.", "It was measured."]
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(texts))
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    forms: dict[str, Any] = {
        "strings": {"text": texts, "tokenizer": tokenizer},
        "output": {"text": encoded},
        "mask": {"text": encoded["input_ids"], "attention_mask": encoded["attention_mask"]},
        "lists": {"text": encoded["input_ids"].tolist(), "attention_mask": encoded["attention_mask"].tolist()},
        "not padded": {"text": tokenizer(texts)},
        "arrays": {"text": tokenizer(texts, padding=True, return_tensors="np")},
        "padding that no vocabulary has": {
            "text": encoded["input_ids"].where(encoded["attention_mask"].bool(), -100),
            "attention_mask": encoded["attention_mask"].bool(),
        },
        "tokenized dataset": {"text": datasets.Dataset.from_dict(dict(tokenizer(texts)))},
        "column of a dataset": {"text": datasets.Dataset.from_dict({"body": texts})["body"], "tokenizer": tokenizer},
        "table": {"text": pd.DataFrame({"text": texts}), "tokenizer": tokenizer},
        "tokenized table": {"text": pd.DataFrame(dict(tokenizer(texts)))},
        "dataset": {"text": datasets.Dataset.from_dict({"text": texts}), "pack": False, "tokenizer": tokenizer},
        "column": {
            "text": datasets.Dataset.from_dict({"body": texts}).to_iterable_dataset(),
            "column": "body",
            "pack": False,
            "tokenizer": tokenizer,
        },
        "path": {"text": lines, "lines": True, "tokenizer": str(place / "tiny")},
    }
    frames = {name: ls.sweep(model, "drop", **form) for name, form in forms.items()}
    assert frames["strings"].tokens.iloc[0] == sum(map(len, texts)) - len(texts)
    for name, frame in frames.items():
        pd.testing.assert_frame_equal(frame, frames["strings"], obj=name, check_exact=True)
    similar = [
        ls.compare(model, "drop 2", encoded).kl_nats,
        ls.compare(model, "drop 2", texts, tokenizer=tokenizer).kl_nats,
        frames["path"].set_index("plan").kl_nats["drop 2"],
    ]
    assert similar == pytest.approx([similar[0]] * 3, rel=1e-5)
    assert len(ls.analyses.norms(model, texts, tokenizer=tokenizer)) == DEPTH


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]), {}, "1 of 2 sequences begin or end with the padding token"),
        (torch.randint(3, 90, (1, 65)), {}, "65 tokens, more than the model's 64 positions"),
        (torch.tensor([[5, 128]]), {}, "the text has token 128, but the model's vocabulary has 128 tokens"),
        (torch.tensor([[5.5, 6]]), {}, "token ids are whole numbers, not float32"),
        (torch.tensor([[True, False]]), {}, "token ids are whole numbers, not bool"),
        ([[5, None]], {}, "given as numbers, and these are not"),
        ([{"role": "user", "content": "a message"}], {}, "needs a tokenizer for texts"),
        ([{"role": "user"}, 3], {}, "given as numbers, and these are not"),
        (torch.tensor([[5, 6]], device="meta"), {}, "not as meta or sparse tensors"),
        (torch.tensor([[5, 6]]).to_sparse(), {}, "not as meta or sparse tensors"),
        (b"some text", {}, "not as bytes"),
        (
            pd.DataFrame({"body": ["a"]}),
            {},
            "the table has no column 'text', .* or 'conversation'; it has body",
        ),
        (torch.tensor([[5, 6]]), {"attention_mask": "11"}, "given as numbers, and these are not"),
        (torch.tensor([[5, 6]]), {"attention_mask": [[0.5, 1]]}, "a mask is 1 for a token and 0 for padding"),
        (torch.tensor([[5, 6], [7, 8]]), {"attention_mask": [[1, 1], [1]]}, "a mask has the tokens' shape"),
        (["some text"], {}, "needs a tokenizer for texts"),
        ("a b c", {}, "give texts as a list of strings"),
        (3, {}, "not as int"),
        (torch.tensor([[5, 6]]), {"contxt": 3}, "there is no option 'contxt'; did you mean context?"),
        (torch.tensor([[5, 6]]), {"device": "cpu"}, "`device` is for a model that is loaded by its name"),
    ],
)
def test_text_that_cannot_be_measured(text: Any, options: dict[str, Any], words: str) -> None:
    model = tiny_model("llama", pad_token_id=0)
    for call in (
        lambda: ls.sweep(model, "drop", text, **options),
        lambda: ls.compare(model, "drop 2", text, **options),
        lambda: ls.rank(model, text, **options),
        lambda: ls.analyses.lens(model, text, **options),
        lambda: ls.prune(model, text, remove=1, **options),
    ):
        with pytest.raises(ls.LayerSurgeryError, match=words):
            call()


def test_one_sequence_of_a_tokenizer(place: Path) -> None:
    model, tokenizer = ls.load(place / "tiny")
    expected = ls.sweep(model, "drop", tokenizer(["One text."], return_tensors="pt"))
    pd.testing.assert_frame_equal(ls.sweep(model, "drop", tokenizer("One text.")), expected)


def test_a_vocabulary_of_which_rows_were_removed() -> None:
    model = tiny_model("llama")
    model.resize_token_embeddings(100)
    model.config.vocab_size = 128
    with pytest.raises(ls.SourceError, match="the text has token 120, but the model's vocabulary has 100 tokens"):
        ls.sweep(model, "drop", [[5, 120]])


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[5, 6, 7, 8], [5, 6, 0, 0]], "1 of 2 .* padding token"),
        ([[5, 6, 7, 8], [0, 0, 5, 6]], "1 of 2 .* padding token"),
        ([[5, 6, 7, 0, 0], [5, 6, 0, 0, 0]], "2 of 2 .* padding token"),
        ([[5, 6, 7, 8, 9], [5, 6, 7, 8, 0]], "1 of 2 .* one padding token"),
    ],
)
@pytest.mark.parametrize("known_by", ["config", "generation config", "tokenizer"])
def test_padding_without_a_mask_is_noticed(ids: list[list[int]], words: str, known_by: str) -> None:
    model = tiny_model("llama", pad_token_id=0 if known_by == "config" else None)
    options = {}
    if known_by == "generation config":
        model.generation_config.pad_token_id = 0
    elif known_by == "tokenizer":
        options["tokenizer"] = tiny_tokenizer()
    if "one" in words:
        with pytest.warns(LayerSurgeryWarning, match=words):
            ls.sweep(model, "drop", ids, **options)
    else:
        with pytest.raises(ls.PlanError, match=words):
            ls.sweep(model, "drop", ids, **options)


def test_padding_with_the_token_that_ends_a_text(place: Path) -> None:
    model = tiny_model("llama", pad_token_id=None, eos_token_id=2)
    with pytest.raises(ls.PlanError, match="1 of 2 sequences begin or end with the padding token"):
        ls.sweep(model, "drop", [[5, 6, 7, 2], [5, 2, 2, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.sweep(model, "drop", [[5, 6, 7, 2], [5, 6, 7, 8]])
        ls.sweep(model, "drop", [[2, 2, 5, 6], [2, 2, 7, 8]])


def test_padding_that_is_counted_on_purpose() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    model = tiny_model("llama", pad_token_id=0)
    assert ls.sweep(model, "drop", ids, attention_mask=torch.ones_like(ids)).tokens.iloc[0] == 6


def test_metrics_of_every_token(place: Path, tmp_path: Path) -> None:
    model, tokenizer = ls.load(place / "tiny")
    found = ls.compare(model, "drop 2", ["Once upon a time.", "A model."], tokenizer=tokenizer, per_token=True)
    assert found.positions is not None
    assert "".join(found.positions[found.positions.sequence == 0].token) == "Once upon a time"
    assert found.positions.kl_nats.mean() == pytest.approx(found.kl_nats)
    assert len(found.positions) == found.tokens
    ls.sweep(model, "drop", tokens(), directory=tmp_path / "out", per_token=True)
    rows = ls.read_results(tmp_path / "out", "tokens")
    assert len(rows) == (DEPTH + 1) * 2 * 11 or len(rows) == (DEPTH + 1) * rows[rows.row == 0].shape[0]
    assert len(ls.read_results(tmp_path / "out", "sequences"))


def test_two_checkpoints_are_compared(place: Path, tmp_path: Path) -> None:
    ls.edit_checkpoint(place / "tiny", "drop 2", tmp_path / "cut")
    by_path = ls.compare(
        str(place / "tiny"), tmp_path / "cut", place / "story.txt", device="cpu", tokens=48, context=24
    )
    by_plan = ls.compare(str(place / "tiny"), "drop 2", place / "story.txt", device="cpu", tokens=48, context=24)
    assert by_path.kl_nats == pytest.approx(by_plan.kl_nats, abs=1e-6)
    rows = tmp_path / "rows.csv"
    said = command(
        "compare", place / "tiny", tmp_path / "cut", "--data", place / "story.txt", "--tokens", 48, "--context", 24,
        "--device", "cpu", "--per-token", rows, "--json",
    )  # fmt: skip
    assert f'"kl_nats": {by_path.kl_nats!r}' in said
    assert len(pd.read_csv(rows)) == by_path.tokens


def test_results_show_themselves_in_a_notebook() -> None:
    model = tiny_model("llama")
    frame = ls.sweep(model, "swap,drop", tokens())
    shown = frame._repr_html_()
    html.parser.HTMLParser().feed(shown)
    assert shown.count("<tr>") == 1 + len(frame)
    assert "linear-gradient" in shown
    assert "data:image/png;base64," in shown
    assert len(frame.plot().axes) == 6
    assert type(frame.to_pandas()) is pd.DataFrame
    assert type(frame[frame.edit == "drop"]) is pd.DataFrame
    assert frame.plot.line(x="layer", y="kl_nats") is not None
    assert list(frame.columns[:3]) == ["name", "layer", "kl_nats"]
    assert "kl_nats" in repr(frame.head(2))
    lens = ls.analyses.lens(model, tokens())
    assert "top token, %" in lens._repr_html_()
    assert len(lens.plot().axes) >= 3
    comparison = ls.compare(model, "drop 2", tokens())
    assert "KL from the unedited model" in comparison._repr_html_()
    assert comparison.to_pandas().kl_nats == comparison.kl_nats
    assert np.isfinite(comparison.to_pandas()).all()


def test_an_analysis_by_its_name(place: Path, tmp_path: Path) -> None:
    frame = ls.analyze("norms", str(place / "tiny"), place / "story.txt", directory=tmp_path / "out", **SIZE)
    pd.testing.assert_frame_equal(
        frame, ls.analyses.norms(str(place / "tiny"), place / "story.txt", directory=tmp_path / "out", **SIZE)
    )
    with pytest.raises(ls.PlanError, match="did you mean 'norms'"):
        ls.analyze("norm", str(place / "tiny"), directory=tmp_path / "out")
    with pytest.raises(ls.PlanError, match="give texts, not tokens"):
        ls.analyze("probe", tiny_model("llama"), tokens(), directory=tmp_path / "out")


def test_a_character_is_a_token_here() -> None:
    assert len(tiny_tokenizer()("abc", add_special_tokens=False)["input_ids"]) == 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: ls.sweep(m, "drop", tokens(), per_token=True), "`per_token` writes a file, so it needs directory"),
        (lambda m: ls.sweep(m, "drop", tokens(), schedule="nonsense"), "`schedule` 'nonsense' is unknown"),
        (lambda m: ls.sweep(m, "drop", tokens(), context=5), "`context` is for texts, and token ids are given"),
        (
            lambda m: ls.sweep(m, "drop", tokens(), batch_size=-1),
            "`batch_size` is a whole number of at least 1, not -1",
        ),
        (lambda m: ls.sweep(m, "drop", -tokens()), "token ids are not negative"),
        (lambda m: ls.sweep(m, "drop", ["a", 3]), "a list of texts holds 3"),
        (lambda m: ls.sweep(m, "drop", "pydoc", data="x.txt"), "`data` names a text, and another text is given"),
        (lambda m: ls.sweep(m, "drop", "pydoc", attention_mask=tokens()), "attention_mask is for token ids"),
        (lambda m: ls.sweep(m, "drop", "pydoc", lines=True, tokenizer=tiny_tokenizer()), "`lines` is for text files"),
        (
            lambda m: ls.sweep(m, "drop", "gone.txt", tokenizer=tiny_tokenizer()),
            "gone.txt does not exist on this machine",
        ),
        (
            lambda m: ls.sweep(m, "drop", datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["a"]}))),
            r"the dataset has no split 'train'; it has test. Name one of them \(`split`\)",
        ),
        (lambda m: ls.sweep(m, "drop", ["a"], split="test"), "`split` is for a dataset of several splits"),
        (lambda m: ls.analyses.lens(m, tokens(), compile=True), "`compile` is for sweep; lens does not take it"),
        (lambda m: ls.analyses.neurons(m, tokens()), "neurons reads the weights alone; give no text"),
        (lambda m: ls.compare(m, "drop 2", tokens(), compile=True), "`compile` is for sweep; compare does not"),
        (lambda m: ls.compare(m, "drop", tokens()), "drop"),
        (lambda m: ls.prune(m, tokens(), remove=1, ids=3), "there is no option 'ids'"),
        (lambda m: ls.analyses.lens(m, tokens(), signals=["norms"]), "there is no option 'signals'"),
        (lambda m: ls.reproduce("/nowhere/model"), "nothing could be measured"),
    ],
)
def test_nothing_is_accepted_and_ignored(
    call: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ls.LayerSurgeryError, match=words):
        call(tiny_model("llama"))


def test_what_is_left_out_is_a_warning_of_ours(place: Path, tmp_path: Path) -> None:
    model, tokenizer = ls.load(place / "tiny")
    with pytest.warns(LayerSurgeryWarning, match=r"documents longer than 8 tokens \(`context`\), .* cut: 1") as caught:
        ls.sweep(model, "drop", ["A long text is cut.", "short"], tokenizer=tokenizer, context=8)
    assert caught[0].filename == __file__
    with pytest.warns(LayerSurgeryWarning, match="the text is too short"):
        ls.sweep(model, "drop", place / "story.txt", tokenizer=tokenizer, tokens=9000, directory=tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LayerSurgeryWarning)
        ls.sweep(model, "drop", ["short", "texts"], tokenizer=tokenizer)


def test_a_loaded_model_of_other_settings_does_not_resume(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ls.sweep(model, "drop", tokens(), directory=tmp_path / "out")
    model.model.norm.variance_epsilon = 10.0
    with pytest.raises(ls.OutputError, match="model weights"):
        ls.sweep(model, "drop", tokens(), directory=tmp_path / "out")
    model.model.norm.variance_epsilon = 1e-6
    ls.sweep(model, "drop", tokens(), directory=tmp_path / "out")


def test_weights_that_are_elsewhere_count_too(place: Path, tmp_path: Path) -> None:
    def away() -> Any:
        return ls.load(place / "tiny", device_map={"": "disk"}, offload_folder=str(tmp_path / "away")).model

    ls.sweep(away(), "drop", tokens(), directory=tmp_path / "out")
    model = away()
    ls.sweep(model, "drop", tokens(), directory=tmp_path / "out")
    down = model.model.layers[2].mlp.down_proj
    down._hf_hook.weights_map = {"weight": 5 * down._hf_hook.weights_map["weight"]}
    with pytest.raises(ls.OutputError, match="model weights"):
        ls.sweep(model, "drop", tokens(), directory=tmp_path / "out")


def test_numbers_of_numpy_are_options(tmp_path: Path) -> None:
    model = tiny_model("llama")
    number: Any = np.int64(2)
    fraction: Any = 2.5
    ls.sweep(model, "drop", tokens(), batch_size=number, directory=tmp_path / "out", layers=np.arange(1, 3))
    assert ls.read_results(tmp_path / "out").attrs["run"]["arguments"]["batch_size"] == 2
    ranks = ls.rank(model, tokens(), spans=number)
    pruning = ls.prune(model, tokens(), remove=number)
    assert str(pruning.plan) == str(ls.drop(*sorted(ranks.sort_values("kl_rank").layer.head(number))))
    for call in (lambda: ls.rank(model, tokens(), spans=fraction), lambda: ls.prune(model, tokens(), remove=fraction)):
        with pytest.raises(ls.PlanError, match="is given as a whole number, not as"):
            call()


def test_a_model_that_was_saved_is_still_the_model_of_its_run(tmp_path: Path) -> None:
    """Saving gives the model another name; weights and settings count."""
    model = tiny_model("llama")
    before = model_fingerprint(model)
    ls.save(model, tmp_path / "saved")
    assert model_fingerprint(model) == before
    next(model.parameters()).data[0, 0] += 1
    assert model_fingerprint(model) != before
