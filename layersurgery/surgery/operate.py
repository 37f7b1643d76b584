"""Edit a model in memory by rewriting its `nn.ModuleList`, temporarily or permanently.

>>> import layersurgery as ls
>>> model, tokenizer = ls.load("smollm2-135m")
>>> with ls.operate(model, "swap 12 13; drop 20"):  # inside, an ordinary transformers model with 29 blocks
...     print(model.config.num_hidden_layers, len(model.model.layers))
29 29
>>> print(model.config.num_hidden_layers, len(model.model.layers))  # after it, exactly the original model
30 30
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from torch import nn

from ..checkpoints.block_sources import Sources, take_blocks
from ..errors import PlanError, UndoError, UnsupportedEditError, warn
from ..models.anatomy import Anatomy, block_signature
from ..models.anatomy import anatomy as find_anatomy
from ..models.block_list import BlockList, find_decoder_blocks, text_config
from ..models.block_probe import unpack_weights
from ..models.block_view import check_positions, clone_in_state_dict, own_parameters, share_parameters
from ..models.config_fields import depth_field
from ..models.later_tokens import LaterTokens, find_later_tokens, install_later_tokens
from ..models.means import Means, as_means
from ..models.memory_only import refuse_memory_only
from ..models.model_weights import ModelWeights
from ..models.other_wrappers import WRAP_AGAIN, has_bridge, is_traced, may_get_bridge
from ..models.parallel_blocks import group_members, make_parallel
from ..models.skipped_branch import SkipSpec, install_skips
from ..models.taken_blocks import TakenBlocks
from ..models.unsupported import refusal_fields, refuse_architecture, refuse_route
from ..models.weight_change import WeightChange, install_changes
from ..plans.plan import Plan
from ..plans.route import Route
from ..plans.visit import Visit
from .adapter_settings import check_adapter_settings, forget_base, refuse_prefixes
from .cached_state import clear_cached_state
from .call_order import check_call_order
from .config_edits import (
    UndoLog,
    edit_config,
    edit_depth,
    edit_device_map,
    edit_parent_modules,
    parent_modules,
    renumber_block,
)
from .live_check import check_adapters, check_edit, check_reloads_equal, config_dict, is_plain
from .module_tree import ModuleTree

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def operate(
    model: Model,
    plan: Plan | Route | str,
    *,
    blocks: str | None = None,
    anatomy: Anatomy | None = None,
    means: Means | str | os.PathLike[str] | None = None,
    verify: bool = True,
    sources: Sources | TakenBlocks | None = None,
) -> Iterator[Model]:
    """Edit a model inside a `with` block, and restore the original objects at its end, also after an exception.

    At its first visit, a block is the original object. A second visit, or a visit that changes a branch, is a view that
    shares its parameters. Only weights that are scaled, or partly zero because heads or neurons are off, are copies:
    what they learn inside is lost at the end. `operate` can be nested: inside, plans use the block numbers of the
    edited model.

    Args:
        model: a transformers causal language model, or a wrapper around one (PEFT, DDP, torch.compile). Its config
            object is edited too, so another model with the same config object also has the new depth inside the `with`
            block.
        plan: the edits, their text, or the route itself.
        blocks: path of the list of blocks ("model.layers"), if it cannot be found automatically.
        anatomy: anatomy of the model, needed to change a branch. By default, it is found by running the model once on
            seven tokens.
        means: the means of the model's branches (`measure_means`), or their file, for edits that add them.
        verify: check in one forward on seven tokens that the edited model calls the blocks of its list once each, in
            order. The result is kept, so later edits to the same depth are not checked again.
        sources: other models, or their names ("MODEL" or "MODEL@REVISION"), by the names that the plan takes blocks
            from: {"base": other}. They are not changed; blocks that are taken share their parameters.

    Yields:
        The same model, edited.

    Raises:
        PlanError: the plan does not fit the model.
        UnsupportedEditError: the architecture cannot be edited in this way; the model is unchanged.
        UndoError: at the end, if other code has changed the list of blocks inside the `with` block. That change is
            kept. Or if a TransformerBridge was made of the model; then the model is restored, and the bridge is of no
            use.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> with ls.operate(model, ls.drop(20)):
        ...     loss = model(tokens, labels=tokens).loss
    """
    surgery = Surgery(model, plan, blocks=blocks, sources=sources, means=as_means(means))
    try:
        surgery.apply(anatomy, verify=verify)
        yield model
    finally:
        traced = surgery.state == "edited" and is_traced(model)
        surgery.undo()
        if traced:
            warn(
                "a wrapper of nnsight that was made inside operate still exists. It has numbered the blocks of the "
                "edited model, so do not use it any more; delete it inside the with block (del), or edit permanently "
                "(operate_) and then wrap"
            )


def operate_(
    model: Model,
    plan: Plan | Route | str,
    *,
    blocks: str | None = None,
    anatomy: Anatomy | None = None,
    means: Means | str | os.PathLike[str] | None = None,
    verify: bool = True,
    sources: Sources | TakenBlocks | None = None,
) -> Model:
    """Edit a model permanently, in place.

    It remains an ordinary transformers model that generates, trains, saves and reloads.

    Repeated blocks share their parameters, so their gradients add up; in a saved checkpoint, each has its own copy. The
    copies of `insert_copy` have parameters of their own, so that they can be trained alone. A
    skipped branch keeps its weights, and is saved with output projections of zeros.

    Args:
        model: as for `operate`.
        plan: the edits, their text, or the route itself.
        blocks: path of the list of blocks, if it cannot be found automatically.
        anatomy: anatomy of the model, needed to change a branch; found by default.
        means: as for `operate`. A model that adds means cannot be saved, so they need verify=False.
        verify: check as `operate` does, and refuse an edit after which `save_pretrained` and a reload would not give
            the same function. Without this check, save with `layersurgery.save`, which checks the reload, too.
        sources: other models by name, as for `operate`. A block that is taken shares its parameters with a model that
            is given, so that training one trains both; of a model that is loaded by its name, nothing else stays.

    Returns:
        The model.

    Raises:
        PlanError: the plan does not fit the model.
        UnsupportedEditError: the architecture cannot be edited in this way, or no checkpoint of it can represent the
            edited model; the model is unchanged.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> model = ls.operate_(model, "drop 20; repeat 12")
        >>> len(model.model.layers)
        30
    """
    before = config_dict(model) if verify else None
    surgery = Surgery(model, plan, blocks=blocks, sources=sources, permanent=True, means=as_means(means))
    try:
        surgery.apply(anatomy, verify=verify)
        if before is not None:
            check_adapters(model)
            check_adapter_settings(model, surgery.route, blocks)
            check_edit(model, before, surgery.route, blocks)
            if is_plain(model):
                check_reloads_equal(model, blocks)
    except BaseException:
        surgery.undo()
        raise
    forget_base(model, len(surgery.original), surgery.route)
    return model


class Surgery:
    """One edit of a model in memory that can be undone."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan | Route | str,
        *,
        blocks: str | None = None,
        sources: Sources | TakenBlocks | None = None,
        permanent: bool = False,
        means: Means | None = None,
    ) -> None:
        self.model, self.permanent, self.means = model, permanent, means
        refuse_architecture(refusal_fields(text_config(model)))  # a looped model may have several lists, or none
        self.block_list = find_decoder_blocks(model, blocks)
        self.original = list(self.block_list.blocks)
        refuse_memory_only(self.original)
        self.training = self.block_list.blocks.training
        self.route = as_route(plan, len(self.original))
        self.taken = (
            sources
            if isinstance(sources, TakenBlocks)
            else take_blocks(model, [self.route], sources, blocks=self.block_list.path)
        )
        self.log = UndoLog()
        self.installed: list[nn.Module] = []
        self.state: Literal["original", "applying", "edited", "restoring"] = "original"
        self.tree: ModuleTree | None = None
        self.bridged = False

    def apply(self, anatomy: Anatomy | None = None, *, verify: bool = True) -> None:
        """Make the edit; if this raises, `undo` restores what was changed before the error.

        Args:
            anatomy: needed to change a branch; found by default.
            verify: check that the edited model calls the blocks of its list once each, in order.

        Raises:
            UnsupportedEditError: the architecture cannot be edited in this way.
        """
        model, depth, route = self.model, len(self.original), self.route
        if is_traced(model):
            raise UnsupportedEditError(
                f"a wrapper of nnsight around this {type(model).__name__} exists, and has numbered its blocks; delete "
                f"it (del), {WRAP_AGAIN}"
            )
        config = text_config(model)
        refuse_route(refusal_fields(config), route, live=True)
        refuse_prefixes(model, depth, route)
        unpack_weights(model)
        self.state = "applying"
        clear_cached_state(model)
        self.installed = self._build_blocks(anatomy)
        for decoder_config in _find_configs(model, self.block_list, config):
            edit_config(decoder_config, depth, route, self.log)
        edit_parent_modules(parent_modules(model, self.block_list), depth, route, self.log)
        edit_depth(self.installed, {depth_field(config), "num_hidden_layers"}, depth, len(route), self.log)
        edit_device_map(model, self.block_list, route, self.log)
        _set_blocks(self.block_list.blocks, self.installed)
        self.tree = ModuleTree(model) if may_get_bridge() else None
        self.state = "edited"
        if verify:
            check_call_order(model, self.block_list.blocks)

    def _build_blocks(self, anatomy: Anatomy | None) -> list[nn.Module]:
        """Return the modules of the new list; every refusal comes before the first position is changed."""
        for number, block in enumerate(self.original):
            if any(
                visit.block == number and (position != number or not visit.whole)
                for position, visit in enumerate(self.route)
            ):
                check_positions(block, number)
        changed = self._changed_parts(anatomy)
        original_positions, members = _positions_of_originals(self.route), group_members(self.route)
        built: list[nn.Module] = []
        included = {self.route[position].block for position in original_positions}
        for position, visit in enumerate(self.route):
            block = self.original[visit.block]
            if position not in original_positions:
                own = visit.of_own_block
                block = share_parameters(block) if self.taken is None or own is visit else self.taken.view(visit)
                if visit.zeroed and self.permanent:
                    own_parameters(block)
                weights, skips, later = changed.get(own.alone, ((), (), None))
                install_changes(block, weights)
                install_skips(block, skips)
                install_later_tokens(block, later)
                renumber_block(block, visit.block, position)
                if position in members:
                    make_parallel(block, members[position])
                if visit.source or visit.block in included:
                    clone_in_state_dict(block)
            included.add(visit.block)
            built.append(block)
        for position in original_positions:
            renumber_block(built[position], self.route[position].block, position, self.log)
        return built

    def _changed_parts(
        self, anatomy: Anatomy | None
    ) -> dict[Visit, tuple[tuple[WeightChange, ...], tuple[SkipSpec, ...], LaterTokens | None]]:
        """Return, for each visit of a block that is not as it is, its changes of weights, skips and later tokens."""
        changed = {visit.of_own_block.alone for visit in self.route if not visit.of_own_block.alone.whole}
        if not changed:
            return {}
        if anatomy is None:
            anatomy = find_anatomy(self.model, blocks=self.block_list.path)
        for visit in changed:
            if anatomy.depth <= visit.block or anatomy.signatures[anatomy.kind_of[visit.block]] != block_signature(
                self.original[visit.block]
            ):
                raise PlanError(
                    f"block {visit.block} differs from the anatomy argument, which belongs to another model or to this "
                    "model before an edit; omit the argument, or compute the anatomy again"
                )
        if self.means is not None and any(visit.mean for visit in changed):
            for visit in changed:
                if visit.mean and self.means.depth == len(self.original):
                    self.means.check_block(visit.block, self.original[visit.block])
        weights = ModelWeights(self.model, self.block_list.blocks, anatomy)
        skips = {visit: anatomy.skip_specs(visit, self.means) for visit in changed}
        return {
            visit: (
                weights.changes(visit),
                weights.with_biases(visit.block, skips[visit]),
                find_later_tokens(visit, anatomy.parts(visit.block)),
            )
            for visit in changed
        }

    def undo(self) -> None:
        """Restore the original model; do nothing if there is no edit to undo.

        Raises:
            UndoError: other code has changed the list or the config since the edit; nothing is restored.
        """
        interruption: BaseException | None = None
        for _ in range(5):
            try:
                self._undo_once()
                break
            except UndoError:
                raise
            except BaseException as error:  # an interrupt or an exception of a timer: finish the undo, then raise it
                interruption = error
        if interruption is not None:
            raise interruption
        if self.bridged:
            self.bridged = False
            raise UndoError(
                "a TransformerBridge was made of the model inside operate, and put its own modules in place of the "
                "model's. The model is restored, as before the edit, and the bridge must not be used. Edit a model "
                "that is only for the bridge permanently (operate_), and then make the bridge"
            )

    def _undo_once(self) -> None:
        if self.state == "original":
            return
        if self.state == "edited":
            if self.tree is not None and has_bridge(self.model):
                self.tree.restore()
                self.bridged = True
            self._check_unchanged()
        self.state = "restoring"
        self._restore()
        self.state = "original"

    def _check_unchanged(self) -> None:
        blocks, now = self.block_list.blocks, list(self.block_list.blocks)
        changes = self.log.changed_since()
        if self.model.get_submodule(self.block_list.path) is not blocks:
            changes = [f"the list at {self.block_list.path} was replaced by another"]
        elif len(now) != len(self.installed) or any(
            current is not installed for current, installed in zip(now, self.installed, strict=False)
        ):
            changes = [f"the list at {self.block_list.path} contains other modules"]
        if changes:
            raise UndoError(
                f"the edit {self.route} was not undone, because other code has edited the model since: "
                f"{'; '.join(changes[:3])}. Nothing was overwritten. Undo edits in the reverse order in which they "
                "were made"
            )

    def _restore(self) -> None:
        clear_cached_state(self.model, self.original)
        self.log.undo()
        _set_blocks(self.block_list.blocks, self.original)
        self._apply_training_mode()

    def _apply_training_mode(self) -> None:
        """Apply a `train()` or `eval()` made during the edit to the modules that were not in the model then."""
        if self.block_list.blocks.training == self.training:
            return
        reached = {id(module) for block in self.installed for module in block.modules()}
        for block in self.original:
            for module in block.modules():
                if id(module) not in reached:
                    module.training = self.block_list.blocks.training


def as_route(plan: Plan | Route | str, depth: int) -> Route:
    """Return the route of a plan, its text or a route in a model of `depth` blocks.

    Raises:
        PlanError: the plan or route does not fit the model.
    """
    if isinstance(plan, str):
        plan = Plan.parse(plan)
    if isinstance(plan, Plan):
        return plan.route(depth)
    if not isinstance(plan, Route):
        joined = '; one plan may have several edits: "drop 1; drop 2"' if isinstance(plan, list | tuple) else ""
        raise PlanError(f'expected a plan, its text ("swap 1 2; drop 3") or a Route, not {plan!r}{joined}')
    return plan.checked(depth)


def _positions_of_originals(route: Route) -> frozenset[int]:
    """Return the positions that get an original block, one per block.

    This is the position of the block in the original model if the route visits it there, else that of its first visit.
    Only visits with attention and MLP, and not in a group of parallel blocks, count.
    """
    members = group_members(route)
    position_of: dict[int, int] = {}
    for position, visit in enumerate(route):
        if visit.whole and position not in members and (position == visit.block or visit.block not in position_of):
            position_of[visit.block] = position
    return frozenset(position_of.values())


def _set_blocks(blocks: nn.ModuleList, modules: list[nn.Module]) -> None:
    blocks._modules.clear()
    blocks._modules.update({str(number): module for number, module in enumerate(modules)})


def _find_configs(model: nn.Module, block_list: BlockList, config: Any) -> list[Any]:
    """Return the decoder's config object, and its copies in the modules that contain the list of blocks."""
    configs = {id(config): config}
    for module in parent_modules(model, block_list):
        module_config = vars(module).get("config")
        get_text_config = getattr(module_config, "get_text_config", None)
        if get_text_config is not None:
            decoder_config = get_text_config(decoder=True)
            if getattr(decoder_config, "num_hidden_layers", None) == config.num_hidden_layers:
                configs.setdefault(id(decoder_config), decoder_config)
    return list(configs.values())
