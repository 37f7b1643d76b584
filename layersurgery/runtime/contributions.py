"""What each branch of a block adds to the residual stream, caught while the block runs.

A branch's module may return something else than what is added: a norm or a multiplier comes behind it, or it adds the residual itself.
So every block is run once on random numbers, and what it adds is explained as a weighted sum of what its parts return; a block where
that leaves a remainder is left out by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.anatomy import probe_forward
from ..models.block_parts import BlockParts
from ..models.call_tracing import Call, ModuleWrapper, first_tensor, random_like, replace_modules
from ..models.skipped_branch import SkipSpec
from ..models.weight_conventions import fit_norm
from ..plans.edits import Branch
from .attention_weights import PreviousTokenAttention
from .block_runner import BlockRunner

BRANCHES: tuple[Branch, Branch] = ("attention", "mlp")
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
_HALF = 0.03
_ONE = {torch.float64: 1e-6, torch.float32: 1e-4}
_SMALL = 0.1


@dataclass(frozen=True, slots=True)
class CapturePoint:
    """A place in a block where something that is added to the stream can be caught.

    Attributes:
        part: the branch.
        path: the module that returns it, within the block.
        residual: the argument that it adds to its output itself.
        times: what the block multiplies it by.
    """

    branch: Branch
    path: str
    residual: int | str | None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class BlockContributions:
    """A block, as far as its branches can be told apart.

    Attributes:
        taps: of the branches that can be caught; a branch without any adds nothing.
        mixers: modules that mix tokens.
        names: their classes.
        attends: whether a kernel tells what its tokens attend to.
        fault: why contributions cannot be caught; empty where they can.
        blind: why attention cannot be read; empty where it can.
    """

    capture_points: tuple[CapturePoint, ...]
    mixers: tuple[str, ...]
    names: str
    attends: bool
    error: str = ""
    attention_error: str = ""

    def has(self, branch: Branch) -> bool:
        """Whether there is such a branch, to be caught."""
        return any(tap.branch == branch for tap in self.capture_points)


def find_contributions(runner: BlockRunner, *, check_attention: bool = True) -> list[BlockContributions]:
    """All blocks of a model, found by running it once on seven tokens, with each block running twice.

    Args:
        runner: the blocks.
        look: see whether attention tells what it attends to.
    """
    trials = [
        _ContributionProbe(block, runner, number, look=check_attention) for number, block in enumerate(runner.blocks)
    ]
    places = [(runner.model.get_submodule(runner.path), str(number)) for number in range(runner.depth)]
    with runner.inference_mode(), replace_modules(places, trials):
        probe_forward(runner.model)
    return [trial.found for trial in trials]


def reads_are_mean_free(runner: BlockRunner) -> bool:
    """Whether all that reads the stream takes its mean over channels away first, so that the mean of what is written means nothing."""
    model = runner.model
    like = next((parameter for parameter in model.parameters() if not parameter.is_meta), torch.zeros(1)).detach()
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
            held = next(iter(norm.parameters()), like)
            gain = fit_norm(norm, runner.width, like if held.is_meta else held.detach())
            if gain is None or not gain.centres:
                return False
    return True


class _ContributionProbe(ModuleWrapper):
    """Stands for a block in one small forward, and finds its taps on random numbers beside it."""

    found: BlockContributions

    def __init__(self, block: nn.Module, runner: BlockRunner, number: int, *, look: bool) -> None:
        super().__init__(block)
        # Past nn.Module's own bookkeeping: the stack is no part of this module.
        vars(self).update(_runner=runner, _number=number, _look=look)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        runner: BlockRunner = self._runner
        parts = runner.anatomy.parts(self._number)
        habit = runner.conventions[self._number]
        call = Call("", args, kwargs)
        stream = random_like(call[habit.stream], 7)
        # Small beside what the block adds, so that little of that is lost in rounding.
        stream = (stream * (_SMALL / stream.float().std().clamp(min=1e-30))).to(stream.dtype)
        given_args, given_kwargs = call.with_argument(habit.stream, stream)

        def run() -> torch.Tensor | None:
            return first_tensor(self.module(*given_args, **given_kwargs))

        self.found = _block_contributions(self.module, parts, stream, run, look=self._look)
        return self.module(*args, **kwargs)


def _block_contributions(
    block: nn.Module, parts: BlockParts, stream: torch.Tensor, run: Callable[[], torch.Tensor | None], *, look: bool
) -> BlockContributions:
    taps = [] if parts.fault else [*_capture_points(parts, "attention"), *_capture_points(parts, "mlp")]
    mixers = parts.attention
    returned: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Callable[[torch.Tensor], None]:
        return lambda value: returned.__setitem__(number, value.clone())

    looking: list[PreviousTokenAttention] = []
    places = [(tap, keep(number)) for number, tap in enumerate(taps)]
    unseen = ""
    try:
        with capture_contributions(block, places, mixers, looking.append if look else None, stream.shape[:-1]):
            after = run()
    except NotImplementedError as error:  # a kernel that cannot be watched at all
        if not look:
            raise
        looking, unseen = [], str(error).partition(":")[0].partition(chr(10))[0]
        with capture_contributions(block, places, mixers, None, stream.shape[:-1]):
            after = run()
    names = ", ".join(dict.fromkeys(type(block.get_submodule(path)).__name__ for path in mixers))
    blind = ", ".join(sorted(set().union(*(seen.unknown for seen in looking)))) or unseen
    attends = not blind and any(seen.weights_BTK is not None for seen in looking)
    blind = (
        f"its attention kernel ({blind}) does not tell; attn_implementation='sdpa' on cpu or cuda does, and 'eager'"
        if blind
        else ""
    )
    fault = parts.fault
    if not fault and after is not None and taps:
        times = _explained(after - stream, [returned.get(number) for number in range(len(taps))])
        if times is None:
            fault = "what it adds to the stream is not a weighted sum of what its parts return"
        else:
            taps = [
                CapturePoint(tap.branch, tap.path, tap.residual, value) for tap, value in zip(taps, times, strict=True)
            ]
    return BlockContributions(() if fault else tuple(taps), mixers, names, attends, fault, blind)


def _capture_points(parts: BlockParts, part: Branch) -> Iterator[CapturePoint]:
    """The last modules of a branch: those that write, or the norms behind them."""
    skips = list(parts.skips(part))
    for number, skip in enumerate(skips):
        if (
            skip.passthrough
            or skip.path in parts.norms_after
            or (skip.residual is None and _normed(skips[number + 1 :], parts))
        ):
            continue
        yield CapturePoint(part, skip.path, skip.residual)
    for skip in skips:
        if skip.path in parts.norms_after:
            yield CapturePoint(part, skip.path, None)


def _normed(following: Sequence[SkipSpec], parts: BlockParts) -> bool:
    """Whether the stub before these is followed by a norm of its own."""
    return bool(following) and following[0].path in parts.norms_after


def _explained(added: torch.Tensor, values: Sequence[torch.Tensor | None]) -> list[float] | None:
    """Factors with which `values` add up to what a block has added, by least squares; None if they do not."""
    if any(value is None or value.shape != added.shape for value in values):
        return None
    given = torch.stack([value.flatten() for value in values if value is not None], 1).double().cpu()
    wanted = added.flatten().double().cpu()
    if not bool(given.isfinite().all()) or not bool(wanted.isfinite().all()):
        return None
    times = torch.linalg.lstsq(given, wanted[:, None], driver="gelsd").solution[:, 0]
    near = (times - 1).abs() <= _ONE.get(added.dtype, _HALF)
    times = torch.where(near, 1.0, times)
    tolerance = _TOLERANCE.get(added.dtype, _HALF)
    return times.tolist() if bool((given @ times - wanted).norm() <= tolerance * wanted.norm()) else None


class _Capturing(ModuleWrapper):
    """Runs a module, tells what it adds to the stream, and looks at its attention."""

    def __init__(
        self,
        module: nn.Module,
        tap: CapturePoint | None,
        tell: Callable[[torch.Tensor], None] | None,
        looks: Callable[[PreviousTokenAttention], None] | None,
        shape: Callable[[], torch.Size | None],
        looking: type[PreviousTokenAttention],
    ) -> None:
        super().__init__(module)
        vars(self).update(_tap=tap, _tell=tell, _looks=looks, _shape=shape, _looking=looking)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shape = self._shape()
        if shape is None:  # not now
            return self.module(*args, **kwargs)
        tap: CapturePoint | None = self._tap
        residual = None
        if tap is not None and tap.residual is not None:
            residual = (args[tap.residual] if isinstance(tap.residual, int) else kwargs[tap.residual]).clone()
        if self._looks is None:
            output = self.module(*args, **kwargs)
        else:
            with self._looking(shape[-1]) as look:
                output = self.module(*args, **kwargs)
            self._looks(look)
        if tap is not None:
            value = first_tensor(output)
            assert value is not None
            value = value.view(*shape, -1)
            self._tell(value if residual is None else value - residual.view(value.shape))
        return output


@contextmanager
def capture_contributions(
    block: nn.Module,
    capture_points: Sequence[tuple[CapturePoint, Callable[[torch.Tensor], None]]],
    mixers: Sequence[str],
    looks: Callable[[PreviousTokenAttention], None] | None,
    shape: torch.Size | Callable[[], torch.Size | None],
    looking: type[PreviousTokenAttention] = PreviousTokenAttention,
) -> Iterator[None]:
    """Inside, a block's taps tell what passes, as long as it is (batch, tokens, width) and before anybody adds to it in place.

    Args:
        block: the block.
        taps: places, and whom to tell; a module that adds the residual itself tells what it adds beside that.
        mixers: modules whose attention to look at.
        looks: is given what was seen of a mixer's attention; None not to look.
        shape: (batch, tokens) of the stream, or a function that gives it, or None while nobody wants to know.
        looking: how to look at them.
    """
    told = {tap.path: (tap, tell) for tap, tell in capture_points}
    paths = list(dict.fromkeys([*told, *(mixers if looks is not None else ())]))
    places = [(block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in paths]
    asked = shape if callable(shape) else lambda: shape
    stand_ins = []
    for (parent, key), path in zip(places, paths, strict=True):
        module = parent._modules[key]
        assert module is not None
        tap, tell = told.get(path, (None, None))
        stand_ins.append(_Capturing(module, tap, tell, looks if path in mixers else None, asked, looking))
    with replace_modules(places, stand_ins):
        yield
