"""Fixtures and settings that all tests share. No test uses the network."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support import end_children

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Some tests start Python, which takes four times as long where it must compile torch and transformers each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# No deadline per example, since other tests run at the same time.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


def pytest_configure(config: pytest.Config) -> None:
    """Prepare each process that runs tests, and leave the one that hands them out without torch."""
    end_children.watch()
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import torch

    if not torch.cuda.is_available():
        # Set before Triton is first imported, since Triton reads this at import.
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> None:
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The models are tiny, so threads only slow them down, and pytest-xdist uses all cores.
    torch.set_num_threads(1)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Save a tiny llama checkpoint in one file."""
    from tests.support.zoo import tiny_model

    tiny_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Save a tiny llama checkpoint in several files, with an index."""
    from tests.support.zoo import tiny_model

    tiny_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path / "sharded"


@pytest.fixture
def small(tmp_path: Path) -> list[Any]:
    """Return the arguments of a sweep of a tiny checkpoint on two contexts of text; the output is "out"."""
    from tests.support.tiny_checkpoint import checkpoint

    (tmp_path / "text.txt").write_text("Once upon a time. " * 20)
    return [
        "sweep",
        checkpoint(tmp_path / "tiny"),
        "--data",
        tmp_path / "text.txt",
        "-n",
        60,
        "--context",
        30,
        "-o",
        tmp_path / "out",
    ]
