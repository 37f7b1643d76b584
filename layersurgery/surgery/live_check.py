"""Check whether a model in memory would reload from `save_pretrained` as the same function."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import UnsupportedEditError
from ..models.block_list import find_decoder_blocks, require_model
from ..models.config_fields import Json
from ..models.memory_only import MemoryOnlyModule
from ..models.meta_model import build_meta_model, resolve_section
from ..models.quantized import quantizer_of, undo_cpu_packing
from ..models.reload_check import ReloadCheck, changed_by_forward
from ..models.skipped_branch import SkippedBranch
from ..plans.route import Route
from .cached_state import clear_cached_state


def transformers_model(model: nn.Module) -> Any:
    """Return the transformers model inside wrappers (PEFT, DDP, torch.compile).

    Raises:
        PlanError: this is not a loaded model.
        UnsupportedEditError: the model does not contain one.
    """
    from transformers import PreTrainedModel

    require_model(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UnsupportedEditError(f"{type(model).__name__} contains no transformers model, so there is nothing to reload")


def path_inside(model: nn.Module, path: str | None) -> str | None:
    """Return the path of a list of blocks from the transformers model inside wrappers."""
    inner = transformers_model(model)
    prefix = next(name for name, module in model.named_modules() if module is inner)
    return None if path is None else path.removeprefix(f"{prefix}.")


def config_dict(model: nn.Module) -> Json:
    """Return the config of the transformers model inside, as `save_pretrained` would write it."""
    inner = transformers_model(model)
    fields: Json = json.loads(inner.config.to_json_string(use_diff=False))
    return fields | {"architectures": [type(inner).__name__]}


def check_edit(model: nn.Module, before: Json, route: Route, path: str | None = None) -> None:
    """Compare the blocks built from the edited config with those built from the original config, along the route.

    Args:
        model: the edited model.
        before: its config before the edit, as returned by `config_dict`.
        route: the edit.
        path: path of the list of blocks, if it cannot be found automatically.

    Raises:
        UnsupportedEditError: something would differ after a reload. The error names the first differences.
    """
    _check_skips(model)
    path = path_inside(model, path)
    blocks = find_decoder_blocks(transformers_model(model), path).blocks
    check = ReloadCheck.build(before, config_dict(model), resolve_section(before), route, _file_tensors(blocks))
    replace(check, blocks=path).check()


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters in blocks that are visited several times.

    Merging would add such an adapter to the shared weights once for each visit.

    Raises:
        UnsupportedEditError: there is such an adapter. The error names it.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        weight = getattr(base, "weight", None)
        if type(module).__module__.startswith("peft.") and weight is not None:
            if id(weight) in seen:
                raise UnsupportedEditError(
                    f"{name} is a PEFT adapter in a repeated block, and merging it would add it to the shared weights "
                    "once for each visit; merge it first (merge_and_unload), or repeat the block only temporarily "
                    "(operate)"
                )
            seen.add(id(weight))


def adapters(model: nn.Module) -> list[str]:
    """Return the paths of the PEFT adapters of a model."""
    return [name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")]


def is_plain(model: nn.Module) -> bool:
    """Return whether the model has neither adapters nor quantized weights, only the modules of its architecture."""
    return not adapters(model) and getattr(transformers_model(model), "hf_quantizer", None) is None


def check_reloads_equal(model: nn.Module, path: str | None = None) -> None:
    """Compare the blocks of a model in memory with the blocks that would be built from its config.

    What a forward changes by itself is not compared.

    Args:
        model: the model.
        path: path of the list of blocks, if it cannot be found automatically.

    Raises:
        UnsupportedEditError: something would differ after a reload. The error names the first differences.
    """
    _check_skips(model)
    inner = transformers_model(model)
    path = path_inside(model, path)
    blocks = find_decoder_blocks(inner, path).blocks
    fields = config_dict(inner)
    check = ReloadCheck(
        inner,
        build_meta_model(fields, None if quantizer_of(inner) is None else quantizer_of(inner).quantization_config),
        resolve_section(fields),
        Route.identity(len(blocks)),
        _file_tensors(blocks),
        live=True,
        blocks=path,
    )
    try:
        check.check()
    except UnsupportedEditError:
        with suppress(UnsupportedEditError):
            check = replace(check, transient=changed_by_forward(inner))
        clear_cached_state(inner)
        if not check.transient:
            raise
        check.check()


def _file_tensors(blocks: nn.ModuleList) -> frozenset[str]:
    """Return the names, relative to a block, of the tensors that a checkpoint would hold."""
    undo_cpu_packing(blocks)
    return frozenset(name for block in blocks for name in block.state_dict(keep_vars=True))


def _check_skips(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MemoryOnlyModule):
            raise UnsupportedEditError(module.not_savable)
        if isinstance(module, SkippedBranch) and not module.saves_as_zeros:
            if module.adds_mean:
                raise UnsupportedEditError(
                    f"{name} ({module.original_class.__name__}) is replaced by its mean, which no weight of the model "
                    "can hold, so no checkpoint can represent it; use the model in memory only (verify=False)"
                )
            if module.outputs:
                raise UnsupportedEditError(
                    f"{name} ({module.original_class.__name__}) is skipped, but its output weights are quantized, and "
                    "a checkpoint would need zeros there; skip the branch in the unquantized checkpoint, and quantize "
                    "that when it is loaded, or use the model in memory only (verify=False)"
                )
            raise UnsupportedEditError(
                f"{name} ({module.original_class.__name__}) is skipped, but which of its weights write into the "
                "residual stream is unknown, so no checkpoint can represent the skip; use the model in memory only "
                "(verify=False)"
            )
