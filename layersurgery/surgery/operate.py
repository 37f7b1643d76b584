"""Surgery on a live model: its own `nn.ModuleList` is rewritten, for a while or for good.

>>> with operate(model, "swap 12 13; drop 20"):  # doctest: +SKIP
...     model.generate(**inputs)  # an ordinary transformers model, two layers exchanged and one left out
>>> # here it is what it was, bit for bit
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from torch import nn

from ..errors import PlanError, UndoError
from ..models.anatomy import Anatomy, block_signature
from ..models.anatomy import anatomy as find_anatomy
from ..models.block_list import BlockList, find_decoder_blocks, text_config
from ..models.block_view import check_positions, clone_in_state_dict, share_parameters
from ..models.skipped_branch import SkipSpec, install_skips
from ..models.unsupported import refusal_fields, refuse_architecture, refuse_route
from ..plans.plan import Plan
from ..plans.route import Route
from .cached_state import clear_cached_state
from .config_edits import UndoLog, edit_config, edit_depth, edit_parent_modules, renumber_block
from .live_check import check_adapters, check_edit, check_reloads_equal, config_dict, is_plain

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def operate(
    model: Model, plan: Plan | Route | str, *, blocks: str | None = None, anatomy: Anatomy | None = None
) -> Iterator[Model]:
    """Edit a model while the `with` block lasts, and put back the very objects that were there at its end, whatever happens.

    No weight is copied. A block that the route visits is the same object; a second visit, or one without attention or MLP, is a
    view that shares its parameters. Operating inside `operate` composes: there, block numbers are those of the edited model.

    Args:
        model: a transformers causal language model, or a wrapper around one (PEFT, DDP, torch.compile). Its config object is
            edited too, so another model built on the very same object sees the new depth meanwhile.
        plan: the edits, their text, or the route itself.
        blocks: path of the list of blocks ("model.layers"), where it cannot be found.
        anatomy: the model's, which a skipped branch needs; by default it is found by running the model once on seven tokens.

    Raises:
        PlanError: the plan does not fit the model.
        UnsupportedEditError: the architecture cannot be edited in this way; the model is as it was.
        UndoError: at the end, if somebody else changed the list of blocks meanwhile; their change is left alone.

    Example:
        >>> with ls.operate(model, ls.drop(20)):  # doctest: +SKIP
        ...     loss = model(ids, labels=ids).loss
    """
    surgery = Surgery(model, plan, blocks=blocks)
    try:
        surgery.apply(anatomy)
        yield model
    finally:
        surgery.undo()


def operate_(
    model: Model,
    plan: Plan | Route | str,
    *,
    blocks: str | None = None,
    anatomy: Anatomy | None = None,
    verify: bool = True,
) -> Model:
    """Edit a model for good, in place. It stays an ordinary transformers model: it generates, trains, saves and reloads.

    Repeats share their parameters, so their gradients add up; saved, each has its own copy. A skipped branch keeps its weights
    and is saved with output projections of zeros.

    Args:
        model: as for `operate`.
        plan: the edits, their text, or the route itself.
        blocks: path of the list of blocks, where it cannot be found.
        anatomy: the model's, which a skipped branch needs.
        verify: refuse what `save_pretrained` and a reload would not bring back as the same function. Without it, save with
            `layersurgery.save`, which checks as well.

    Returns:
        The model.

    Raises:
        PlanError: the plan does not fit the model.
        UnsupportedEditError: the architecture cannot be edited in this way, or no checkpoint of it can say the result; the model
            is as it was.
    """
    before = config_dict(model) if verify else None
    surgery = Surgery(model, plan, blocks=blocks)
    try:
        surgery.apply(anatomy)
        if before is not None:
            check_adapters(model)
            check_edit(model, before, surgery.route)
            if is_plain(model):
                check_reloads_equal(model)
    except BaseException:
        surgery.undo()
        raise
    return model


class Surgery:
    """One edit of a live model, and how to undo it."""

    def __init__(self, model: nn.Module, plan: Plan | Route | str, *, blocks: str | None = None) -> None:
        self.model = model
        self.found = find_decoder_blocks(model, blocks)
        self.original = list(self.found.blocks)
        self.mode = self.found.blocks.training
        self.route = as_route(plan, len(self.original))
        self.log = UndoLog()
        self.installed: list[nn.Module] = []
        self.state: Literal["whole", "cutting", "edited", "restoring"] = "whole"

    def apply(self, anatomy: Anatomy | None = None) -> None:
        """Make the edit. If this raises, `undo` puts back whatever was changed until then.

        Raises:
            UnsupportedEditError: the architecture cannot be edited in this way.
        """
        model, depth, route = self.model, len(self.original), self.route
        config = text_config(model)
        facts = refusal_fields(config)
        refuse_architecture(facts)
        refuse_route(facts, route, live=True)
        self.state = "cutting"
        clear_cached_state(model)
        self.installed = self._build(anatomy)
        for owner in _configs(model, self.found, config):
            edit_config(owner, depth, route, self.log)
        edit_parent_modules(_above(model, self.found), depth, route, self.log)
        field = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        edit_depth(self.installed, {field, "num_hidden_layers"}, depth, len(route), self.log)
        _rename_devices(model, self.found, route, self.log)
        _fill(self.found.blocks, self.installed)
        self.state = "edited"

    def _build(self, anatomy: Anatomy | None) -> list[nn.Module]:
        """The modules of the new list. What must be refused is refused before a number is changed."""
        for place, block in enumerate(self.original):
            if any(visit.block == place and (now != place or not visit.whole) for now, visit in enumerate(self.route)):
                check_positions(block, place)
        skips = self._skip_specs(anatomy)
        owners = _owners(self.route)
        built: list[nn.Module] = []
        held = {self.route[place].block for place in owners}
        for place, visit in enumerate(self.route):
            block = self.original[visit.block]
            if place not in owners:
                block = share_parameters(block)
                install_skips(block, skips.get((visit.block, visit.attention), ()) if not visit.whole else ())
                renumber_block(block, visit.block, place)
                if visit.block in held:
                    clone_in_state_dict(block)
            held.add(visit.block)
            built.append(block)
        for place in owners:
            renumber_block(built[place], self.route[place].block, place, self.log)
        return built

    def _skip_specs(self, anatomy: Anatomy | None) -> dict[tuple[int, bool], tuple[SkipSpec, ...]]:
        silenced = {visit for visit in self.route if not visit.whole}
        if not silenced:
            return {}
        if anatomy is None:
            anatomy = find_anatomy(self.model, blocks=self.found.path)
        for visit in silenced:
            if anatomy.depth <= visit.block or anatomy.signatures[anatomy.kind_of[visit.block]] != block_signature(
                self.original[visit.block]
            ):
                raise PlanError(
                    f"block {visit.block} is not what the anatomy given says of it: it is that of another model, or of this one before an "
                    "edit; leave it out, or take it anew"
                )
        return {(visit.block, visit.attention): anatomy.skip_specs(visit) for visit in silenced}

    def undo(self) -> None:
        """Put back what was there; nothing where nothing was changed.

        Raises:
            UndoError: the list or the config was changed by somebody else since; nothing is touched.
        """
        interruption: BaseException | None = None
        for _ in range(5):
            try:
                self._undo()
                break
            except UndoError:
                raise
            except BaseException as error:  # an interrupt or a timer's exception: finish first, then let it through
                interruption = error
        if interruption is not None:
            raise interruption

    def _undo(self) -> None:
        if self.state == "whole":
            return
        if self.state == "edited":
            self._check()
        self.state = "restoring"
        self._restore()
        self.state = "whole"

    def _check(self) -> None:
        blocks, now = self.found.blocks, list(self.found.blocks)
        wrong = self.log.changed_since()
        if self.model.get_submodule(self.found.path) is not blocks:
            wrong = [f"the list at {self.found.path} was replaced by another"]
        elif len(now) != len(self.installed) or any(
            one is not other for one, other in zip(now, self.installed, strict=False)
        ):
            wrong = [f"the list at {self.found.path} holds other modules"]
        if wrong:
            raise UndoError(
                f"the edit {self.route} was not undone, because the model was edited by somebody else since: {'; '.join(wrong[:3])}. "
                "Nothing was overwritten. Undo edits in the reverse order in which they were made"
            )

    def _restore(self) -> None:
        clear_cached_state(self.model, self.original)
        self.log.undo()
        _fill(self.found.blocks, self.original)
        self._follow_mode()

    def _follow_mode(self) -> None:
        """`train()` and `eval()` inside did not reach the modules that were out."""
        if self.found.blocks.training == self.mode:
            return
        reached = {id(module) for block in self.installed for module in block.modules()}
        for block in self.original:
            for module in block.modules():
                if id(module) not in reached:
                    module.training = self.found.blocks.training


def as_route(plan: Plan | Route | str, depth: int) -> Route:
    """The route that a plan, its text or a route means in a model of `depth` blocks.

    Raises:
        PlanError: it does not fit.
    """
    if isinstance(plan, str):
        plan = Plan.parse(plan)
    if isinstance(plan, Plan):
        return plan.route(depth)
    if not isinstance(plan, Route):
        raise PlanError(f'expected a plan, its text ("swap 1 2; drop 3") or a Route, not {plan!r}')
    if wrong := sorted({visit.block for visit in plan if visit.block >= depth}):
        raise PlanError(f"the route visits block {wrong[0]}, and the model has {depth} blocks, 0 to {depth - 1}")
    if not plan.canonical:
        raise PlanError("the route leaves no block; keep at least one")
    return plan.canonical


def _owners(route: Route) -> frozenset[int]:
    """Places that get the block itself: its own place if it still stands there, else the first whole visit."""
    owners: dict[int, int] = {}
    for place, visit in enumerate(route):
        if visit.whole and (place == visit.block or visit.block not in owners):
            owners[visit.block] = place
    return frozenset(owners.values())


def _fill(blocks: nn.ModuleList, modules: list[nn.Module]) -> None:
    blocks._modules.clear()
    blocks._modules.update({str(number): module for number, module in enumerate(modules)})


def _configs(model: nn.Module, found: BlockList, config: Any) -> list[Any]:
    """The decoder's config object, and copies of it that modules above the blocks keep."""
    configs = {id(config): config}
    for module in _above(model, found):
        held = vars(module).get("config")
        get = getattr(held, "get_text_config", None)
        if get is not None:
            text = get(decoder=True)
            if getattr(text, "num_hidden_layers", None) == config.num_hidden_layers:
                configs.setdefault(id(text), text)
    return list(configs.values())


def _above(model: nn.Module, found: BlockList) -> Iterator[nn.Module]:
    yield model
    module = model
    for name in found.path.split(".")[:-1]:
        module = module.get_submodule(name)
        yield module


def _rename_devices(model: nn.Module, found: BlockList, route: Route, log: UndoLog) -> None:
    """accelerate's map of which block is on which device, by the blocks' paths."""
    names = found.path.split(".")
    for level, module in enumerate(_above(model, found)):
        devices = vars(module).get("hf_device_map")
        if isinstance(devices, dict):
            block = re.compile(rf"{re.escape('.'.join(names[level:]))}\.(\d+)(.*)")
            moved: dict[str, Any] = {}
            for path, device in devices.items():
                match = block.fullmatch(path)
                places = [place for place, number in enumerate(route.blocks) if match and number == int(match[1])]
                paths = [f"{path[: match.start(1)]}{place}{match[2]}" for place in places] if match else [path]
                moved.update(dict.fromkeys(paths, device))
            log.set(vars(module), "hf_device_map", moved, "hf_device_map")
