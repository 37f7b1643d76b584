"""Define the experiments of the paper's versions: on which models, how each is run, and what it costs.

>>> from layersurgery.reports.paper_experiments import PaperRequest
>>> list(PaperRequest.of("v1").experiments)
['sweep', 'stages', 'subjoiners', 'probe']
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..analyses.analyze import run_analysis
from ..analyses.signal_tables import FROM_TEXT, signal_variants
from ..errors import LayerSurgeryError, PlanError
from ..plans.variants import Variant, variants
from ..registry import ANALYSES
from ..runs.estimate import estimate_run
from ..runs.options import RunOptions
from ..runs.reporter import Reporter
from ..runs.run_directory import Run
from ..runs.session_text import tokenizer_of_run
from ..runs.sweep import run_sweep
from ..sweeps.estimate import Estimate
from ..tasks.task_request import TaskRequest

if TYPE_CHECKING:
    from ..runs.requests import ModelInfo
    from ..runs.session import ModelSession

V1, V3 = VERSIONS = ("v1", "v3")
_V1 = (
    *(f"EleutherAI/pythia-{size}-deduped" for size in ("410m", "1.4b", "2.8b", "6.9b")),
    *(f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")),
    *(f"microsoft/{name}" for name in ("phi-1", "phi-1_5", "phi-2")),
)
MODELS = {
    V1: _V1,
    V3: (
        *_V1,
        *(f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B")),
        *(f"meta-llama/Llama-3.2-{size}" for size in ("1B", "3B")),
    ),
}
"""The models of each version of the paper. Those that v3 adds are second-hand: its text was not at hand."""
TASKS = "lambada_openai,arc_easy,hellaswag"
"""The tasks of the later version."""
NO_TASKS = "none"
_EDITS = "swap,drop,skip-attention,skip-mlp"
_TASK_EDITS = "swap,drop"
_COPIES, _FIRST_COPIED = "copy:1", 10
_MIN_SEARCHED_TOKENS = 1_000_000
SWEEP, STAGES, SUBJOINERS, PROBE = "sweep", "stages", "subjoiners", "probe"
CKA, COPYING, WIC, OF_TASKS = "cka", "copying", "wic", "tasks"
_LATER = "added in v3"
FIGURES = {
    SWEEP: "figures 2, 3, 13-15 of v1",
    STAGES: "figures 1, 4-8, 11, 12 of v1",
    SUBJOINERS: "figure 9 of v1",
    PROBE: "figures 10, 16 of v1",
    CKA: f"CKA between all layers, {_LATER}",
    COPYING: f"entropy of copied layers, {_LATER}",
    WIC: f"Word in Context by layer, {_LATER}",
    OF_TASKS: f"tasks after swaps and drops, {_LATER}",
}
"""What of the paper each experiment draws. The numbers of v3's figures are not known here."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """Define an experiment.

    Attributes:
        name: its name, and that of its directory.
        run: runs it: run(session, directory, overwrite).
        variants: returns the edited models for a depth; None if its cost is not counted.
    """

    name: str
    run: Callable[[ModelSession, Path, bool], Run]
    variants: Callable[[int], list[Variant]] | None = None


@dataclass(frozen=True, slots=True)
class PaperRequest:
    """Request for a version's experiments.

    Attributes:
        version: "v1" or "v3", which has all of v1.
        tasks: the tasks to measure; None for none.
        pairs: the pairs of sentences for Word in Context; None if there are none.
    """

    version: str = V3
    tasks: TaskRequest | None = None
    pairs: str | None = None

    @classmethod
    def of(
        cls,
        paper: str = V3,
        tasks: str | Iterable[str] | None = None,
        limit: int | None = None,
        task_path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
        wic: str | os.PathLike[str] | None = None,
    ) -> PaperRequest:
        """Make it from what the user gives.

        Args:
            paper: the version.
            tasks: tasks of lm-eval, by default those of the paper; "none" for none.
            limit: number of documents of each task; by default all.
            task_path: directories with your own task definitions.
            wic: pairs of sentences for Word in Context, as `layersurgery.analyses.wic` takes them.

        Raises:
            PlanError: there is no such version, or an option is not for it.
            SourceError: a directory of tasks does not exist.
        """
        if paper not in VERSIONS:
            raise PlanError(f"`paper` is a version of the paper, {' or '.join(VERSIONS)}, not {paper!r}")
        later = {"tasks": tasks, "limit": limit, "task_path": task_path or None, "wic": wic}
        given = [name for name, value in later.items() if value is not None]
        if paper == V1:
            if given:
                raise PlanError(f"`{given[0]}` is for an experiment of v3, and v1 is asked for; leave one out")
            return cls(V1)
        if tasks == NO_TASKS:
            if unused := [name for name in ("limit", "task_path") if name in given]:
                raise PlanError(f"`{unused[0]}` has an effect only with `tasks`, which is {NO_TASKS}")
            request = None
        else:
            request = TaskRequest.of(TASKS if tasks is None else tasks, limit, None, task_path)
        return cls(V3, request, None if wic is None else str(wic))

    @property
    def models(self) -> Sequence[str]:
        """Return the models of this version."""
        return MODELS[self.version]

    @property
    def experiments(self) -> dict[str, Experiment]:
        """Return the experiments by name, in the order in which they are run."""
        listed = [
            Experiment(SWEEP, _sweep(_EDITS), lambda depth: variants([_EDITS], depth)),
            Experiment(STAGES, _analysis(STAGES), lambda depth: signal_variants(FROM_TEXT, depth)),
        ]
        if self.version == V3:
            listed += [
                Experiment(CKA, _analysis(CKA), lambda depth: signal_variants(ANALYSES[CKA].signals, depth)),
                Experiment(
                    COPYING,
                    lambda session, directory, overwrite: run_sweep(
                        session, directory, [_COPIES], layers=copied_layers(session.model.depth), overwrite=overwrite
                    ),
                    lambda depth: variants([_COPIES], depth, copied_layers(depth)),
                ),
            ]
        listed += [Experiment(SUBJOINERS, _of_windows(SUBJOINERS)), Experiment(PROBE, _of_windows(PROBE))]
        if self.pairs is not None:
            listed.append(Experiment(WIC, _analysis(WIC, pairs=self.pairs)))
        if (tasks := self.tasks) is not None:
            listed.append(
                Experiment(
                    OF_TASKS,
                    lambda session, directory, overwrite: _sweep(_TASK_EDITS)(
                        session.with_tasks(tasks), directory, overwrite
                    ),
                )
            )
        return {experiment.name: experiment for experiment in listed}

    @property
    def left_out(self) -> dict[str, str]:
        """Return why experiments of this version are not asked for, by their names."""
        if self.version == V1:
            return {}
        reasons = {
            WIC: "give the pairs of sentences (wic)" if self.pairs is None else "",
            OF_TASKS: "" if self.tasks else f"tasks is {NO_TASKS}",
        }
        return {name: reason for name, reason in reasons.items() if reason}


def _sweep(edits: str) -> Callable[[ModelSession, Path, bool], Run]:
    return lambda session, directory, overwrite: run_sweep(session, directory, [edits], overwrite=overwrite)


def _analysis(name: str, **options: Any) -> Callable[[ModelSession, Path, bool], Run]:
    return lambda session, directory, overwrite: run_analysis(session, name, directory, overwrite=overwrite, **options)


def _of_windows(name: str) -> Callable[[ModelSession, Path, bool], Run]:
    def run(session: ModelSession, directory: Path, overwrite: bool) -> Run:
        # These analyses search much text for windows, but run the model only on the windows.
        searched = max(session.texts.request.tokens, _MIN_SEARCHED_TOKENS)
        return run_analysis(session, name, directory, overwrite=overwrite, searched_tokens=searched)

    return run


def copied_layers(depth: int) -> range:
    """Return the blocks of which the first ones are copied, one more at a time.

    The authors' script begins at block 10 unless it is told otherwise. With fewer than 30 blocks, it is a third of the
    depth here, so that ranges of several lengths remain.

    Example:
        >>> from layersurgery.reports.paper_experiments import copied_layers
        >>> copied_layers(12), copied_layers(48)
        (range(4, 12), range(10, 48))
    """
    return range(min(_FIRST_COPIED, depth // 3), depth)


def paper_options(model: str, options: RunOptions) -> RunOptions:
    """Return the options of a model's runs: the paper puts the beginning-of-text token before every sequence."""
    return replace(options, bos=True) if model in MODELS[V3] and options.bos == "auto" else options


def give_first_token(session: ModelSession) -> None:
    """Let the end-of-text token of a paper's model begin sequences if its tokenizer has no other (Qwen).

    TransformerLens, which the authors use, does the same.
    """
    if session.model.given in MODELS[V3] and session.options.bos is True:
        tokenizer = session.texts.tokenizer
        if tokenizer.bos_token_id is None:
            tokenizer.bos_token = tokenizer.eos_token


class TaskCost:
    """Estimate the cost of tasks. lm-eval counts their tokens once, with the first model's tokenizer.

    Args:
        tasks: the tasks.
        reporter: receives what is said.
    """

    def __init__(self, tasks: TaskRequest, reporter: Reporter) -> None:
        self._tasks, self._reporter = tasks, reporter
        self._size: dict[str, Any] = {}
        self.fault = ""

    def estimate(self, model: str, info: ModelInfo, options: RunOptions) -> Estimate | None:
        """Return the cost for a model; None if the tasks cannot be read, and `fault` is then the reason.

        Raises:
            PlanError: a task generates text.
        """
        if not self._size and not self.fault:
            try:
                self._count(info, options)
            except PlanError:
                raise
            except (LayerSurgeryError, OSError) as error:
                self.fault = str(error)
        if self.fault:
            return None
        edits = variants([_TASK_EDITS], info.depth)
        of_tasks = replace(options, data="pydoc", split="train", lines=False, **self._size)
        return estimate_run(model, info, edits, of_tasks, Reporter())[0]

    def _count(self, info: ModelInfo, options: RunOptions) -> None:
        from transformers import AutoConfig

        from ..tasks.harness import Harness

        source = info.source
        tokenizer = tokenizer_of_run(
            source, options.tokenizer, source.label, trust_remote_code=options.trust_remote_code
        )
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
        with self._reporter.status(f"Counting the tokens of {self._tasks}"):
            requests = set(Harness(self._tasks, config, tokenizer).requests)
        # A context that several requests share is run once, where the model allows it.
        contexts = sum(map(len, {request.context for request in requests}))
        answers = sum(len(request.continuation) for request in requests)
        length = max(2, (contexts + answers) // len(requests))
        read = max(1, answers // len(requests))
        self._size = {"tokens": len(requests) * length, "context": length, "read": read}
