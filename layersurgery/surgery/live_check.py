"""Would a live model that was edited come back from `save_pretrained` as the same function?"""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from ..errors import UnsupportedEditError
from ..models.block_list import find_decoder_blocks
from ..models.config_fields import Json
from ..models.meta_model import build_meta_model, resolve_section
from ..models.reload_check import ReloadCheck
from ..models.skipped_branch import SkippedBranch
from ..plans.route import Route


def transformers_model(model: nn.Module) -> Any:
    """The transformers model inside wrappers (PEFT, DDP, torch.compile).

    Raises:
        UnsupportedEditError: there is none.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UnsupportedEditError(
        f"{type(model).__name__} holds no transformers model, so there is nothing that could be reloaded"
    )


def config_dict(model: nn.Module) -> Json:
    """The config of the transformers model within, as `save_pretrained` would write it."""
    inner = transformers_model(model)
    fields: Json = json.loads(inner.config.to_json_string(use_diff=False))
    return fields | {"architectures": [type(inner).__name__]}


def check_edit(model: nn.Module, before: Json, route: Route) -> None:
    """Compare what would be built from the config before an edit with what would be built from it now, along the route.

    Args:
        model: the edited model.
        before: its config before, see `described`.
        route: the edit.

    Raises:
        UnsupportedEditError: the first things that would come back otherwise, by name.
    """
    _check_skips(model)
    blocks = find_decoder_blocks(model).blocks
    in_files = {name for block in blocks for name in block.state_dict(keep_vars=True)}
    ReloadCheck.build(before, config_dict(model), resolve_section(before), route, in_files).check()


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters in blocks that are visited several times: merging would add them to the shared weights once for each visit.

    Raises:
        UnsupportedEditError: with the adapter's name.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        weight = getattr(base, "weight", None)
        if type(module).__module__.startswith("peft.") and weight is not None:
            if id(weight) in seen:
                raise UnsupportedEditError(
                    f"{name} is an adapter of PEFT in a block that repeats, and merging it would add it to the shared weights once for each "
                    "visit; merge it first (merge_and_unload), or repeat for a while only (operate)"
                )
            seen.add(id(weight))


def adapters(model: nn.Module) -> list[str]:
    """Paths of PEFT's adapters."""
    return [name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")]


def is_plain(model: nn.Module) -> bool:
    """Whether the model consists of its architecture's own modules: neither adapted nor quantised."""
    return not adapters(model) and getattr(transformers_model(model), "hf_quantizer", None) is None


def check_reloads_equal(model: nn.Module) -> None:
    """Compare a live model's blocks with those that would be built from its config.

    Raises:
        UnsupportedEditError: the first things that would come back otherwise, by name.
    """
    _check_skips(model)
    inner = transformers_model(model)
    blocks = find_decoder_blocks(inner).blocks
    fields = config_dict(inner)
    in_files = {name for block in blocks for name in block.state_dict(keep_vars=True)}
    ReloadCheck(
        inner,
        build_meta_model(fields),
        resolve_section(fields),
        Route.identity(len(blocks)),
        frozenset(in_files),
        live=True,
    ).check()


def _check_skips(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, SkippedBranch) and not module.saves_as_zeros:
            raise UnsupportedEditError(
                f"{name} ({module.stands_for.__name__}) is skipped, and which of its weights write the residual stream could not be told, so no "
                "checkpoint can say that it is; use it in memory only (verify=False)"
            )
