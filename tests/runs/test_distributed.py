"""One sweep by several processes: the same files, whoever goes and however many come back."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

import psutil
import pytest

import layersurgery as ls
from layersurgery.runs.distributed import SingleProcess, assign_gpus
from layersurgery.runs.options import RunOptions
from layersurgery.runs.processes import run_on_model
from layersurgery.runs.reporter import Reporter
from tests.cli.test_cli import run
from tests.support.end_children import end_tree
from tests.support.tiny_checkpoint import checkpoint

SEQUENCES = 41
# One thread each: a product's digits depend on how many share it.
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# A launcher that has lost the others waits for them for ten minutes, if not told otherwise.
PATIENCE = ["--rdzv_conf", "timeout=60"]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("team")
    checkpoint(directory / "tiny")
    (directory / "story.txt").write_text(
        "".join(f"Once upon a time there were {number} layers.\n" for number in range(99))
    )
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
        "--tails",
        "--device",
        "cpu",
    ]
    return [str(word) for word in (*given, "-o", place / out, *more)]


# Start processes as a cluster would: each has its rank and the leader's address. One imports torch and forks the rest.
_START = """
import json, os, sys, time
asked = json.loads(sys.argv[1])
import torch
torch.set_num_threads(1)
import layersurgery.runs.sweep, layersurgery.figures.sweeps, layersurgery.runs.runner
import transformers.models.llama.modeling_llama
from layersurgery_cli.__main__ import main
children = []
for rank in range(asked["size"]):
    child = os.fork()
    if child == 0:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(asked["size"]), LOCAL_WORLD_SIZE=str(asked["size"]),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(asked["port"]),
        )
        if rank in asked["elsewhere"]:  # as if on another machine
            os.environ["LOCAL_RANK"] = "0"
            os.chdir(asked["there"])
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{asked['said']}/{rank}.{name}", os.O_CREAT | os.O_WRONLY), number)
        sys.argv = ["layersurgery", *asked["words"]]
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    children.append(child)
if asked["kill"] is not None:
    while not (os.path.exists(asked["journal"]) and len(os.listdir(asked["journal"])) > 1):
        time.sleep(0.005)
    os.kill(children[asked["kill"]], 9)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""


@dataclass(frozen=True)
class Ended:
    codes: list[int]
    out: list[str]
    err: list[str]


@contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """End the process and all that it started, even if the test fails before it has ended by itself."""
    try:
        yield process
    finally:
        end_tree(process.pid)


def start(
    place: Path, said: Path, size: int, given: list[str], *, kill: int | None = None, elsewhere: Path | None = None
) -> Ended:
    """Run a team to its end; `kill` a rank once some batches are measured, or run rank 1 `elsewhere`."""
    journal = Path(given[given.index("-o") + 1]) / "sums.parts"
    asked = {
        "size": size, "port": free_port(), "words": given, "kill": kill, "journal": str(journal), "said": str(said),
        "elsewhere": [1] if elsewhere else [], "there": str(elsewhere),
    }  # fmt: skip
    command = [sys.executable, "-c", _START, json.dumps(asked)]
    with ending(subprocess.Popen(command, cwd=place, env=ENV, stdout=PIPE, stderr=PIPE, text=True)) as process:
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    texts = [[(said / f"{rank}.{name}").read_text() for rank in range(size)] for name in ("out", "err")]
    return Ended(json.loads(stdout.splitlines()[-1]), *texts)


def files(directory: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(directory.iterdir()) if path.is_file() and path.name != "run.json"]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def alone(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    ended = start(place, tmp_path_factory.mktemp("said"), 1, words(place, "alone"))
    assert ended.codes == [0], ended.err
    return files(place / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["stages", "analyze cka"])
def test_two_processes_find_the_stages_of_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def given(out: str) -> list[str]:
        asked = [
            *command.split(),
            "tiny",
            "--data",
            "story.txt",
            "-n",
            200,
            "--context",
            20,
            "-b",
            2,
            "--device",
            "cpu",
            "-o",
            place / f"{asked_for}-{out}",
        ]
        return [str(word) for word in asked]

    asked_for = command.replace(" ", "-")
    ended = start(place, tmp_path, 2, given("2"))
    assert ended.codes == [0, 0], ended.err
    monkeypatch.chdir(place)
    assert run(*given("1")).exit_code == 0
    assert files(place / f"{asked_for}-1") == files(place / f"{asked_for}-2")


@pytest.mark.slow
def test_two_processes_find_how_far_edits_reach(place: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 2):
        (tmp_path / str(size)).mkdir()
        given = words(place, f"reach-{size}", "--propagation", "--edits", "drop,skip-mlp")
        ended = start(place, tmp_path / str(size), size, given)
        assert ended.codes == [0] * size, ended.err
        found.append(files(place / f"reach-{size}"))
    assert "propagation.parquet" in found[0]
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "beside",
    [[], ["--until", "cities=90pt"], ["--data", "story.txt", "-n", 200, "--context", 20, "--per-token"]],
)
def test_two_processes_measure_the_tasks_of_one(
    beside: list[Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "cities.jsonl").write_text('{"city": "Rome"}\n{"city": "Paris"}\n{"city": "Oslo"}\n')
    (place / "cities.yaml").write_text(
        f"task: cities\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {place}/cities.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: a city\ndoc_to_target: ' {{city}}'\n"
        "metric_list: [{metric: acc}]\n"
    )

    def given(out: str) -> list[str]:
        asked = ["sweep", "tiny", "--edits", "drop", "--tasks", "cities", "--task-path", place, "-b", 1, *beside]
        return [str(word) for word in [*asked, "--device", "cpu", "-o", out]]

    name = f"tasks-{len(beside)}"
    ended = start(place, tmp_path, 2, given(f"{name}-2"))
    assert ended.codes == [0, 0], ended.err
    monkeypatch.chdir(place)
    assert run(*given(f"{name}-1")).exit_code == 0
    assert files(place / f"{name}-1") == files(place / f"{name}-2")
    assert (place / f"{name}-1" / "tasks").exists() == ("--data" in beside)


def test_three_processes_give_the_files_of_one(place: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    ended = start(place, tmp_path, 3, words(place, "three", "--json"))
    assert ended.codes == [0, 0, 0], ended.err
    assert files(place / "three") == alone
    assert json.loads(ended.out[0])["batch_size"] == 2
    assert "block calls per batch, 66 without sharing, on 3 processes" in ended.err[0]
    assert ended.out[1:] == ["", ""], "one process speaks"
    assert not [said for said in ended.err[1:] if "edited models" in said or "sequences" in said]


@pytest.mark.slow
def test_processes_stop_where_one_does(place: Path, tmp_path: Path) -> None:
    (tmp_path / "said").mkdir()
    found = []
    for size, name in ((1, "one"), (3, "three")):
        given = [word for word in words(place, name, "--until", "kl=30%") if word != "--per-token"]
        ended = start(place, tmp_path / "said", size, given)
        assert ended.codes == [0] * size, ended.err
        found.append(files(place / name))
    assert found[0] == found[1]
    assert ls.read_results(place / "one").sequences.nunique() > 1


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_those_who_are_left_say_so_and_end(place: Path, alone: dict[str, bytes], tmp_path: Path, lost: int) -> None:
    out = f"lost-{lost}"
    ended = start(place, tmp_path, 3, words(place, out), kill=lost)
    for rank in range(3):
        assert ended.codes[rank] == (-9 if rank == lost else 1), ended.err[rank]
        if rank != lost:
            assert "error: another process of this run has ended" in ended.err[rank]
            assert "Traceback" not in ended.err[rank]
    if lost:
        return
    (tmp_path / "rest").mkdir()
    rest = start(place, tmp_path / "rest", 2, words(place, out))
    assert rest.codes == [0, 0], rest.err
    assert "Resuming from the results measured so far" in rest.err[0]
    assert files(place / out) == alone


@pytest.mark.slow
def test_what_is_wrong_is_said_once_and_nobody_waits(place: Path, tmp_path: Path) -> None:
    ended = start(place, tmp_path, 2, words(place, "wrong", "--data", "nowhere.txt"))
    assert ended.codes == [1, 0]
    assert "error: nowhere.txt does not exist on this machine" in " ".join(ended.err[0].split())
    assert "error" not in ended.err[1]


@pytest.mark.slow
def test_another_checkpoint_on_another_machine(place: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "tiny", rms_norm_eps=1e-3)
    ended = start(place, tmp_path, 2, words(place, "elsewhere"), elsewhere=tmp_path)
    assert ended.codes == [1, 1]
    assert "process 1: tiny in tiny differs from the leading process's checkpoint" in " ".join(ended.err[1].split())
    assert "error: another process of this run has ended" in ended.err[0]
    assert not (place / "elsewhere" / "results.parquet").exists()


def launched(place: Path, out: str, launcher: list[Any]) -> AbstractContextManager[subprocess.Popen[str]]:
    """By the launchers that people use."""
    command = [sys.executable, "-m", *map(str, launcher), "-m", "layersurgery_cli", *words(place, out)]
    return ending(subprocess.Popen(command, cwd=place, env=ENV, stdin=subprocess.DEVNULL, stderr=PIPE, text=True))


def underway(directory: Path) -> None:
    """Wait until some batches are measured."""
    journal, deadline = directory / "sums.parts", time.monotonic() + 200
    while len(list(journal.glob("*.npz"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ranks(launcher: subprocess.Popen[str]) -> Iterator[tuple[int, psutil.Process]]:
    for child in psutil.Process(launcher.pid).children(recursive=True):
        rank = child.environ().get("RANK")
        if rank is not None:
            yield int(rank), child


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_another_number_goes_on(place: Path, alone: dict[str, bytes]) -> None:
    """First by torchrun; then by accelerate's way for several GPUs, which without any computes on the CPU."""
    torchrun = ["torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(), *PATIENCE]
    with launched(place, "killed", torchrun) as process:
        underway(place / "killed")
        dict(ranks(process))[1].kill()
        _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Signal 9" in err
    assert "run the same command again to resume" in " ".join(err.split())
    assert not (place / "killed" / "results.parquet").exists()
    options = {
        "num_processes": 3,
        "num_machines": 1,
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "main_process_port": free_port(),
        "rdzv_conf": PATIENCE[1],
    }
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    with launched(place, "killed", ["accelerate.commands.launch", "--multi_gpu", *given]) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "on 3 processes" in err
    assert "Resuming from the results measured so far" in err
    assert files(place / "killed") == alone


def test_a_leader_that_fails_before_any_work_lets_the_others_end(tmp_path: Path) -> None:
    class Leader(SingleProcess):
        def __init__(self) -> None:
            self.sent: list[Any] = []

        def broadcast(self, value: Any) -> Any:
            self.sent.append(value)
            return value

    group = Leader()
    with pytest.raises(ls.SourceError):
        run_on_model(str(tmp_path / "nowhere"), RunOptions(), lambda _session: None, Reporter(), group)
    assert group.sent == [None]


_CONNECT = """
import datetime
from layersurgery.runs import distributed
distributed._CONNECTING = datetime.timedelta(seconds=2)
distributed.find_process_group(cpu=True)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_whose_launcher_was_killed_end_with_its_remedy(rank: int) -> None:
    lone = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    env = {**ENV, **{name: str(value) for name, value in lone.items()}, "MASTER_PORT": str(free_port())}
    if rank:
        env["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the launcher had the store
    found = subprocess.run([sys.executable, "-c", _CONNECT], env=env, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert "the other processes of this run cannot be reached" in found.stderr
    assert "If their launcher was ended, start all of them again" in found.stderr


def test_work_is_shared_out() -> None:
    class Some(SingleProcess):
        def __init__(self, rank: int, size: int) -> None:
            self.local_rank, self.local_size = rank, size

    assert [list(assign_gpus(Some(rank, 2), 8)) for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [list(assign_gpus(Some(rank, 8), 8)) for rank in range(8)] == [[rank] for rank in range(8)]
    assert list(assign_gpus(SingleProcess(), 0)) == []
    # Too few: they share.
    assert [list(assign_gpus(Some(rank, 4), 2)) for rank in range(4)] == [[0], [1], [0], [1]]
    # One that each process sees, as some clusters do it.
    assert [list(assign_gpus(Some(rank, 8), 1)) for rank in range(8)] == [[0]] * 8
