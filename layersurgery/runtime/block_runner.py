"""A model's blocks, to be called one by one and in any order, each with the arguments that it gets at its own place.

The model's own forward runs once; stand-ins in the list of blocks keep what each block is given (mask, positions, rotary
embedding: right for that very block), and the list is as it was before any block is called by hand. No forward hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..models.anatomy import Anatomy, probe_forward
from ..models.block_list import find_decoder_blocks
from ..models.block_view import share_parameters
from ..models.call_tracing import Call, ModuleWrapper, Where, eval_no_grad, first_tensor, replace_modules
from ..models.skipped_branch import install_skips
from ..plans.route import Visit
from .compiled_blocks import Compiler
from .offload import OffloadedWeights, offload_hooks, offloaded_outside_blocks


@dataclass(frozen=True, slots=True)
class CallConvention:
    """How one block is called.

    Attributes:
        stream: the argument that holds the residual stream.
        beside: what it returns beside the stream, where it returns a tuple or list; None where it returns the stream itself.
        overwrites: whether it adds to its input in place.
    """

    stream: Where
    extra_outputs: tuple[Any, ...] | None
    overwrites: bool


@dataclass(slots=True)
class ForwardRecord:
    """What one forward of the unedited model has left.

    Attributes:
        given: for each block, its arguments but for the stream.
        states: residual streams that were asked for, by number: k is what block k is given, `depth` what the last returned.
        passed: the residual stream before and after the block that has just been run, while its context (`Beside`) ends.
    """

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    last_block: tuple[torch.Tensor, torch.Tensor] | None = None


AroundBlock = Callable[[int, ForwardRecord], AbstractContextManager[None]]


class _StopForwardError(Exception):
    """Ends a forward behind the last block; what follows is done otherwise."""


class BlockRunner:
    """The blocks of a model in evaluation mode.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        anatomy: the model's.
        compiled: call blocks compiled by torch where they are called one by one.

    Attributes:
        blocks: themselves.
        habits: how each block is called.
        width: numbers of the residual stream for each token.
        compiler: calls blocks compiled, if that was asked for.
        residence: brings weights in that are elsewhere.
        around: modules outside the blocks whose weights are elsewhere.

    Raises:
        UnsupportedEditError: blocks hand on more than the stream to each other.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, *, compiled: bool = False) -> None:
        self.model, self.anatomy = model, anatomy
        self.compiler = Compiler() if compiled else None
        found = find_decoder_blocks(model, anatomy.blocks)
        self.path, self._list = found.path, found.blocks
        self.blocks = tuple(found.blocks)  # while stand-ins are in the list, these are still the blocks
        self.offloaded = OffloadedWeights()
        self.offloaded_outside = offloaded_outside_blocks(model, found.blocks)
        self.conventions, self.width = self._observed()
        self._views: dict[Visit, nn.Module] = {}

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def _places(self) -> list[tuple[nn.Module, str]]:
        return [(self._list, str(number)) for number in range(self.depth)]

    def _observed(self) -> tuple[tuple[CallConvention, ...], int]:
        observers = [_Observer(block) for block in self.blocks]
        with self.inference_mode(), replace_modules(self._places(), observers):
            probe_forward(self.model)
        earlier: dict[tuple[int, torch.Size], int] = {}
        for number, observer in enumerate(observers):
            for tensor in _tensors([value for where, value in observer.arguments() if where != observer.where]):
                if (source := earlier.get((tensor.data_ptr(), tensor.shape))) is not None:
                    raise UnsupportedEditError(
                        f"{type(self.model).__name__}: block {source} hands block {number} more than the residual stream (a tensor of shape "
                        f"{tuple(tensor.shape)}), so blocks cannot be run in another order by themselves"
                    )
            beside = observer.output[1:] if isinstance(observer.output, tuple | list) else ()
            earlier |= {(tensor.data_ptr(), tensor.shape): number for tensor in _tensors(beside) if tensor.numel()}
        return tuple(observer.habit() for observer in observers), observers[0].before.shape[-1]

    @contextmanager
    def inference_mode(self) -> Iterator[None]:
        """Evaluation mode, no gradients, nothing compiled anew; what surrounds the blocks has its weights at hand."""
        with (
            eval_no_grad(self.model),
            torch.compiler.set_stance("force_eager"),
            self.offloaded.loaded(*self.offloaded_outside),
        ):
            yield

    def record(self, inputs: dict[str, Any], keep: Collection[int], around: AroundBlock | None = None) -> ForwardRecord:
        """Run the model up to its last block, once, and keep what the blocks are given.

        Args:
            inputs: keyword arguments of the model's forward.
            keep: numbers of the residual streams to keep.
            beside: makes a context for each block's number, in which the block is run.
        """
        record = ForwardRecord()
        recorders = [_Recorder(block, place, self, record, keep, around) for place, block in enumerate(self.blocks)]
        with replace_modules(self._places(), recorders), suppress(_StopForwardError):
            self.model(**inputs)
        return record

    def run(self, record: ForwardRecord, visit: Visit, stream: torch.Tensor) -> torch.Tensor:
        """The residual stream after one visit of a block, (batch, length, width); `stream` is left as it is."""
        habit, block = self.conventions[visit.block], self.block(visit)
        args, kwargs = record.arguments[visit.block]

        def bind(stream: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if isinstance(habit.stream, int):
                return (*args[: habit.stream], stream, *args[habit.stream + 1 :]), kwargs
            return args, {**kwargs, habit.stream: stream}

        place = next((parameter.device for parameter in block.parameters() if not parameter.is_meta), stream.device)
        stream = stream.to(place)
        given = stream.clone() if habit.overwrites else stream
        version = _version(given)
        if self.compiler is None:
            given_args, given_kwargs = bind(given)
            output = block(*given_args, **given_kwargs)
        else:
            output = self.compiler(block, given, bind)
        after = first_tensor(output)
        assert after is not None
        assert habit.overwrites or _version(given) == version, f"block {visit.block} has overwritten its input"
        return after

    def block(self, visit: Visit) -> nn.Module:
        """The module of a visit: the block itself, or a view of it in which a branch is silent."""
        if visit.whole:
            return self.blocks[visit.block]
        if visit in self._views:
            return self._views[visit]
        silent = share_parameters(self.blocks[visit.block])
        install_skips(silent, self.anatomy.skip_specs(visit))
        # Where weights come and go, a view has those that are there when it is made.
        if not any(True for module in silent.modules() for _ in offload_hooks(module)):
            self._views[visit] = silent
        return silent

    @contextmanager
    def with_final_stream(self, stream: torch.Tensor) -> Iterator[None]:
        """Inside, the model's own forward computes no block: whatever it is given, its blocks end in `stream`."""
        ends = [
            _End(block, stream, habit.extra_outputs) for block, habit in zip(self.blocks, self.conventions, strict=True)
        ]
        with replace_modules(self._places(), ends):
            yield


class _Observer(ModuleWrapper):
    """Runs a block once, and looks at how it treats its arguments."""

    where: Where
    output: Any
    before: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = args, kwargs
        where = Call("", args, kwargs).hidden_states_argument()
        if where is None:
            raise UnsupportedEditError("a block is not given a residual stream of (1, tokens, width)")
        self.where = where
        self.stream = args[where] if isinstance(where, int) else kwargs[where]
        self.before = self.stream.clone()
        self.output = self.module(*args, **kwargs)
        return self.output

    def arguments(self) -> list[tuple[Where, Any]]:
        return [*enumerate(self.args), *self.kwargs.items()]

    def habit(self) -> CallConvention:
        beside = tuple(self.output[1:]) if isinstance(self.output, tuple | list) else None
        return CallConvention(self.where, beside, not torch.equal(self.before, self.stream))


class _Recorder(ModuleWrapper):
    """Runs a block and notes on the tape what it was given."""

    def __init__(
        self,
        module: nn.Module,
        place: int,
        runner: BlockRunner,
        record: ForwardRecord,
        keep: Collection[int],
        beside: AroundBlock | None,
    ) -> None:
        super().__init__(module)
        # Past nn.Module's own bookkeeping: the stack is no part of this module.
        vars(self).update(_place=place, _runner=runner, _record=record, _keep=keep, _beside=beside)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        place, record = self._place, self._record
        habit: CallConvention = self._runner.conventions[place]
        where = habit.stream
        stream = args[where] if isinstance(where, int) else kwargs[where]
        if place in self._keep:
            record.states[place] = stream.clone() if habit.overwrites else stream
        if isinstance(where, int):
            record.arguments.append(((*args[:where], None, *args[where + 1 :]), kwargs))
        else:
            record.arguments.append((args, {name: value for name, value in kwargs.items() if name != where}))
        with nullcontext() if self._beside is None else self._beside(place, record):
            before = stream.clone() if habit.overwrites and self._beside is not None else stream
            output = self.module(*args, **kwargs)
            if (after := first_tensor(output)) is not None:
                record.last_block = before, after
        record.last_block = None
        if place < self._runner.depth - 1:
            return output
        record.states[place + 1] = first_tensor(output)
        raise _StopForwardError


class _End(ModuleWrapper):
    """Stands for a block, computes nothing, and returns one given stream."""

    def __init__(self, module: nn.Module, stream: torch.Tensor, beside: tuple[Any, ...] | None) -> None:
        super().__init__(module)
        self.stream, self.beside = stream, beside

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.stream if self.beside is None else (self.stream, *self.beside)


def _version(tensor: torch.Tensor) -> int:
    """Counts what was written to a tensor, where torch keeps count."""
    return 0 if tensor.is_inference() else tensor._version


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
