"""A test process that is killed leaves no process behind."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
# The one that is left is in a process group of its own, as a launcher's workers are, and its parent has ended.
_START = """
import subprocess, sys, time
from tests.support import end_children
end_children.watch()
sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
start = f"import subprocess; print(subprocess.Popen({sleep}, start_new_session=True).pid)"
subprocess.run([sys.executable, "-c", start])
time.sleep(60)
"""


def test_what_a_killed_process_started_is_ended() -> None:
    command = [sys.executable, "-u", "-c", _START]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = psutil.Process(int(process.stdout.readline()))
        assert left.is_running()
        process.kill()
        deadline = time.monotonic() + 100  # other tests run at the same time
        with suppress(psutil.NoSuchProcess):
            while left.is_running() and left.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline
                time.sleep(0.05)
