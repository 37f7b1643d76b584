"""End the processes that a test process started, once that process is gone, however it ended.

Run by `watch` as a program of its own, which outlives a test process that is killed. Children, and children of
children, are found by a variable in their environment, so that it does not matter who started them or in which
process group they are.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import psutil

NAME = "STARTED_BY_TEST_PROCESS"


def watch() -> None:
    """Mark all processes that this one starts from now on, and have them ended after it."""
    environment = {name: value for name, value in os.environ.items() if name != NAME}
    mark = os.environ[NAME] = f"{os.getpid()} {time.time()}"
    subprocess.Popen(
        [sys.executable, __file__, str(os.getpid()), mark],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C does not end it first
    )


def marked(mark: str) -> list[psutil.Process]:
    """Return the processes that were started with this mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(NAME) == mark:
                found.append(process)
    return found


def end_tree(pid: int) -> None:
    """Kill a process and everything that it started."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                one.kill()


if __name__ == "__main__":
    parent, mark = int(sys.argv[1]), sys.argv[2]
    while os.getppid() == parent:
        time.sleep(0.5)
    for _ in range(20):  # more than once, since a launcher may start others while it is ended
        for process in marked(mark):
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)
