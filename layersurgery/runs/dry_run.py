"""End a dry run at the point where something would be measured or written."""

from __future__ import annotations

from pathlib import Path

NEW, RESUMED, REPLACED, FINISHED = "new", "resumed", "replaced", "finished"
"""What would become of an output: made, continued, replaced, or read since it is finished."""


def state_of_output(output: Path) -> str:
    """Return what would become of an output that the command may write, by what is there now."""
    is_there = output.is_file() or (output.is_dir() and any(output.iterdir()))
    return REPLACED if is_there else NEW


class DryRun(Exception):  # noqa: N818 - no error: everything that can be checked without measuring is right
    """Say what a run would do. It is raised in place of the run, after all checks that need no weights.

    Args:
        model: the model's name.
        text: what would be measured, in words; empty if the run reads no text, or none is known yet.
        output: where would be written.
        state: what would become of the output: `NEW`, `RESUMED`, `REPLACED` or `FINISHED`.
        verb: what would be done with the model.
    """

    def __init__(self, model: str, text: str, output: Path, state: str = NEW, verb: str = "measure") -> None:
        self.model, self.text, self.output, self.state, self.verb = model, text, output, state, verb
        super().__init__(str(self))

    def __str__(self) -> str:
        if self.state == FINISHED:
            return f"{self.output} holds the finished run, which would be used; nothing was measured or written"
        what = f"Would {self.verb} {self.model}{f' on {self.text}' if self.text else ''}"
        then = {
            NEW: f", and write {self.output}",
            RESUMED: f", and resume what is in {self.output}",
            REPLACED: f", and replace {self.output}",
        }[self.state]
        return f"{what}{then}; nothing was measured or written"
