"""Evaluate edited models with EleutherAI's lm-eval, in memory and as a checkpoint, on a custom task that needs no Hub.

Run it with: python examples/07_lm_eval.py    (needs `pip install lm-eval`)
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import layersurgery as ls

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Austria": "Vienna", "Greece": "Athens",
    "Japan": "Tokyo", "Egypt": "Cairo", "Russia": "Moscow", "Portugal": "Lisbon", "Ireland": "Dublin", "Cuba": "Havana",
}  # fmt: skip
logging.disable(logging.WARNING)


def write_task(directory: Path) -> TaskManager:
    """Write a multiple-choice task over the capitals; the answer is the choice with the highest probability."""
    rows = [{"country": country, "capital": index} for index, country in enumerate(CAPITALS)]
    (directory / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    task = f"""
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/capitals.jsonl}}, cache_dir: {directory}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_target: capital
doc_to_choice: {json.dumps(list(CAPITALS.values()))}
metric_list: [{{metric: acc}}]
"""
    (directory / "capitals.yaml").write_text(task, "utf-8")
    return TaskManager(include_path=str(directory), include_defaults=False)


with TemporaryDirectory() as directory:
    tasks = write_task(Path(directory))

    def accuracy(lm: HFLM) -> float:
        """Return the accuracy of the model on the task."""
        results = simple_evaluate(lm, tasks=["capitals"], task_manager=tasks, bootstrap_iters=0)
        return float(results["results"]["capitals"]["acc,none"])

    # In memory: inside `operate` the model is an ordinary model, so no file is needed to evaluate an edit.
    model, tokenizer = ls.load("smollm2-135m")
    in_memory = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=12)
    print(f"unedited          {accuracy(in_memory):.2f}")
    for plan in ("drop 20", "swap 12 13", "drop 12:18", "drop 0"):
        with ls.operate(model, plan):
            print(f"{plan:17} {accuracy(in_memory):.2f}")

    # As a checkpoint: lm-eval does not need layersurgery for this.
    # `lm_eval --model hf --model_args pretrained=DIR` would do the same.
    out = ls.edit_checkpoint("smollm2-135m", "drop 12:18", Path(directory) / "edited").path
    print(f"drop 12:18 saved  {accuracy(HFLM(pretrained=str(out), batch_size=12, device='cpu')):.2f}")
