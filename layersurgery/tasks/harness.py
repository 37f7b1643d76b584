"""Ask lm-eval for the requests of its tasks, and let it compute the tasks' metrics from measured log-likelihoods.

lm-eval defines the tasks, builds the requests, tokenizes them and computes the metrics; nothing of it is written again
here. A task is evaluated twice: once with a model that only records the token ids that it is asked for, and then, for
every edited model, with one that answers from the measured log-likelihoods.
"""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import PlanError, SourceError
from ..library_logs import quiet_libraries
from .document_order import DocumentOrder
from .own_task import GREEDY, make_task
from .request_text import Answer, Request, RequestText
from .task_request import TaskRequest

_LOGLIKELIHOOD = ("loglikelihood", "multiple_choice", "loglikelihood_rolling")
_SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", GREEDY)
_NO_PROCESSES = "DISABLE_MULTIPROC"  # read by lm-eval
_FEWSHOT_SEED = 1234  # of lm-eval
_RESAMPLES = 1000  # for standard errors that lm-eval has no formula for; its own 100,000 take seconds for each model


class Harness:
    """Hold tasks of lm-eval for one tokenizer.

    Args:
        tasks: the tasks.
        config: the model's config, from which lm-eval reads the largest number of positions.
        tokenizer: the model's tokenizer; it is not changed.

    Attributes:
        requests: the requests of all tasks, in the order in which lm-eval asks them.
        text: the requests as sequences to measure on.
        labels: for each request, the task and the number of its document.
        order: the random order of the documents; None if all of them are measured.

    Raises:
        SourceError: lm-eval is not installed, or does not have the task.
        PlanError: a task generates text.
    """

    def __init__(self, tasks: TaskRequest, config: Any, tokenizer: Any) -> None:
        _, manager_class = _lm_eval()
        self._limit = tasks.limit
        self._lm = _recorder_class()(config, tokenizer)
        with quiet_libraries():
            self._loaded = _load(tasks.names, manager_class, tasks.paths) if tasks.names else {"tasks": {}}
            self._loaded["tasks"] |= {own.name: make_task(own) for own in tasks.own}
            for task in self._loaded["tasks"].values():
                set_shots(task, tasks.shots)
            self._evaluate(log_samples=False)
        self.requests: tuple[Request, ...] = tuple(self._lm.asked)
        self.labels: tuple[tuple[str, int], ...] = tuple(self._lm.labels)
        self.order: DocumentOrder | None = None
        if tasks.until is None:
            self.text = RequestText.of(self.requests)
            return
        self._metrics = {name: self._bounded_metric(name) for name, _ in tasks.until.amounts}
        self._documents = {
            (name, instance.doc_id): instance.doc
            for name in self._metrics
            for instance in self._loaded["tasks"][name].instances
        }
        self.order = DocumentOrder.of(self.labels, tasks.until.seed)
        self.text = RequestText.of(self.requests, [self.requests[number] for number in self.order.requests])

    def __reduce__(self) -> Any:
        """Become None in another process, which measures the requests and computes no metrics."""
        return type(None), ()

    @property
    def tasks(self) -> list[str]:
        """Return the names of the tasks, those of groups by themselves."""
        return list(self._loaded["tasks"])

    def task(self, name: str) -> Any:
        """Return a task, an object of lm-eval."""
        return self._loaded["tasks"][name]

    def evaluate(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        """Compute the metrics of all tasks from answers to the requests, as lm-eval's `evaluate` returns them.

        Args:
            answers: the answers, in the order of `requests`.
        """
        assert len(answers) == len(self.requests)
        self._lm.answer(self.requests, answers)
        with quiet_libraries():
            results: Mapping[str, Any] = self._evaluate(log_samples=True)
        return results

    def complete(self, sequences: int) -> tuple[tuple[str, int], ...]:
        """Return the documents that are known after so many sequences: their tasks and numbers."""
        assert self.order is not None
        return self.order.complete(self.text.sequence_of, sequences)

    def sequences_of(self, task: str, document: int) -> list[int]:
        """Return the sequences of a document's requests."""
        assert self.order is not None
        return [self.text.sequence_of[number] for number in self.order.of_document[task, document]]

    def document_value(self, task: str, document: int, answers: Sequence[Answer]) -> float:
        """Return the first metric of a document, as lm-eval computes it from the answers to its requests."""
        results = [(answer.log_likelihood, answer.is_greedy) for answer in answers]
        metrics = self._loaded["tasks"][task].process_results(self._documents[task, document], results)
        return float(metrics[self._metrics[task]])

    def first_metric(self, task: str) -> str | None:
        """Return the metric that documents are measured until it is known; None if nothing is asked of the task."""
        return None if self.order is None else self._metrics.get(task)

    def aggregate(self, task: str, metric: str, values: Sequence[Any]) -> tuple[float, Any]:
        """Return a metric of some documents, and its standard error, as lm-eval computes them from their values."""
        from lm_eval.api.metrics import stderr_for_metric

        aggregation = self._loaded["tasks"][task].aggregation()[metric]
        error = stderr_for_metric(aggregation, _RESAMPLES) if len(values) > 1 else None
        with quiet_libraries(), _alone_and_silent():
            return float(aggregation(values)), None if error is None else error(values)

    def _bounded_metric(self, name: str) -> str:
        """Return a task's first metric: acc if it has it.

        Raises:
            PlanError: its values are not known to be between 0 and 1, or lm-eval filters answers.
        """
        task = self._loaded["tasks"].get(name)
        if task is None:
            raise PlanError(f"`until`: {name} is a group; name its tasks: {', '.join(self.tasks)}")
        metrics = list(task.aggregation())
        metric = "acc" if "acc" in metrics else metrics[0]
        if metric not in _SHARES or task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise PlanError(
                f"`until`: {name} has the metric {metric}, whose values are not between 0 and 1 for each document; "
                f"leave {name} out of `until`"
            )
        if task.config.filter_list is not None:
            raise PlanError(f"`until`: lm-eval filters the answers to {name}; leave {name} out of `until`")
        return metric

    def _evaluate(self, *, log_samples: bool) -> Any:
        evaluator, _ = _lm_eval()
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # else other examples would be drawn than the last time
        with _alone_and_silent():
            return evaluator.evaluate(
                self._lm, self._loaded, limit=self._limit, log_samples=log_samples, bootstrap_iters=_RESAMPLES
            )


@contextmanager
def _alone_and_silent() -> Iterator[None]:
    """Let lm-eval resample without other processes, and print nothing, while the `with` block runs.

    A process that is forked while torch's threads run may hang.
    """
    before = os.environ.get(_NO_PROCESSES)
    os.environ[_NO_PROCESSES] = "1"
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        if before is None:
            del os.environ[_NO_PROCESSES]
        else:
            os.environ[_NO_PROCESSES] = before


def set_shots(task: Any, shots: int | None) -> None:
    """Set the number of examples before each document, by the rule of lm-eval's `simple_evaluate`.

    A task that says 0 itself keeps it; one that says nothing has 0 if none is given.
    """
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)


def _lm_eval() -> tuple[Any, Any]:
    try:
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SourceError(
            "tasks need lm-eval, which is not installed; install it with pip install 'layersurgery[tasks]'"
        ) from error
    return evaluator, TaskManager


@cache
def _recorder_class() -> type:
    """Return a model of lm-eval that tokenizes as its Hugging Face model does, and answers from a table."""
    from lm_eval.models.huggingface import HFLM

    class Recorder(HFLM):  # type: ignore[misc]
        def __init__(self, config: Any, tokenizer: Any) -> None:
            stand_in = SimpleNamespace(config=config, device=torch.device("cpu"))
            # lm-eval may give a tokenizer a padding token.
            super().__init__(pretrained=stand_in, tokenizer=copy.deepcopy(tokenizer), backend="causal")
            self.asked: list[Request] = []
            self.labels: list[tuple[str, int]] = []
            self._label = ("", 0)
            self._answers: list[Answer] | None = None

        def loglikelihood(self, requests: Any, *_args: Any, **_kwargs: Any) -> Any:
            return self._one_by_one(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: Any, *_args: Any, **_kwargs: Any) -> Any:
            return self._one_by_one(super().loglikelihood_rolling, requests)

        def _one_by_one(self, ask: Callable[..., Any], requests: Any) -> list[Any]:
            """Ask for one request at a time: what is asked for then belongs to its document."""
            answers = []
            for request in requests:
                self._label = (request.task_name, request.doc_id)
                answers += ask([request], disable_tqdm=True)
            return answers

        def answer(self, requests: Iterable[Request], answers: Iterable[Answer]) -> None:
            self.asked, self._answers = list(requests), list(answers)
            self._next = 0

        def _loglikelihood_tokens(self, requests: Any, *_args: Any, **_kwargs: Any) -> list[tuple[float, bool]]:
            asked = [Request(*_fit(context, continuation, self.max_length)) for _, context, continuation in requests]
            if self._answers is None:
                self.asked += asked
                self.labels += [self._label] * len(asked)
                return [(0.0, False)] * len(asked)
            span = slice(self._next, self._next + len(asked))
            assert self.asked[span] == asked, "lm-eval asks for other requests than the first time"
            self._next = span.stop
            return [(answer.log_likelihood, answer.is_greedy) for answer in self._answers[span]]

    return Recorder


def _fit(context: Sequence[int], continuation: Sequence[int], length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cut a request off on its left, as lm-eval does, so that all but its last token fit into the model."""
    kept = (*context, *continuation)[-(length + 1) :]
    return kept[: -len(continuation)], tuple(continuation)


def _load(names: Sequence[str], manager_class: Any, paths: Sequence[str]) -> Any:
    """Load tasks by their names; lm-eval's own definitions are searched only if others do not have them all.

    Raises:
        SourceError: a task's data cannot be loaded.
        PlanError: a task does not exist, or generates text.
    """
    manager = manager_class(include_path=[*paths], include_defaults=False) if paths else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = manager_class(include_path=[*paths] or None)
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; give the directory of its definition as task path"
            raise PlanError(f"lm-eval has no task {name!r}{hint}")
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # a task's own code and the datasets library may raise any exception
        raise SourceError(f"lm-eval cannot load {', '.join(names)}: {type(error).__name__}: {error}") from error
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE not in _LOGLIKELIHOOD:
            raise PlanError(
                f"the task {name} is of the type {task.OUTPUT_TYPE}: it generates text. Tasks of multiple choice and "
                "of log-likelihoods are measured; for others, write the edited checkpoint and give it to lm-eval"
            )
    return loaded
