"""Choose the files next to the weights that an edited checkpoint keeps, and renumber the layers that they name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..models.config_fields import DEPTH_FIELDS
from ..models.config_rewrite import rewrite
from ..plans.route import Route
from .checkpoint import Checkpoint
from .quantization import renumber_settings
from .safetensors_header import refuse_pointer
from .sources import COPIED_FILES
from .tensor_index import INDEX, SINGLE, read_json

# Files other than config.json that name layers in their quantization settings.
_QUANTIZATION_FILES = frozenset(("quantize_config.json", "quant_config.json", "hf_quant_config.json"))
# Configs in the format of another program, with the depth and perhaps per-layer fields.
_OTHER_CONFIGS = frozenset(("params.json",))
_WRITTEN_ANEW = frozenset(("config.json", SINGLE, INDEX, "README.md"))
# Files of words and settings that have nothing to do with layers, and of which some are large.
_NO_LAYERS = re.compile(r".*token.*|vocab.*|generation_config.*|.*processor_config.*|chat_template.*|merges.*")


def plan_other_files(
    checkpoint: Checkpoint, route: Route, positions: Mapping[int, list[int]]
) -> tuple[dict[Path, Any], list[str]]:
    """Choose the other files of the model: tokenizer, templates, generation config, license, custom code.

    Args:
        checkpoint: the source.
        route: the source's blocks in their new order.
        positions: the positions in the new model of each block that is kept.

    Returns:
        The files by their path in the directory, with their new content as JSON, or None for a copy; and the names of
        files that describe layers of the source in an unknown format, which the output must not have.

    Raises:
        SourceError: a file that must be changed is not a JSON object, or a file is a pointer of git-lfs.
        UnsupportedEditError: a file names layers in a way that cannot be renumbered.
    """
    root = checkpoint.source.directory
    same_order = route.blocks == tuple(range(checkpoint.depth))
    list_name = checkpoint.block_prefix.prefix.rpartition(".")[2]
    names_layers = re.compile(
        rf"(?<!\w){re.escape(list_name)}\.\d+[.\"']|\b({'|'.join(DEPTH_FIELDS)})[\"']?\s*:\s*{checkpoint.depth}\b"
        "|layer_range"
    )
    files: dict[Path, Any] = {}
    left_out: list[str] = []
    for pattern in COPIED_FILES:
        for path in sorted(root.glob(pattern)):
            relative = path.relative_to(root)
            name = path.name
            if not path.is_file() or relative in files or name in _WRITTEN_ANEW or name.endswith(".index.json"):
                continue
            refuse_pointer(path)
            if same_order or path.suffix not in (".json", ".yaml") or _NO_LAYERS.fullmatch(name):
                files[relative] = None
            elif name in _QUANTIZATION_FILES:
                files[relative] = renumber_settings(read_json(path), checkpoint, positions)
            elif name in _OTHER_CONFIGS:
                section = replace(checkpoint.section, path=(), depth_fields=DEPTH_FIELDS)
                files[relative] = rewrite(read_json(path), section, route)
            elif names_layers.search(path.read_text("utf-8", errors="replace")):
                left_out.append(name)
            else:
                files[relative] = None
    return files, left_out
