"""Keep the state of a training on disk, so that a run that was killed continues."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ..atomic_io import atomic_file
from ..errors import OutputError

RECORD = "healing.json"


class SavedState:
    """Keep the last state of a run in a directory, and refuse that of another run.

    Args:
        directory: its path; created with its record if it does not exist.
        arguments: everything that the digits depend on.
        overwrite: discard the state of another run.

    Raises:
        OutputError: the directory contains another run, or something else.
    """

    def __init__(self, directory: Path, arguments: dict[str, Any], *, overwrite: bool) -> None:
        self.directory = directory
        arguments = json.loads(json.dumps(arguments))
        record = directory / RECORD
        if directory.exists() and not record.exists() and any(directory.iterdir()):
            raise OutputError(
                f"{directory} contains something other than the state of a healing; choose another output"
            )
        if record.exists():
            earlier = json.loads(record.read_text("utf-8"))
            names = [name for name in {**earlier, **arguments} if earlier.get(name) != arguments.get(name)]
            if names and not overwrite:
                raise OutputError(
                    f"{directory} contains the state of a healing with other arguments ({', '.join(names)}). "
                    "Replace it to start again (`overwrite`), or choose another output"
                )
            if names:
                shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_file(record) as partial:
            partial.write_text(json.dumps(arguments, indent=2) + "\n", "utf-8")

    def find(self) -> Path | None:
        """Return the last complete state; None if there is none."""
        states = [path for path in self.directory.iterdir() if re.fullmatch(r"step-\d+", path.name)]
        return max(states, key=lambda path: int(path.name[5:]), default=None)

    def save(self, accelerator: Any, step: int) -> None:
        """Save the state after a step, and remove the one before it once this one is complete."""
        partial = self.directory / f".step-{step}.partial"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            earlier = self.find()
            partial.rename(self.directory / f"step-{step}")
            if earlier is not None:
                shutil.rmtree(earlier)

    def remove(self) -> None:
        """Remove the directory, once the checkpoint is written."""
        shutil.rmtree(self.directory, ignore_errors=True)
