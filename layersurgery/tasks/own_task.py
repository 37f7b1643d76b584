"""Make a task of lm-eval of requests of your own, so that lm-eval tokenizes them and computes their metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from .own_requests import OwnRequests

LOG_LIKELIHOOD, GREEDY = "log_likelihood", "greedy"


def make_task(own: OwnRequests) -> Any:
    """Return a task whose requests are these pairs, and whose metrics are means over its documents."""
    from datasets import Dataset

    documents = [
        {"contexts": each.contexts, "continuations": each.continuations, "correct": each.correct or 0}
        for each in own.documents
    ]
    has_questions = own.has_questions
    of_questions = {
        "output_type": "multiple_choice",
        "doc_to_choice": lambda document: list(document["continuations"]),
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    of_pairs = {"output_type": "loglikelihood", "metric_list": []}
    return _task_class()(
        config={
            "task": own.name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
            "test_split": "test",
            "num_fewshot": 0,
            "target_delimiter": "",
            "doc_to_text": lambda document: document["contexts"][0],
            "doc_to_target": lambda document: document["correct"] if has_questions else document["continuations"][0],
            **(of_questions if has_questions else of_pairs),
        }
    )


@cache
def _task_class() -> type:
    """Return the class of tasks; lm-eval is imported only if it is needed."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_aggregation
    from lm_eval.api.task import ConfigurableTask

    class OwnTask(ConfigurableTask):  # type: ignore[misc]
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config=config)
            for name in (LOG_LIKELIHOOD, GREEDY):
                self._aggregation_list[name] = get_aggregation("mean")
                self._higher_is_better[name] = True

        def construct_requests(self, doc: Mapping[str, Any], ctx: Any, **kwargs: Any) -> list[Any]:  # noqa: ARG002
            """Return the pairs as they were given; lm-eval would use one context for all."""
            pairs = zip(doc["contexts"], doc["continuations"], strict=True)
            return [
                Instance(request_type="loglikelihood", doc=doc, arguments=pair, idx=number, metadata=kwargs["metadata"])
                for number, pair in enumerate(pairs)
            ]

        def process_results(self, doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
            log_likelihood, is_greedy = results[doc["correct"]]
            of_questions = super().process_results(doc, results) if self.OUTPUT_TYPE == "multiple_choice" else {}
            return {**of_questions, LOG_LIKELIHOOD: log_likelihood, GREEDY: float(is_greedy)}

    return OwnTask
