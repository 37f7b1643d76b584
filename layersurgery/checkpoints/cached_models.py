"""List the models that are at hand without a download: those of Python packages, and those in the Hub's cache."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from .model_packages import PACKAGED

_PREFIX = "models--"


def hub_cache() -> Path:
    """Return the directory in which huggingface_hub keeps what it has downloaded.

    The rules are those of huggingface_hub, which takes too long to import for the completion of a word.
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expandvars(named)).expanduser()


def packaged_models() -> list[str]:
    """Return the names of the models whose Python packages are installed."""
    return [
        name for name, model in PACKAGED.items() if all(importlib.util.find_spec(module) for module in model.modules)
    ]


def cached_models() -> list[str]:
    """Return the ids of the causal language models in the Hub's cache whose safetensors files are complete, sorted.

    A model belongs to them if a class in its config is for causal language models, or if the config names no class.
    """
    found = []
    for directory in hub_cache().glob(f"{_PREFIX}*"):
        if any(_is_causal(snapshot) for snapshot in directory.glob("snapshots/*")):
            found.append(directory.name.removeprefix(_PREFIX).replace("--", "/"))
    return sorted(found)


def _is_causal(snapshot: Path) -> bool:
    try:
        config = json.loads((snapshot / "config.json").read_bytes())
        classes = config.get("architectures") or ["ForCausalLM"]
        known = any("ForCausalLM" in name or "LMHead" in name or "ForConditionalGeneration" in name for name in classes)
        return known and not config.get("is_encoder_decoder") and _is_complete(snapshot)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):  # no config, or one that is broken
        return False


def _is_complete(snapshot: Path) -> bool:
    index = snapshot / "model.safetensors.index.json"
    if not index.exists():
        return (snapshot / "model.safetensors").exists()
    return all((snapshot / file).exists() for file in set(json.loads(index.read_bytes())["weight_map"].values()))
