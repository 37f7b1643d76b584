"""Choose the edited models that an architecture can run, and say why it cannot run the others."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PlanError, UnsupportedEditError
from ..models.block_dependencies import refuse_block_by_block
from ..models.block_list import text_config
from ..models.unsupported import refusal_fields, refuse_route
from ..plans.route import Route
from ..plans.variants import Variant
from ..runtime.block_runner import BlockRunner


def select_supported(runner: BlockRunner, variants: Sequence[Variant]) -> tuple[list[Variant], dict[str, str]]:
    """Return the variants that a model can run, and the reason for each one of a family that it cannot run, by plan.

    Args:
        runner: runs the model's blocks.
        variants: the edited models.

    Raises:
        PlanError: a route does not fit the model.
        UnsupportedEditError: the model cannot run a plan that the caller wrote; it is never skipped.
    """
    fields, depth = refusal_fields(text_config(runner.model)), runner.depth
    trunk = Route.identity(depth)
    supported: list[Variant] = []
    skipped: dict[str, str] = {}
    for variant in variants:
        if any(visit.block >= depth for visit in variant.route):
            raise PlanError(f"the route {variant.route} does not fit: the model has {depth} blocks, 0 to {depth - 1}")
        if variant.route != trunk[: len(variant.route)]:  # else the trunk computes it
            try:
                refuse_route(fields, variant.route, live=True)
                refuse_block_by_block(fields, variant.route)
                for visit in variant.route:
                    runner.check(visit)
            except UnsupportedEditError as error:
                if variant.edit == "plan":
                    raise
                skipped[variant.plan] = str(error)
                continue
        supported.append(variant)
    return supported, skipped
