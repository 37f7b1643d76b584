"""Start the command line: `layersurgery` and `python -m layersurgery_cli`."""

from __future__ import annotations

import io
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line."""
    # SIGTERM raises SystemExit, so that cleanup runs and no partial output stays.
    signal.signal(signal.SIGTERM, _terminate)
    # Where the output is not UTF-8, as in a file on Windows, a curve's characters must not end the command.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    from .app import app

    app(prog_name="layersurgery")


def _terminate(signum: int, _frame: FrameType | None) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
