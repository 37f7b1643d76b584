"""Capture what each branch of a block adds to the residual stream while the block runs.

The output of a branch's module may differ from what the block adds to the stream: a norm or a multiplier may follow it,
or the module may add the residual itself. So every block is run once on random numbers, and its change of the stream is
explained as a weighted sum of its branches' outputs. If the sum does not explain the change, the block gets an error
and is not captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..models.block_parts import BlockParts
from ..models.block_probe import BlockProbe
from ..models.call_tracing import ModuleWrapper, first_tensor, replace_modules
from ..models.numerics import is_same_change, tolerance
from ..models.weight_conventions import fit_norm
from ..plans.visit import Branch
from .attention_weights import PreviousTokenAttention
from .block_runner import BlockRunner

BRANCHES: tuple[Branch, Branch] = ("attention", "mlp")
_PROBE_STD = 0.1


@dataclass(frozen=True, slots=True)
class CapturePoint:
    """A module in a block that returns a contribution to the residual stream.

    Attributes:
        branch: the branch that the module belongs to.
        path: path of the module within the block.
        residual: the module's argument that it adds to its output itself; None if it does not.
        scale: the factor by which the block multiplies the module's output.
    """

    branch: Branch
    path: str
    residual: int | str | None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class BlockContributions:
    """The contributions of one block that can be captured.

    Attributes:
        capture_points: capture points of the branches; a branch without any adds nothing.
        mixers: paths of the modules that mix tokens.
        mixer_names: class names of the mixers, separated by commas.
        reads_attention: whether attention weights can be read from the block's attention kernel.
        error: why contributions cannot be captured; empty if they can.
        attention_error: why attention cannot be read; empty if it can.
    """

    capture_points: tuple[CapturePoint, ...]
    mixers: tuple[str, ...]
    mixer_names: str
    reads_attention: bool
    error: str = ""
    attention_error: str = ""

    def has(self, branch: Branch) -> bool:
        """Check whether the contribution of a branch can be captured."""
        return any(point.branch == branch for point in self.capture_points)


def find_contributions(runner: BlockRunner, *, check_attention: bool = True) -> list[BlockContributions]:
    """Find the capture points of every block by running the model once on seven tokens; each block runs twice.

    Args:
        runner: the model's blocks.
        check_attention: also check whether the attention weights of each block can be read.

    Returns:
        One entry for each block, in the model's order.
    """
    with runner.inference_mode():
        return [
            _block_contributions(probe, runner.anatomy.parts(number), check_attention=check_attention)
            for number, probe in enumerate(runner.probes(seed=7))
        ]


def reads_are_mean_free(runner: BlockRunner) -> bool:
    """Check whether every reader of the stream first subtracts the mean over channels.

    If so, the mean of a contribution over channels has no effect.
    """
    model = runner.model
    first_parameter = next(
        (parameter for parameter in model.parameters() if not parameter.is_meta), torch.zeros(1)
    ).detach()
    kind_of = runner.anatomy.kind_of
    names = [
        f"{runner.path}.{kind_of.index(kind)}.{path}"
        for kind, (_, parts) in enumerate(runner.anatomy.kinds)
        for path in parts.norms_before or ("",)
    ]
    final = runner.anatomy.final_norm
    if final is None or any(name.endswith(".") for name in names):
        return False
    with runner.inference_mode():
        for name in (final, *names):
            norm = model.get_submodule(name)
            parameter = next(iter(norm.parameters()), first_parameter)
            affine = fit_norm(norm, runner.width, first_parameter if parameter.is_meta else parameter.detach())
            if affine is None or not affine.subtracts_mean:
                return False
    return True


def _block_contributions(probe: BlockProbe, parts: BlockParts, *, check_attention: bool) -> BlockContributions:
    """Find the capture points of one block by running it on random numbers."""
    # The numbers are small compared with what the block adds, so that their sum rounds off little of the addition.
    probe.stream = (probe.stream * (_PROBE_STD / probe.stream.float().std().clamp(min=1e-30))).to(probe.stream.dtype)
    block, shape = probe.block, probe.stream.shape[:-1]
    points = [] if parts.skip_error else [*_capture_points(parts, "attention"), *_capture_points(parts, "mlp")]
    mixers = parts.attention
    returned: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Callable[[torch.Tensor], None]:
        return lambda value: returned.__setitem__(number, value.clone())

    recorders: list[PreviousTokenAttention] = []
    capture_slots = [(point, keep(number)) for number, point in enumerate(points)]
    undispatched = ""
    try:
        with capture_contributions(block, capture_slots, mixers, recorders.append if check_attention else None, shape):
            added = probe.added()
    except NotImplementedError as error:  # a kernel that does not run in a dispatch mode
        if not check_attention:
            raise
        recorders, undispatched = [], str(error).partition(":")[0].partition(chr(10))[0]
        with capture_contributions(block, capture_slots, mixers, None, shape):
            added = probe.added()
    names = ", ".join(dict.fromkeys(type(block.get_submodule(path)).__name__ for path in mixers))
    attention_error = (
        ", ".join(sorted(set().union(*(recorder.unreadable_kernels for recorder in recorders)))) or undispatched
    )
    attends = not attention_error and any(recorder.weights_BTK is not None for recorder in recorders)
    attention_error = (
        f"its attention kernel ({attention_error}) does not report its weights; "
        "load the model with attn_implementation='sdpa' (on cpu or cuda) or 'eager'"
        if attention_error
        else ""
    )
    reason = parts.skip_error
    if not reason and points:
        scales = _fit_scales(added, [returned.get(number) for number in range(len(points))])
        if scales is None:
            reason = "its change of the residual stream is not a weighted sum of its branches' outputs"
        else:
            points = [replace(point, scale=scale) for point, scale in zip(points, scales, strict=True)]
    return BlockContributions(() if reason else tuple(points), mixers, names, attends, reason, attention_error)


def _capture_points(parts: BlockParts, branch: Branch) -> Iterator[CapturePoint]:
    """Yield capture points at the last modules of a branch: its output modules, or the norms that follow them."""
    yield from (CapturePoint(branch, end.path, end.residual) for end in parts.ends(branch))


def _fit_scales(added: torch.Tensor, values: Sequence[torch.Tensor | None]) -> list[float] | None:
    """Fit by least squares the factors with which `values` sum up to `added`; None if the fit leaves a remainder."""
    if any(value is None or value.shape != added.shape for value in values):
        return None
    columns = torch.stack([value.flatten() for value in values if value is not None], 1).double().cpu()
    target = added.flatten().double().cpu()
    if not bool(columns.isfinite().all()) or not bool(target.isfinite().all()):
        return None
    scales = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
    largest = tolerance("fit", added.dtype)
    scales = torch.where((scales - 1).abs() <= largest, 1.0, scales)
    return scales.tolist() if is_same_change(columns @ scales, target, torch.zeros_like(target), largest) else None


class _Capturing(ModuleWrapper):
    """Wrapper that runs a module and reports its contribution to the stream and its attention weights."""

    _point: CapturePoint | None
    _on_value: Callable[[torch.Tensor], None]
    _on_attention: Callable[[PreviousTokenAttention], None] | None
    _shape: Callable[[], torch.Size | None]
    _recorder_class: type[PreviousTokenAttention]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shape = self._shape()
        if shape is None:  # capturing is switched off at present
            return self.module(*args, **kwargs)
        point, residual = self._point, None
        if point is not None and point.residual is not None:
            residual = (args[point.residual] if isinstance(point.residual, int) else kwargs[point.residual]).clone()
        if self._on_attention is None:
            output = self.module(*args, **kwargs)
        else:
            with self._recorder_class(shape[-1]) as recorder:
                output = self.module(*args, **kwargs)
            self._on_attention(recorder)
        if point is not None:
            value = first_tensor(output)
            assert value is not None
            value = value.view(*shape, -1)
            self._on_value(value if residual is None else value - residual.view(value.shape))
        return output


@contextmanager
def capture_contributions(
    block: nn.Module,
    capture_points: Sequence[tuple[CapturePoint, Callable[[torch.Tensor], None]]],
    mixers: Sequence[str],
    on_attention: Callable[[PreviousTokenAttention], None] | None,
    shape: torch.Size | Callable[[], torch.Size | None],
    recorder_class: type[PreviousTokenAttention] = PreviousTokenAttention,
) -> Iterator[None]:
    """Call functions with the contributions of a block each time it runs inside the context.

    A contribution is passed on as (batch, tokens, width), before anything is added to it in place.

    Args:
        block: the block.
        capture_points: each capture point with the function that is called with its contribution. If the module adds
            the residual itself, the residual is subtracted first.
        mixers: paths of the modules whose attention is recorded.
        on_attention: called with the recorder of each mixer after the mixer has run; None to record no attention.
        shape: (batch, tokens) of the stream, or a function that returns it, or returns None while nothing is to be
            captured.
        recorder_class: the class that records attention.
    """
    point_by_path = {point.path: (point, on_value) for point, on_value in capture_points}
    paths = list(dict.fromkeys([*point_by_path, *(mixers if on_attention is not None else ())]))
    capture_slots = [(block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in paths]
    current_shape = shape if callable(shape) else lambda: shape
    wrappers = []
    for (parent, key), path in zip(capture_slots, paths, strict=True):
        module = parent._modules[key]
        assert module is not None
        point, on_value = point_by_path.get(path, (None, None))
        wrappers.append(
            _Capturing(
                module,
                _point=point,
                _on_value=on_value,
                _on_attention=on_attention if path in mixers else None,
                _shape=current_shape,
                _recorder_class=recorder_class,
            )
        )
    with replace_modules(capture_slots, wrappers):
        yield
