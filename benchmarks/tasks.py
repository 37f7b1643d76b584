"""Time tasks on every edit: one sweep, and a loop over lm-eval's `simple_evaluate` on the edited models.

The questions are made of Python's help text: which of four sentences follows? Both ways run in this process, on the
same loaded model, and every number that lm-eval gives for an edited model must be the one of the sweep. On a machine
that is busy with other work, compare the CPU times.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import layersurgery as ls
from layersurgery.library_logs import quiet_libraries
from layersurgery.plans.variants import Variant, variants
from layersurgery.tasks.task_tables import column_name

from .timing import append_results, make_table, wide_console

TASK = "pydoc_endings"
METRICS = ("acc", "acc_norm")
_CHOICES, _SEED = 4, 0
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_CHARACTERS = range(40, 200)  # of a sentence; shorter and longer ones are headings and code


def write_task(directory: Path, questions: int, sentences: int) -> None:
    """Write a task of lm-eval with its questions.

    Args:
        directory: where to write.
        questions: number of questions.
        sentences: number of sentences of a context.
    """
    of_topic = [_sentences(topics[name]) for name in sorted(topics)]
    everywhere = [sentence for found in of_topic for sentence in found]
    passages = [
        found[start : start + sentences + 1] for found in of_topic for start in range(0, len(found) - sentences)
    ]
    chance = random.Random(_SEED)
    if len(passages) < questions:
        raise SystemExit(f"Python's help text has {len(passages)} passages for {questions} questions; ask for fewer")
    rows = []
    for *context, right in chance.sample(passages, questions):
        others = chance.sample([sentence for sentence in everywhere if sentence != right], _CHOICES - 1)
        endings = chance.sample([right, *others], _CHOICES)
        rows.append({"context": " ".join(context), "endings": endings, "label": endings.index(right)})
    (directory / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (directory / f"{TASK}.yaml").write_text(
        f"""task: {TASK}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/questions.jsonl}}, cache_dir: {directory}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: label
metric_list: [{", ".join(f"{{metric: {metric}}}" for metric in METRICS)}]
""",
        encoding="utf-8",
    )


def _sentences(text: str) -> list[str]:
    """Return the sentences of a text that are neither very short nor very long."""
    found = (" ".join(sentence.split()) for sentence in _SENTENCE_ENDS.split(text))
    return [sentence for sentence in found if len(sentence) in _CHARACTERS]


def measure(
    name: str,
    edits: str,
    questions: int,
    sentences: int,
    every: int,
    batch_size: int,
    *,
    as_json: bool = False,
    result: str = "tasks",
) -> list[dict[str, Any]]:
    """Time both ways and print them; rows are appended to the results.

    Args:
        name: the model.
        edits: families of edits.
        questions: number of questions.
        sentences: number of sentences before each question.
        every: let lm-eval evaluate each N-th edited model, and estimate the time of all from these.
        batch_size: requests that lm-eval runs at once.
        as_json: print the table on stderr, since stdout is for JSON.
        result: name of the results file.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = ls.load(name)
    console = wide_console(stderr=as_json)
    with TemporaryDirectory(prefix="layersurgery-benchmark-") as temporary:
        directory = Path(temporary)
        write_task(directory, questions, sentences)
        manager = TaskManager(include_path=str(directory), include_defaults=False)

        def evaluate(variant: Variant) -> dict[str, float]:
            with ls.operate(model, variant.route), quiet_libraries():
                lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
                found = simple_evaluate(lm, tasks=[TASK], task_manager=manager, log_samples=False)
            return {metric: found["results"][TASK][f"{metric},none"] for metric in METRICS}

        chosen = variants(edits, model.config.get_text_config(decoder=True).num_hidden_layers)
        frame, sweep_wall, sweep_cpu = _timed(
            lambda: ls.sweep(model, edits, tasks=TASK, task_path=directory, tokenizer=tokenizer)
        )
        assert list(frame.name[1:]) == [variant.name for variant in chosen]
        console.print(f"{len(frame)} models in {sweep_wall:.0f} s by one sweep")
        walls, cpus, different = [], [], []
        for number in range(0, len(chosen), every):
            variant = chosen[number]
            found, wall, cpu = _timed(partial(evaluate, variant))
            walls.append(wall)
            cpus.append(cpu)
            measured = {metric: frame[column_name(TASK, metric)][1 + number] for metric in METRICS}
            if measured != found:
                different.append(f"{variant.name}: lm-eval {found}, sweep {measured}")
            console.print(f"{variant.name} in {wall:.0f} s by simple_evaluate: {found}")
    models = len(frame)
    their_wall, their_cpu = (sum(times) / len(times) * models for times in (walls, cpus))
    row = {
        "model": name, "edits": edits, "questions": questions, "sentences": sentences, "models": models,
        "evaluated": len(walls), "different": len(different), "seconds": sweep_wall, "cpu_seconds": sweep_cpu,
        "lm_eval_seconds": their_wall, "lm_eval_cpu_seconds": their_cpu, "ratio": their_wall / sweep_wall,
        "cpu_ratio": their_cpu / sweep_cpu, "unedited_acc": float(frame[column_name(TASK, "acc")][0]),
        "fault": "; ".join(different[:3]),
    }  # fmt: skip
    estimated = "" if len(walls) == models - 1 else f", estimated from {len(walls)}"
    table = make_table(
        f"{name}, {edits}: {questions} questions of {_CHOICES} choices", "method", "seconds", "x", "CPU seconds", "x"
    )
    table.add_row("layersurgery, one sweep", f"{sweep_wall:.0f}", "", f"{sweep_cpu:.0f}", "")
    table.add_row(
        f"lm-eval, {models} models one by one{estimated}",
        f"{their_wall:.0f}", f"{row['ratio']:.2f}", f"{their_cpu:.0f}", f"{row['cpu_ratio']:.2f}",
    )  # fmt: skip
    console.print(table)
    console.print(
        f"{len(different)} of {len(walls)} edited models have other values of {', '.join(METRICS)}"
        if different
        else f"All {len(walls)} edited models that lm-eval evaluated have the same {' and '.join(METRICS)}"
    )
    console.print(f"Appended to {append_results(result, [row])}")
    return [row]


def _timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what a function returns, its wall time, and its CPU time, which says more on a busy machine."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = function()
    return value, time.perf_counter() - wall, time.process_time() - cpu
