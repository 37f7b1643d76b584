"""The metrics of tasks are those of lm-eval on the edited model."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import processors

import layersurgery as ls
from layersurgery.metrics.aggregation import SequenceSums
from layersurgery.metrics.reference import METRICS
from layersurgery.plans.variants import variants
from layersurgery.runs.sweep import SweepMeasurement
from layersurgery.tasks.harness import Harness
from layersurgery.tasks.request_text import Request, RequestText
from layersurgery.tasks.task_request import TaskRequest
from layersurgery.tasks.task_tables import task_columns
from tests.cli.test_cli import run
from tests.support.demo_model import make_tokenizer
from tests.support.task_definitions import CITIES, write_definitions
from tests.support.tiny_checkpoint import checkpoint, tiny_tokenizer
from tests.support.zoo import DEPTH, tiny_model

NAMES = ["choice", "unconditional", "completion", "rolling"]
EDITS = ["drop 2", "swap 1 3", "skip-mlp 4"]


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    write_definitions(directory)
    return directory


def theirs(model: Any, tokenizer: Any, names: list[str], definitions: Path, **options: Any) -> dict[str, float]:
    """What lm-eval says about a model, by the names of our columns."""
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=names,
        task_manager=TaskManager(include_path=str(definitions), include_defaults=False),
        bootstrap_iters=10,
        **options,
    )
    return {
        f"task_{task}_{key.partition(',')[0].replace('_stderr', '_sem')}": value
        for task, scores in found["results"].items()
        for key, value in scores.items()
        # Resampled, so it differs from call to call.
        if "," in key and isinstance(value, float | int) and not key.startswith("perplexity_stderr")
    }


def bos_tokenizer() -> Any:
    """A tokenizer that begins every text with its first token."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


QUICK = ["llama", "bloom", "mamba"]
OTHERS = ["gpt2", "gemma3_text", "gpt_neox", "opt", "qwen2", "falcon-alibi", "mixtral"]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_the_numbers_are_those_of_lm_eval_on_the_edited_model(name: str, definitions: Path) -> None:
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    check(model, tokenizer, EDITS[:2] if name == "mamba" else EDITS, definitions)


@pytest.mark.parametrize("tokenizer", [bos_tokenizer, make_tokenizer])
def test_with_tokenizers_that_add_a_token_or_join_bytes(tokenizer: Any, definitions: Path) -> None:
    check(tiny_model("llama", vocab_size=600), tokenizer(), EDITS[:1], definitions)


def check(model: Any, tokenizer: Any, edits: list[str], definitions: Path) -> None:
    """Compare every task of the unedited and the edited models with lm-eval."""
    frame = ls.sweep(model, edits, tasks=NAMES, task_path=definitions, tokenizer=tokenizer, batch_size=5)
    before = theirs(model, tokenizer, NAMES, definitions)
    for number, plan in enumerate(["", *edits]):
        row = frame.iloc[number]
        if plan:
            with ls.operate(model, plan):
                expected = theirs(model, tokenizer, NAMES, definitions)
        else:
            expected = before
        assert len(expected) >= 12
        for column, value in expected.items():
            assert row[column] == pytest.approx(value, rel=2e-5, abs=1e-12), (plan, column)
            if "acc" in column:
                assert row[column] == value
                if not column.endswith("_sem"):
                    assert row[f"{column}_change"] == pytest.approx(value - before[column], abs=1e-12)
    assert frame.task_choice_acc_change_sem[0] == 0
    assert "task_rolling_byte_perplexity_change" not in frame  # it is not a mean over documents


def test_examples_and_a_limit(definitions: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    frame = ls.sweep(model, "drop 2", tasks="shots", limit=4, shots=2, task_path=[definitions], tokenizer=tokenizer)
    with ls.operate(model, "drop 2"):
        expected = theirs(model, tokenizer, ["shots"], definitions, limit=4, num_fewshot=2)
    assert {column: frame[column][1] for column in expected} == expected
    assert frame.sequences[0] == 4 * len(CITIES)


def test_a_run_that_was_interrupted_continues_to_the_same_digits(definitions: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    options: dict[str, Any] = {"tasks": NAMES, "task_path": definitions, "batch_size": 4}
    whole = ls.sweep(path, EDITS, directory=tmp_path / "whole", **options)

    def stop(done: int, _total: int) -> None:
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="run the same command again to resume"):
        ls.sweep(path, EDITS, directory=tmp_path / "run", progress=stop, **options)
    resumed = ls.sweep(path, EDITS, directory=tmp_path / "run", **options)
    assert resumed.drop(columns="task_completion_perplexity_sem").equals(
        whole.drop(columns="task_completion_perplexity_sem")  # lm-eval resamples
    )
    assert resumed.attrs["run"]["contexts"] == "shared"
    with pytest.raises(ls.OutputError, match="other arguments|limit"):
        ls.sweep(path, EDITS, directory=tmp_path / "run", limit=2, **options)
    table = ls.read_results(tmp_path / "run", "requests")
    assert len(table) == 4 * (6 * 6 + 6 * 6 + 6 + 6)
    means = table[table.task == "completion"].groupby("row").log_likelihood.mean()
    assert np.allclose(np.exp(-means), resumed.task_completion_perplexity)
    choices = table[(table.task == "choice") & (table.row == 1)].log_likelihood.to_numpy().reshape(6, 6)
    assert (choices.argmax(-1) == np.arange(6)).mean() == resumed.task_choice_acc[1]


def test_on_the_command_line(definitions: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    asked = ["sweep", path, "--edits", "drop", "--tasks", "choice,completion", "--task-path", definitions]
    shown = run(*asked, "-o", tmp_path / "run")
    assert shown.exit_code == 0, shown.output
    assert "choice_acc" in shown.stdout
    assert "Contexts that several requests share were run once" in shown.output
    said = " ".join(shown.stderr.split())
    assert "42 requests of choice, completion, " in said
    assert "of memory for 42 requests at once" in said
    value = json.loads(run(*asked, "-o", tmp_path / "run", "--json").stdout)  # lm-eval prints nothing in between
    assert len(value["results"]) == 7
    assert value["results"][1]["task_completion_perplexity_sem"] > 0
    assert os.environ.get("DISABLE_MULTIPROC") is None
    unknown = run(*asked[:4], "--limit", 3)
    assert (unknown.exit_code, "--limit has an effect only with --tasks" in unknown.stderr) == (2, True)


def test_each_different_request_is_a_sequence_and_the_longest_is_first() -> None:
    requests = [Request((1, 2), (3,)), Request((4,), (5, 6, 7)), Request((1, 2), (3,)), Request((1,), (2, 3))]
    text = RequestText.of(requests)
    assert text.mask.sum(-1).tolist() == [4, 3, 3]
    assert text.sequence_of == (1, 0, 1, 2)
    assert text.scored.int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 0], [0, 1, 1, 0]]


def test_a_request_may_have_one_token_more_than_the_model_has_positions(definitions: Path) -> None:
    model, tokenizer = tiny_model("gpt2", max_position_embeddings=16), tiny_tokenizer()
    frame = ls.sweep(model, "drop 2", tasks="choice,rolling", task_path=definitions, tokenizer=tokenizer)
    with ls.operate(model, "drop 2"):
        expected = theirs(model, tokenizer, ["choice", "rolling"], definitions)
    for column, value in expected.items():
        assert frame[column][1] == pytest.approx(value, rel=2e-5), column


def test_other_processes_measure_the_requests_without_lm_eval(definitions: Path) -> None:
    request = TaskRequest.of("choice", paths=definitions)
    harness = Harness(request, tiny_model("llama").config, tiny_tokenizer())
    sent = pickle.loads(pickle.dumps(SweepMeasurement(variants("drop 2", DEPTH), harness=harness)))
    assert sent == SweepMeasurement(variants("drop 2", DEPTH))


def test_an_edit_whose_predictions_are_not_finite_has_no_metrics(definitions: Path) -> None:
    request = TaskRequest.of("choice", paths=definitions)
    harness = Harness(request, tiny_model("llama").config, tiny_tokenizer())
    sequences = len(harness.text.ids)
    values = np.zeros((sequences, 2, len(METRICS)))
    values[1, 1] = math.nan
    counts = harness.text.scored.sum(-1).numpy().astype(float)
    columns = task_columns(harness, SequenceSums([*range(sequences)], counts, values, np.zeros((sequences, 0))))
    assert columns.notna().all(axis=1).tolist() == [True, False]
    assert columns.isna().all(axis=1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"tasks": "generation"}, ls.PlanError, "the task generation is of the type generate_until: it generates text"),
        pytest.param(
            {"tasks": "chioce"},
            ls.PlanError,
            "lm-eval has no task 'chioce'; did you mean choice",
            marks=pytest.mark.slow,  # it looks through all tasks of lm-eval
        ),
        ({"tasks": " , "}, ls.PlanError, "no task is named"),
        ({"tasks": "choice", "limit": 0}, ls.PlanError, "`limit` is a whole number of at least 1, not 0"),
        ({"tasks": "choice", "shots": -1}, ls.PlanError, "`shots` is a whole number of at least 0, not -1"),
        ({"tasks": "choice", "until": "kl=2%"}, ls.PlanError, "metrics of a text need a text"),
        ({"limit": 3, "task_path": ()}, ls.PlanError, "`limit` has an effect only with `tasks`"),
        ({"tasks": "choice", "task_path": "nowhere"}, ls.SourceError, "nowhere is not a directory"),
    ],
)
def test_what_is_refused(given: dict[str, Any], kind: type[Exception], words: str, definitions: Path) -> None:
    options = {"task_path": definitions} | given
    with pytest.raises(kind, match=words):
        ls.sweep(tiny_model("llama"), "drop 2", tokenizer=tiny_tokenizer(), **options)


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, definitions: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ls.SourceError, match=r"install it with pip install 'layersurgery\[tasks\]'"):
        ls.sweep(tiny_model("llama"), "drop 2", tasks="choice", tokenizer=tiny_tokenizer(), task_path=definitions)


def test_intervals_are_of_paired_differences(definitions: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    frame = ls.sweep(model, "drop", tasks="choice", task_path=definitions, tokenizer=tokenizer)
    for row in frame.itertuples():
        middle = (row.task_choice_acc_change_low + row.task_choice_acc_change_high) / 2
        assert middle == pytest.approx(row.task_choice_acc_change, abs=1e-12)
        half = (row.task_choice_acc_change_high - row.task_choice_acc_change_low) / 2
        assert half == pytest.approx(2.5705818 * row.task_choice_acc_change_sem, rel=1e-5)  # t of 5 degrees of freedom
    assert not math.isnan(frame.task_choice_acc_change_sem.max())
