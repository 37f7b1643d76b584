"""Silencing a branch in a checkpoint: which tensors of the files to zero, and proof that zeroing them is what was meant.

The names come from the model that transformers would build. That they are the right ones is shown by running a single block
of it, with random weights: with both branches silenced the block returns what it was given, with its attention silenced no
token sees another, and with its MLP silenced something else comes out than before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .anatomy import find_blocks
from .branches import output_parameters
from .edits import Part
from .errors import InexpressibleError
from .layerwise import Json, Section, find_section, rewrite
from .naming import Naming, match_names
from .route import Route
from .twin import build_empty, class_config, quiet, settle
from .weights import Stack

_PARTS: tuple[Part, Part] = ("attention", "mlp")
# A block above this many parameters is run in bfloat16, and above the second not at all.
_FLOAT32_LIMIT = 500_000_000
_RUN_LIMIT = 4_000_000_000
_TINY_VOCABULARY = 256
_TOKENS = 8


def silent_tensors(config: Json, section: Section, stack: Stack, names: Iterable[str], route: Route) -> dict[int, frozenset[str]]:
    """Names, within the block, of the tensors to zero at each position of the route where a branch is skipped.

    Args:
        config: the source's config.json.
        section: its part on the decoder.
        stack: where the blocks are among the names.
        names: the names of the source's tensors.
        route: the source's blocks in their new order.

    Raises:
        InexpressibleError: they are not known, share a tensor with other weights, or do not behave as they should.
    """
    skipping = {place: visit for place, visit in enumerate(route) if not visit.whole}
    if not skipping:
        return {}
    model = build_empty(config)
    found = find_blocks(model, section.depth)
    naming = match_names(model, found.path, stack, names)
    width = class_config(config).get_text_config(decoder=True).hidden_size
    confirmed = set()
    silent: dict[int, frozenset[str]] = {}
    for place, visit in skipping.items():
        module = found.blocks[visit.block]
        outputs = {part: output_parameters(module, part, width) for part in _PARTS}
        if _kind(module) not in confirmed:
            _confirm(config, section, visit.block, module, outputs)
            confirmed.add(_kind(module))
        skipped = [part for part in _PARTS if not getattr(visit, part)]
        silent[place] = frozenset(name for part in skipped for name in _tensors(naming, visit.block, module, part, outputs[part]))
    return silent


def _tensors(naming: Naming, block: int, module: nn.Module, part: Part, parameters: list[str]) -> list[str]:
    if not parameters:
        raise InexpressibleError(f"block {block} ({type(module).__name__}) has no {part} that could be skipped; drop it instead")
    found: list[str] = []
    for parameter in parameters:
        names = naming.names(block, parameter)
        if not names:
            raise InexpressibleError(
                f"block {block}: no tensor of the checkpoint holds {parameter}, the output of its {part}, and nothing else; skipping is "
                "not supported for this architecture"
            )
        found += names
    return found


class _Witness(nn.Module):
    """Runs a block and keeps what it was given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given = args, kwargs
        return self.block(*args, **kwargs)

    def again(self, stream: torch.Tensor) -> torch.Tensor:
        """Run the block once more, on another stream."""
        args, kwargs = self.given
        given = stream.clone()  # some blocks add in place
        output = self.block(given, *args[1:], **kwargs) if args else self.block(**{**kwargs, "hidden_states": given})
        after: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return after


def _confirm(config: Json, section: Section, block: int, meant: nn.Module, outputs: Mapping[Part, list[str]]) -> None:
    """Run one block of the architecture with random weights and see whether `outputs` silence its branches."""
    name = f"block {block} ({type(meant).__name__})"
    try:
        with torch.no_grad(), quiet():
            model, place = _single_block(config, section, block, meant)
            fault = _fault(model, place, type(meant), outputs)
    except InexpressibleError:
        raise
    except Exception as error:  # a model's forward may raise anything
        raise InexpressibleError(
            f"{name} could not be tried out ({type(error).__name__}: {error}), so no branch of it is skipped"
        ) from error
    if fault:
        raise InexpressibleError(f"{name}: {fault}; skipping is not supported for this architecture")


def _fault(model: Any, place: int, kind: type[nn.Module], outputs: Mapping[Part, list[str]]) -> str | None:
    """What is wrong with `outputs` as the parameters that write the branches of the block at `place`, if anything."""
    blocks = find_blocks(model, model.config.num_hidden_layers, kind).blocks
    module = blocks[place]
    witness = blocks[place] = _Witness(module)
    model(torch.arange(1, _TOKENS + 1)[None], use_cache=False)
    args, kwargs = witness.given
    stream = torch.randn_like(args[0] if args else kwargs["hidden_states"])
    other = stream.clone()
    other[0, -2] = torch.randn_like(other[0, -2])

    def run(*parts: Part, stream: torch.Tensor = stream) -> torch.Tensor:
        saved = _silence(module, [name for part in parts for name in outputs[part]])
        output = witness.again(stream)
        _restore(module, saved)
        return output

    if not torch.equal(run(*_PARTS), stream):
        listed = ", ".join(name for part in _PARTS for name in outputs[part])
        return f"it is not the stream plus its attention plus its MLP once {listed} are zero"
    mixes = not torch.equal(run()[0, -1], run(stream=other)[0, -1])
    # Up to rounding: mixtures of experts work on batches whose make-up depends on other tokens.
    still = torch.allclose(run("attention")[0, -1], run("attention", stream=other)[0, -1], rtol=1e-3, atol=1e-4)
    if not (mixes and still):
        return f"zeroing {', '.join(outputs['attention'])} does not stop its tokens from mixing"
    if outputs["mlp"] and torch.equal(run(), run("mlp")):
        return f"zeroing {', '.join(outputs['mlp'])} changes nothing, so its MLP is elsewhere"
    return None


def _silence(module: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    before = {name: module.get_parameter(name).clone() for name in names}
    for name in before:
        module.get_parameter(name).zero_()
    return before


def _restore(module: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    for name, value in saved.items():
        module.get_parameter(name).copy_(value)


def _kind(module: nn.Module) -> tuple[object, ...]:
    return (type(module), tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters()))


def _single_block(config: Json, section: Section, block: int, meant: nn.Module) -> tuple[Any, int]:
    """A model of the same classes and widths, of one block and a small vocabulary, with random weights; where that block stands.

    Where the config cannot say a single block, the blocks before it stay.
    """
    from transformers import AutoModelForCausalLM

    text = copy.deepcopy(section.of(config))
    text.setdefault("model_type", config.get("model_type"))
    text |= {"vocab_size": _TINY_VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    alone = find_section(text, section.depth_fields[0])
    why = "its config cannot say this block alone"
    for route in (Route([block]), Route(range(block + 1)), Route.identity(section.depth)):
        try:
            smaller = class_config(settle(text, rewrite(text, alone, route), alone, route))
        except InexpressibleError as error:
            why = str(error)
            continue
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(smaller)
        place = route.blocks.index(block)
        if _kind(find_blocks(empty, len(route), type(meant)).blocks[place]) != _kind(meant):
            continue
        size = sum(parameter.numel() for parameter in empty.parameters())
        if size > _RUN_LIMIT:
            why = f"it would take {size / 1e9:.1f} billion parameters"
            continue
        model = AutoModelForCausalLM.from_config(smaller, dtype=torch.bfloat16 if size > _FLOAT32_LIMIT else torch.float32)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval(), place
    raise InexpressibleError(f"block {block} cannot be tried out, so no branch of it is skipped: {why}")
