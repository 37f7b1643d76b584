"""Write config and tokenizer of a converted checkpoint so that older programs read the same model.

transformers 5 writes names that its version 4, and programs built on it, do not know. They do not fail, but take
defaults: another base of the rotary embedding, for example. Where both names can stand in one file, both are written.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ..errors import UnsupportedEditError
from ..models.config_fields import Json, sections
from .tensor_index import read_json

# Names of classes in transformers 5, and their names in version 4, which version 5 also knows.
_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def write_both_dialects(directory: Path) -> None:
    """Add the names of transformers 4 to config.json and tokenizer_config.json, as far as they change nothing else."""
    path = directory / "config.json"
    config = read_json(path)
    both = with_older_fields(config)
    if _is_read_alike(config, both):
        _write(path, both)
    path = directory / "tokenizer_config.json"
    if path.is_file():
        _write(path, with_older_tokenizer_fields(read_json(path)))


def with_older_fields(config: Json) -> Json:
    """Return a config with the fields that transformers 4 reads next to those of version 5."""
    config = copy.deepcopy(config)
    for _, fields in list(sections(config, ())):
        if "dtype" in fields:
            fields.setdefault("torch_dtype", fields["dtype"])
        if fields.get("model_type") == "qwen3_moe" and "num_local_experts" in fields:
            fields.setdefault("num_experts", fields["num_local_experts"])
        rope = fields.get("rope_parameters")
        if isinstance(rope, dict):
            for key, value in _older_rope_fields(rope).items():
                fields.setdefault(key, value)
    return config


def _older_rope_fields(rope: Json) -> Json:
    """Return the fields that said in transformers 4 what `rope_parameters` says."""
    older: Json = {}
    local = rope.get("sliding_attention")
    if isinstance(local, dict) and isinstance(rope.get("full_attention"), dict):
        older["rope_local_base_freq"] = local.get("rope_theta")
        rope = rope["full_attention"]
    scaling = dict(rope)
    for key in ("rope_theta", "partial_rotary_factor"):
        if (value := scaling.pop(key, None)) is not None:
            older[key] = value
    kind = scaling.get("rope_type", "default")
    if kind == "longrope":  # version 4 accepts these three keys only
        older["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings")
        scaling = {"type": kind, "short_factor": scaling["short_factor"], "long_factor": scaling["long_factor"]}
    if kind != "default":
        older["rope_scaling"] = scaling
    return {key: value for key, value in older.items() if value is not None}


def with_older_tokenizer_fields(fields: Json) -> Json:
    """Return a tokenizer_config.json that transformers 4 and 5 read."""
    fields = dict(fields)
    if (name := fields.get("tokenizer_class")) in _TOKENIZER_CLASSES:
        fields["tokenizer_class"] = _TOKENIZER_CLASSES[name]
    # A list there stops version 4; both versions read the other name.
    if isinstance(fields.get("extra_special_tokens"), list):
        fields.setdefault("additional_special_tokens", fields.pop("extra_special_tokens"))
    return {key: value for key, value in fields.items() if key not in ("backend", "is_local", "local_files_only")}


def _is_read_alike(config: Json, both: Json) -> bool:
    """Return whether the config class of the installed transformers reads the same from both."""
    from ..models.meta_model import load_hf_config

    added = both.keys() - config.keys()

    def read(value: Json) -> dict[str, Any]:
        fields = {key: item for key, item in load_hf_config(value).to_dict().items() if key not in added}
        if isinstance(rope := fields.get("rope_parameters"), dict):
            rope.pop("type", None)  # the older name of rope_type
        return fields

    try:
        return read(config) == read(both)
    except UnsupportedEditError:  # types that came after version 4 need not accept its names (Gemma 4)
        return False


def _write(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
