"""With layersurgery; `--option compiled` has torch compile the blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import layersurgery as ls

from . import common


def load(task: common.Task) -> Any:
    model = common.load_plain(task)
    return model, ls.anatomy(model)


def measure(loaded: Any, task: common.Task, *, compiled: bool) -> common.Rows:
    model, anatomy = loaded
    plans = [edit.plan for edit in task.edits]
    frame = ls.sweep(model, plans, task.tokens, batch_size=task.at_once, anatomy=anatomy, compiled=compiled)
    return [row for row in frame[["plan", *common.METRICS]].to_dict("records") if row["plan"]]


if __name__ == "__main__":
    options = common.arguments().parse_args().option
    common.main("layersurgery", load, partial(measure, compiled="compiled" in options))
