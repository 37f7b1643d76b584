"""One sweep by several processes: the same files, whoever goes and however many come back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from layersurgery.team import Alone, own_devices, rounds
from tests.tiny_text import checkpoint

SEQUENCES = 41
# One thread each: a product's digits depend on how many share it.
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("team")
    checkpoint(directory / "tiny")
    (directory / "story.txt").write_text("".join(f"Once upon a time there were {number} layers.\n" for number in range(99)))
    return directory


def words(place: Path, out: str, *more: Any) -> list[str]:
    given = [
        "sweep",
        "tiny",
        "--data",
        "story.txt",
        "-n",
        SEQUENCES * 20,
        "--context",
        20,
        "-b",
        2,
        "--per-token",
        "--device",
        "cpu",
    ]
    return [str(word) for word in (*given, "-o", place / out, *more)]


def launch(place: Path, out: str, size: int, *more: Any) -> subprocess.Popen[str]:
    """By torchrun, as on a cluster."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", str(free_port())]
    return started([*run, "-m", "layersurgery_cli", *words(place, out, *more)], place)


def started(command: list[str], place: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=place, env=ENV | env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def by_hand(place: Path, out: str, size: int, **changed: Path) -> list[subprocess.Popen[str]]:
    """Without a launcher that would end the others when one has gone; `rank1=DIR` runs that one elsewhere, as if on another machine."""
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        started(
            [sys.executable, "-m", "layersurgery_cli", *words(place, out)],
            changed.get(f"rank{rank}", place),
            RANK=str(rank),
            LOCAL_RANK="0" if f"rank{rank}" in changed else str(rank),
            **common,
        )
        for rank in range(size)
    ]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "run.json"}


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, bytes]:
    found = subprocess.run(
        [sys.executable, "-m", "layersurgery_cli", *words(place, "alone")], cwd=place, env=ENV, capture_output=True
    )
    assert found.returncode == 0, found.stderr
    return files(place / "alone")


def test_three_processes_give_the_files_of_one(place: Path, alone: dict[str, bytes]) -> None:
    process = launch(place, "three", 3, "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert files(place / "three") == alone
    assert json.loads(out)["batch_size"] == 2, "one process speaks"
    assert err.count("edited models;") == 1
    assert "block calls a batch, 66 without sharing by 3 processes" in err


def accelerate(place: Path, out: str, size: int) -> subprocess.Popen[str]:
    """By accelerate's way for several GPUs, which without any computes on the CPU."""
    options = {
        "num_processes": size,
        "num_machines": 1,
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "main_process_port": free_port(),
    }
    run = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    run += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return started([*run, "-m", "layersurgery_cli", *words(place, out)], place)


def underway(directory: Path) -> None:
    """Wait until some batches are measured."""
    journal, deadline = directory / "progress.journal", time.monotonic() + 200
    while not (journal.exists() and journal.stat().st_size > 3000):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ranks(launcher: subprocess.Popen[str]) -> Iterator[tuple[int, psutil.Process]]:
    for child in psutil.Process(launcher.pid).children(recursive=True):
        rank = child.environ().get("RANK")
        if rank is not None:
            yield int(rank), child


def test_a_killed_process_ends_the_run_and_another_number_goes_on(place: Path, alone: dict[str, bytes]) -> None:
    process = launch(place, "killed", 2)
    underway(place / "killed")
    dict(ranks(process))[1].kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Signal 9" in err
    assert "the same command goes on with it" in err
    assert not (place / "killed" / "results.parquet").exists()
    process = accelerate(place, "killed", 3)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "by 3 processes" in err
    assert "Going on with what is measured already" in err
    assert files(place / "killed") == alone


@pytest.mark.parametrize("lost", [0, 1])
def test_those_who_are_left_say_so_and_end(place: Path, alone: dict[str, bytes], lost: int) -> None:
    out = f"lost-{lost}"
    team = by_hand(place, out, 2)
    underway(place / out)
    team[lost].send_signal(signal.SIGKILL)
    said = [process.communicate(timeout=120)[1] for process in team]
    for rank, process in enumerate(team):
        assert process.returncode == (-signal.SIGKILL if rank == lost else 1), said[rank]
        if rank != lost:
            assert "error: another process of this run has gone" in said[rank]
            assert "Traceback" not in said[rank]
    if lost:
        return  # one way of going on is enough
    rest = subprocess.run(
        [sys.executable, "-m", "layersurgery_cli", *words(place, out)], cwd=place, env=ENV, capture_output=True, text=True
    )
    assert rest.returncode == 0, rest.stderr
    assert "Going on with what is measured already" in rest.stderr
    assert files(place / out) == alone


def test_what_is_wrong_is_said_once_and_nobody_waits(place: Path) -> None:
    begun = time.monotonic()
    process = launch(place, "wrong", 2, "--data", "nowhere.txt")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("error:") == 1
    assert time.monotonic() - begun < 100


def test_another_checkpoint_on_another_machine(place: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "tiny", rms_norm_eps=1e-3)
    team = by_hand(place, "elsewhere", 2, rank1=tmp_path)
    said = [process.communicate(timeout=120)[1] for process in team]
    assert [process.returncode for process in team] == [1, 1]
    assert "process 1: tiny in tiny is another checkpoint than that of the process that leads" in " ".join(said[1].split())
    assert "error: another process of this run has gone" in said[0]
    assert not (place / "elsewhere" / "results.parquet").exists()


def test_work_is_shared_out() -> None:
    assert list(rounds(list(range(7)), 3)) == [[0, 1, 2], [3, 4, 5], [6]]

    class Some(Alone):
        def __init__(self, rank: int, size: int) -> None:
            self.local_rank, self.local_size = rank, size

    assert [list(own_devices(Some(rank, 2), 8)) for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [list(own_devices(Some(rank, 8), 8)) for rank in range(8)] == [[rank] for rank in range(8)]
    assert list(own_devices(Alone(), 0)) == []
    # Too few: they share.
    assert [list(own_devices(Some(rank, 4), 2)) for rank in range(4)] == [[0], [1], [0], [1]]
    # One that each process sees, as some clusters do it.
    assert [list(own_devices(Some(rank, 8), 1)) for rank in range(8)] == [[0]] * 8
