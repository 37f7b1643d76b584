"""Read `task:NAME`, a criterion that is a task of lm-eval, and give its requests to a session instead of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..runs.requests import NOT_FOR_TASKS, GivenText
from ..tasks.task_costs import TASK
from ..tasks.task_request import TaskRequest

if TYPE_CHECKING:
    from ..runs.options import RunOptions
    from ..runs.session import ModelSession
    from ..tasks.harness import Harness

NO_RACE = "Note: a race compares KL, so by a task there is none: every edit is measured on all requests"


def is_task(by: str | None) -> bool:
    """Return whether a criterion is a task."""
    return by is not None and by.startswith(TASK)


def given_task(
    by: str | None, limit: Any, shots: Any, task_path: Any, options: RunOptions, *, has_text: bool = False
) -> GivenText | None:
    """Return the requests of the task that a criterion names; None if it names none.

    Args:
        by: the criterion.
        limit: number of documents; all if None.
        shots: number of examples before each document; the task's own number if None.
        task_path: directories with your own task definitions.
        options: options of the measurements.
        has_text: whether a text is given.

    Raises:
        PlanError: no task or several are named, or an option has no effect.
        SourceError: a directory of tasks does not exist.
    """
    if by is None or not is_task(by):
        for name, value in {"limit": limit, "shots": shots, "task_path": task_path or None}.items():
            if value is not None:
                raise PlanError(f"`{name}` has an effect only by task:NAME")
        return None
    name = by.removeprefix(TASK).strip()
    if not name or "," in name:
        found = f", not {name}" if name else ""
        raise PlanError(f"`by` task: needs the name of one task of lm-eval{found}; for example task:arc_easy")
    if has_text:
        raise PlanError("a task is measured instead of a text; give one of them")
    options.refuse(NOT_FOR_TASKS, "has no effect on tasks")
    return GivenText(tasks=TaskRequest.of(name, limit, shots, task_path or ()))


def harness_of(session: ModelSession) -> Harness | None:
    """Return the task of a session; None if it measures a text.

    Raises:
        PlanError: the task does not exist, is a group of tasks, or cannot be measured.
        SourceError: lm-eval is not installed.
    """
    if not session.texts.has_tasks:
        return None
    _ = session.texts.text  # asks lm-eval for the requests
    harness = session.texts.harness
    assert harness is not None
    if len(harness.tasks) != 1:
        raise PlanError(
            f"{session.texts.request.data} is a group of {len(harness.tasks)} tasks; name one of them: "
            f"{', '.join(harness.tasks[:6])}{' ...'[: 4 * (len(harness.tasks) > 6)]}"
        )
    return harness
