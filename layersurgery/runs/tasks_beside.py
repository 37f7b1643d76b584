"""Measure tasks after a text, on the same model and edits, and join both tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError
from ..tasks.task_tables import PREFIX
from .tables import REQUESTS, TASKS, has_tasks_inside, read_results, read_run

if TYPE_CHECKING:
    import pandas as pd

    from .session import Measurement, ModelSession


class TasksBeside:
    """Hold the tasks that a sweep of a text measures after it.

    They are a run of their own, in the directory `tasks` of the sweep's, so they resume by themselves. The sweep is
    finished once the metrics of both are in its table.

    Args:
        session: a session on the tasks.
        measurement: the measurement of the same edits on the tasks.
        directory: the directory of the sweep.

    Raises:
        OutputError: the directory holds another `tasks`.
    """

    def __init__(self, session: ModelSession, measurement: Measurement, directory: Path) -> None:
        self.session, self.measurement, self.directory = session, measurement, directory / TASKS
        if self.directory.exists() and not has_tasks_inside(read_run(directory) or {}):
            raise OutputError(
                f"{self.directory} exists, and the results of the tasks would be written there; choose another output"
            )

    def __reduce__(self) -> Any:
        """Become None in another process, which is sent the measurement of the tasks when it begins."""
        return type(None), ()

    def arguments(self) -> dict[str, Any]:
        """Return what the tasks' metrics depend on, in addition to what those of the text depend on."""
        texts = self.session.texts
        until = {} if texts.targets is None else {"until_of_tasks": texts.targets.record()}
        return {**texts.task_arguments(), "requests": texts.text.fingerprint, **until}

    def join(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Measure the tasks, or resume, and return the table with their metrics; `frame` has a row for each edit."""
        run = self.session.run(self.measurement, self.directory)
        return join_tasks(frame, read_results(run.directory))

    @property
    def files(self) -> list[str]:
        """Return the names of the tasks' files to read with the sweep's, relative to its directory."""
        return [f"{TASKS}/{REQUESTS}"]


def join_tasks(frame: pd.DataFrame, tasks: pd.DataFrame) -> pd.DataFrame:
    """Return the results of a text with the metrics of tasks; both tables have the same edits in the same order."""
    assert list(frame.plan) == list(tasks.plan)
    columns = tasks[[name for name in tasks if str(name).startswith(PREFIX) or name == "documents"]]
    joined = frame.join(columns.reset_index(drop=True))
    if "precise" in tasks:  # an edit is as precise as asked if it is on the text and on the tasks
        precise = tasks.precise if "precise" not in frame else tasks.precise.astype(bool) & frame.precise.astype(bool)
        joined["precise"] = precise.astype(object).where(frame.edit != "none", None)
    joined.attrs = dict(frame.attrs)
    return joined
