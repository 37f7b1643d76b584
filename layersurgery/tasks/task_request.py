"""Say which tasks of lm-eval to measure.

>>> from layersurgery.tasks.task_request import TaskRequest
>>> TaskRequest.of("arc_easy, hellaswag", limit=200).names
('arc_easy', 'hellaswag')
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PlanError, SourceError
from ..plans.visit import whole_number
from .own_requests import OwnRequests
from .task_precision import TaskTargets


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Request for tasks.

    Attributes:
        names: names of tasks or of groups of tasks of lm-eval.
        limit: number of documents of each task; all if None.
        shots: number of examples before each document; by default the task's own number.
        paths: directories with your own task definitions.
        own: requests of your own.
        until: how precisely the changes of the tasks' metrics are to be known; None to measure all documents.
    """

    names: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    paths: tuple[str, ...] = ()
    own: tuple[OwnRequests, ...] = ()
    until: TaskTargets | None = None

    @classmethod
    def of(
        cls,
        names: str | OwnRequests | Iterable[str | OwnRequests],
        limit: Any = None,
        shots: Any = None,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    ) -> TaskRequest:
        """Make it from names, separated by commas or as a list, and from requests of your own.

        Raises:
            PlanError: no task is named, or a number is out of range.
            SourceError: a directory does not exist.
        """
        listed = names.split(",") if isinstance(names, str) else [names] if isinstance(names, OwnRequests) else [*names]
        own = tuple(each for each in listed if isinstance(each, OwnRequests))
        others = [name for name in listed if not isinstance(name, OwnRequests)]
        if wrong := [name for name in others if not isinstance(name, str)]:
            raise PlanError(
                f"a task is named by text, or is what ls.tasks.requests returns, not {type(wrong[0]).__name__}"
            )
        found = tuple(dict.fromkeys(name.strip() for name in others if name.strip()))
        both = [*found, *(each.name for each in own)]
        if same := next((name for name in both if both.count(name) > 1), None):
            raise PlanError(f"two tasks are called {same}; give your own requests another name")
        if not both:
            raise PlanError("no task is named; name tasks of lm-eval, for example arc_easy,hellaswag")
        numbers: dict[str, Any] = {}
        for name, value, least in (("limit", limit, 1), ("shots", shots, 0)):
            numbers[name] = None if value is None else whole_number(value, f"`{name}`")
            if value is not None and numbers[name] < least:
                raise PlanError(f"`{name}` is a whole number of at least {least}, not {value}")
        directories = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        for directory in directories:
            if not Path(directory).is_dir():
                raise SourceError(f"{directory} is not a directory; give one that holds task definitions (.yaml)")
        return cls(found, numbers["limit"], numbers["shots"], tuple(map(str, directories)), own)

    def __str__(self) -> str:
        return ", ".join((*self.names, *(each.name for each in self.own)))

    def arguments(self) -> dict[str, Any]:
        """Return what the requests depend on, as `run.json` records it; their token ids have a fingerprint, too."""
        own = {each.name: each.fingerprint for each in self.own}
        names = {"tasks": [*self.names, *own], "limit": self.limit, "shots": self.shots}
        order = {} if self.until is None else {"seed": self.until.seed}
        return names | ({"own_requests": own} if own else {}) | order
