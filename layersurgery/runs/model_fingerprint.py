"""Compute a hash of a loaded model, by which a run that is resumed recognizes it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ..models.quantized import CPU_PACKING, lasting_state
from ..runtime.offload import offload_hooks

# Settings that predictions do not depend on; saving a model changes its name.
_NOT_PREDICTIONS = frozenset(("training", "name_or_path", CPU_PACKING))
_WRITTEN_BY_SAVING = frozenset(("architectures", "dtype", "transformers_version"))


def model_fingerprint(model: nn.Module) -> str:
    """Return a hash of all that a loaded model's predictions depend on.

    These are its modules and their settings, its config, the state of adapters, and its parameters and buffers, also
    those that accelerate keeps elsewhere.
    """
    digest = hashlib.sha256(str(model).encode())
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_json_string"):
        fields = json.loads(config.to_json_string(use_diff=False))
        kept = {name: value for name, value in fields.items() if name not in _WRITTEN_BY_SAVING}
        digest.update(json.dumps(kept, sort_keys=True).encode())
        digest.update(str(getattr(config, "_attn_implementation", "")).encode())
    for path, module in model.named_modules():
        settings: dict[str, Any] = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and name not in _NOT_PREDICTIONS and "cache" not in name
        }
        if hasattr(module, "disable_adapters"):
            settings |= {"off": module.disable_adapters, "active": getattr(module, "active_adapters", None)}
        digest.update(f"{path} {sorted(settings.items(), key=lambda item: item[0])}".encode())
        for hook in offload_hooks(module):
            for name, _ in module.named_parameters(recurse=False):
                if hook.weights_map is not None and name in hook.weights_map:
                    _update(digest, f"{path}.{name}", hook.weights_map[name])
    for name, tensor in lasting_state(model).items():
        if tensor.device.type != "meta":
            _update(digest, name, tensor)
    return digest.hexdigest()[:16]


def _update(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
