"""Call a model's blocks one by one, in any order, each with its own recorded arguments.

The model's own forward runs once. During it, wrappers in the list of blocks record each block's arguments (mask,
positions and rotary embedding, which may differ between blocks). The list is restored before any block is called by
hand. No forward hooks are used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..models.anatomy import Anatomy
from ..models.block_list import find_decoder_blocks
from ..models.block_probe import BlockProbe, probe_blocks, probe_forward
from ..models.block_view import share_parameters
from ..models.call_tracing import ArgumentKey, Call, ModuleWrapper, eval_no_grad, first_tensor, replace_modules
from ..models.later_tokens import find_later_tokens, install_later_tokens
from ..models.means import Means
from ..models.model_weights import ModelWeights
from ..models.parallel_blocks import add_output
from ..models.skipped_branch import SkipSpec, install_skips
from ..models.taken_blocks import TakenBlocks
from ..models.weight_change import install_changes
from ..plans.block_sources import check_name
from ..plans.visit import Visit
from .compiled_blocks import Compiler
from .offload import OffloadedWeights, offload_hooks, offloaded_outside_blocks


@dataclass(frozen=True, slots=True)
class CallConvention:
    """How one block is called, and how it returns the residual stream.

    Attributes:
        stream_argument: the argument that holds the residual stream.
        extra_outputs: values that the block returns after the stream, if it returns a tuple or list; None if it returns
            the stream itself.
        overwrites: whether the block adds to its input in place.
    """

    stream_argument: ArgumentKey
    extra_outputs: tuple[Any, ...] | None
    overwrites: bool


@dataclass(slots=True)
class ForwardRecord:
    """Values recorded during one forward of the unedited model.

    Attributes:
        arguments: each block's arguments, without the stream.
        states: the requested residual streams by number: k is the input of block k, `depth` is the output of the last
            block.
        last_block: the residual stream before and after the block that just ran, available while its context
            (`AroundBlock`) exits.
    """

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    last_block: tuple[torch.Tensor, torch.Tensor] | None = None


AroundBlock = Callable[[int, ForwardRecord], AbstractContextManager[None]]


class _StopForwardError(Exception):
    """Stop a forward after the last block: the caller computes the logits itself."""


class BlockRunner:
    """The blocks of a model, callable in any order in evaluation mode.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        anatomy: the model's anatomy.
        compiled: compile the blocks with torch when they are called one by one.
        taken: blocks of other checkpoints; None if none is run.
        means: the means of the model's branches, for visits that add them.

    Attributes:
        blocks: the block modules, in the model's order.
        conventions: how each block is called.
        width: size of the residual stream for each token.
        compiler: calls the blocks in compiled form; None if `compiled` is False.
        offloaded: loads and unloads weights that are kept in main memory or on disk.
        offloaded_outside: modules outside the blocks that have offloaded weights.

    Raises:
        UnsupportedEditError: a block passes more than the residual stream to another block.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        *,
        compiled: bool = False,
        taken: TakenBlocks | None = None,
        means: Means | None = None,
    ) -> None:
        self.model, self.anatomy, self.taken, self.means = model, anatomy, taken, means
        self.compiler = Compiler() if compiled else None
        block_list = find_decoder_blocks(model, anatomy.blocks)
        self.path, self._list = block_list.path, block_list.blocks
        self.blocks = tuple(block_list.blocks)  # stays the same while wrappers replace the entries of the list
        self.offloaded = OffloadedWeights()
        self.offloaded_outside = offloaded_outside_blocks(model, block_list.blocks)
        self.conventions, self.width = self._observe_conventions()
        self._views: dict[Visit, nn.Module] = {}
        self._weights = ModelWeights(model, self._list, anatomy)

    @property
    def depth(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)

    def _slots(self) -> list[tuple[nn.Module, str]]:
        return [(self._list, str(number)) for number in range(self.depth)]

    def _observe_conventions(self) -> tuple[tuple[CallConvention, ...], int]:
        observers = [_Observer(block) for block in self.blocks]
        with self.inference_mode(), replace_modules(self._slots(), observers):
            probe_forward(self.model)
        earlier: dict[tuple[int, torch.Size], int] = {}
        for number, observer in enumerate(observers):
            for tensor in _tensors([value for where, value in observer.arguments() if where != observer.where]):
                if (source := earlier.get((tensor.data_ptr(), tensor.shape))) is not None:
                    raise UnsupportedEditError(
                        f"{type(self.model).__name__}: block {source} hands block {number} more than the residual "
                        f"stream (a tensor of shape {tuple(tensor.shape)}), so the blocks cannot be run one by "
                        "one; measure single edits with compare, which runs the edited model as a whole"
                    )
            extra_outputs = observer.output[1:] if isinstance(observer.output, tuple | list) else ()
            earlier |= {
                (tensor.data_ptr(), tensor.shape): number for tensor in _tensors(extra_outputs) if tensor.numel()
            }
        return tuple(observer.convention() for observer in observers), observers[0].before.shape[-1]

    @contextmanager
    def inference_mode(self) -> Iterator[None]:
        """Set evaluation mode without gradients or new compilation, with the weights outside the blocks loaded."""
        with (
            eval_no_grad(self.model),
            torch.compiler.set_stance("force_eager"),
            self.offloaded.loaded(*self.offloaded_outside),
        ):
            yield

    def record(self, inputs: dict[str, Any], keep: Collection[int], around: AroundBlock | None = None) -> ForwardRecord:
        """Run the model once, up to its last block, and record the arguments of the blocks.

        Args:
            inputs: keyword arguments of the model's forward.
            keep: numbers of the residual streams to keep, see `ForwardRecord.states`.
            around: returns, for a block's number and the record, a context in which the block is run.
        """
        record = ForwardRecord()
        recorders = [
            _Recorder(block, _number=number, _runner=self, _record=record, _keep=keep, _around=around)
            for number, block in enumerate(self.blocks)
        ]
        with replace_modules(self._slots(), recorders), suppress(_StopForwardError):
            self.model(**inputs)
        return record

    def run(
        self, record: ForwardRecord, visit: Visit, stream: torch.Tensor, block: nn.Module | None = None
    ) -> torch.Tensor:
        """Return the residual stream after one visit of a block, (batch, length, width); `stream` is not changed.

        Args:
            record: the recorded forward of the same tokens.
            visit: the block, and what is changed in it.
            stream: the stream before it.
            block: the module to run, if it is not that of the visit.
        """
        if visit.zeroed:
            return stream
        convention = self.conventions[visit.block]
        is_temporary, block = block is not None or not visit.skips_only, block or self.block(visit)
        args, kwargs = record.arguments[visit.block]

        def bind(stream: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if isinstance(convention.stream_argument, int):
                return (*args[: convention.stream_argument], stream, *args[convention.stream_argument + 1 :]), kwargs
            return args, {**kwargs, convention.stream_argument: stream}

        device = next((parameter.device for parameter in block.parameters() if not parameter.is_meta), stream.device)
        stream = stream.to(device)
        block_input = stream.clone() if convention.overwrites else stream
        version = _version(block_input)
        if self.compiler is None or is_temporary:  # a view that is made for one call
            call_args, call_kwargs = bind(block_input)
            output = block(*call_args, **call_kwargs)
        else:
            output = self.compiler(block, block_input, bind)
        after = first_tensor(output)
        assert after is not None
        assert convention.overwrites or _version(block_input) == version, (
            f"block {visit.block} has overwritten its input"
        )
        return after

    def run_group(self, record: ForwardRecord, visits: Sequence[Visit], stream: torch.Tensor) -> torch.Tensor:
        """Return the residual stream after one block, or after parallel blocks that are given the same stream.

        Args:
            record: the recorded forward of the same tokens.
            visits: the blocks, and what is changed in them.
            stream: the stream before them.
        """
        total: torch.Tensor | None = None
        for visit in visits:
            output = self.run(record, visit.alone, stream)
            stream = stream.to(output.device)
            total = add_output(None if total is None else total.to(output.device), stream, output, visit.divisor)
        assert total is not None
        return total

    def block(self, visit: Visit) -> nn.Module:
        """Return the module of a visit: the block itself, or a view of it with other weights."""
        if visit.whole:
            return self.blocks[visit.block]
        if visit in self._views:
            return self._views[visit]
        changes = self._weights.changes(visit.of_own_block)
        view = share_parameters(self.blocks[visit.block]) if not visit.source else self._taken(visit).view(visit)
        install_changes(view, changes)
        install_skips(view, self._skips(visit))
        install_later_tokens(view, find_later_tokens(visit, self.anatomy.parts(visit.block)))
        # A view refers to the weights that are loaded when it is made, so a view of offloaded weights is not cached.
        # Nor is one with weights of its own: those of all heads of a model would not fit into memory together.
        if not changes and not any(True for module in view.modules() for _ in offload_hooks(module)):
            self._views[visit] = view
        return view

    def check(self, visit: Visit) -> None:
        """Check that the block of a visit can be changed as the visit says.

        Raises:
            UnsupportedEditError: it cannot; gives the reason.
            PlanError: the block does not have a head or neuron of a number, or a mean is not known.
        """
        if visit.source:
            self._taken(visit).check(visit)
        self._skips(visit)
        self._weights.changes(visit.of_own_block)

    def _skips(self, visit: Visit) -> tuple[SkipSpec, ...]:
        if visit.mean and self.means is not None:
            self.means.check_block(visit.block, self.blocks[visit.block])
        return self.anatomy.skip_specs(visit, self.means)

    def _taken(self, visit: Visit) -> TakenBlocks:
        if self.taken is None:
            check_name(visit.source, ())
        assert self.taken is not None
        return self.taken

    def probes(self, seed: int) -> list[BlockProbe]:
        """Return a probe of each block, which runs it on random numbers, with the blocks' calls in one small forward.

        To be called, and the probes to be run, in `inference_mode`.
        """
        return probe_blocks(self.model, self._list, seed)

    @contextmanager
    def with_final_stream(self, stream: torch.Tensor) -> Iterator[None]:
        """Make the model's own forward skip all blocks and use `stream` as the output of the last one."""
        wrappers = [
            _FinalStream(block, _stream=stream, _extra_outputs=convention.extra_outputs)
            for block, convention in zip(self.blocks, self.conventions, strict=True)
        ]
        with replace_modules(self._slots(), wrappers):
            yield


class _Observer(ModuleWrapper):
    """Wrapper that runs a block once and observes its calling convention."""

    where: ArgumentKey
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

    def arguments(self) -> list[tuple[ArgumentKey, Any]]:
        return [*enumerate(self.args), *self.kwargs.items()]

    def convention(self) -> CallConvention:
        extra_outputs = tuple(self.output[1:]) if isinstance(self.output, tuple | list) else None
        return CallConvention(self.where, extra_outputs, not torch.equal(self.before, self.stream))


class _Recorder(ModuleWrapper):
    """Wrapper that runs a block and adds its arguments to a forward record."""

    _number: int
    _runner: BlockRunner
    _record: ForwardRecord
    _keep: Collection[int]
    _around: AroundBlock | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        number, record = self._number, self._record
        convention = self._runner.conventions[number]
        where = convention.stream_argument
        stream = args[where] if isinstance(where, int) else kwargs[where]
        if number in self._keep:
            record.states[number] = stream.clone() if convention.overwrites else stream
        if isinstance(where, int):
            record.arguments.append(((*args[:where], None, *args[where + 1 :]), kwargs))
        else:
            record.arguments.append((args, {name: value for name, value in kwargs.items() if name != where}))
        with nullcontext() if self._around is None else self._around(number, record):
            before = stream.clone() if convention.overwrites and self._around is not None else stream
            output = self.module(*args, **kwargs)
            if (after := first_tensor(output)) is not None:
                record.last_block = before, after
        record.last_block = None
        if number < self._runner.depth - 1:
            return output
        assert after is not None
        record.states[number + 1] = after
        raise _StopForwardError


class _FinalStream(ModuleWrapper):
    """Wrapper that does not run its block and returns a fixed stream."""

    _stream: torch.Tensor
    _extra_outputs: tuple[Any, ...] | None

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._stream if self._extra_outputs is None else (self._stream, *self._extra_outputs)


def _version(tensor: torch.Tensor) -> int:
    """Return torch's count of in-place writes to a tensor; 0 for an inference tensor, which has no count."""
    return 0 if tensor.is_inference() else tensor._version


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
