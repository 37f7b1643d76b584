"""Folding norms into the weights behind them, and centring what reads and writes the stream: another set of weights for one function.

Weights are easier to look at that way: what a norm scales is in the matrix that reads it, and directions that nobody reads are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..models.anatomy import Anatomy, probe_forward
from ..models.anatomy import anatomy as find_anatomy
from ..models.block_list import text_config, unwrap_transformers
from ..models.call_tracing import TOKENS, Call, ModuleWrapper, first_tensor, random_like, record_calls, replace_modules
from ..models.weight_conventions import fit_norm, input_dim, output_dim
from ..runtime.block_runner import BlockRunner
from ..runtime.contributions import reads_are_mean_free
from ..runtime.inputs import model_inputs
from ..runtime.unembedding import Unembedding, find_readout

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(slots=True)
class FoldResult:
    """What `fold` has done.

    Attributes:
        folded: norms whose scale and shift are in the weights behind them now.
        centred: weights from which a mean was taken away.
        left: what could not be folded or centred, and why.
    """

    folded: list[str] = field(default_factory=list)
    centered: list[str] = field(default_factory=list)
    not_folded: dict[str, str] = field(default_factory=dict)


def fold(
    model: nn.Module, *, blocks: str | None = None, anatomy: Anatomy | None = None, unembedding: bool = True
) -> FoldResult:
    """Fold the scale and shift of each norm into the weights that read it, and centre weights, in place; the function stays the same.

    As in appendix D of the paper and in TransformerLens: (1) norms before attention and MLP and before the unembedding get the scale 1
    and the shift 0, and what reads them takes these over; (2) what reads a LayerNorm loses its mean over the inputs; (3) where all that
    reads the stream is a LayerNorm, what writes it (embeddings, output projections and their biases) loses its mean over the width; (4)
    the unembedding loses its mean over the vocabulary, which moves all logits of a token by the same number and changes no probability.
    Each step is tried on random numbers, and taken back and named where it changes what a block gives. A tied unembedding is untied, and the
    config says so. In half precision, weights are rounded anew: fold in float32.

    Args:
        model: a transformers causal language model, all of it in memory.
        blocks: path of the list of blocks ("model.layers"), where it cannot be found.
        anatomy: the model's, found if not given.
        unembedding: take step (4).

    Raises:
        UnsupportedEditError: its weights are kept elsewhere, or its blocks cannot be told apart.

    Example:
        >>> fold(model).left  # doctest: +SKIP
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedEditError("weights are kept on disk or elsewhere; load the model into memory to fold it")
    runner = BlockRunner(model, anatomy or find_anatomy(model, blocks=blocks))
    done = FoldResult()
    centre = reads_are_mean_free(runner)
    with runner.inference_mode():
        trials = [_FoldProbe(block, runner, number) for number, block in enumerate(runner.blocks)]
        places = [(model.get_submodule(runner.path), str(number)) for number in range(runner.depth)]
        with replace_modules(places, trials):
            probe_forward(model)
        for number, trial in enumerate(trials):
            for norm in runner.anatomy.parts(number).norms_before:
                _fold_norm(runner.blocks[number], f"{runner.path}.{number}.", norm, trial.run, runner.width, done)
        _fold_end(runner, done, unembedding=unembedding)
        if centre:
            _centre_writers(runner, trials, done)
        else:
            done.not_folded["what writes the stream"] = (
                "an RMSNorm reads the mean over channels, so it cannot be taken away"
            )
    return done


class _FoldProbe(ModuleWrapper):
    """Stands for a block in one small forward, and keeps how to run it on random numbers."""

    def __init__(self, block: nn.Module, runner: BlockRunner, number: int) -> None:
        super().__init__(block)
        # Past nn.Module's own bookkeeping: the stack is no part of this module.
        vars(self).update(_habit=runner.conventions[number])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call, where = Call("", args, kwargs), self._habit.stream
        stream = random_like(call[where], 8)
        vars(self).update(_call=call, _where=where, _stream=stream)
        return self.module(*args, **kwargs)

    def run(self) -> torch.Tensor:
        """What the block adds to a stream of random numbers."""
        args, kwargs = self._call.given(self._where, self._stream)
        after, stream = first_tensor(self.module(*args, **kwargs)), self._stream
        assert after is not None
        assert isinstance(stream, torch.Tensor)
        return after - stream


def _fold_norm(
    block: nn.Module, prefix: str, path: str, run: Callable[[], torch.Tensor], width: int, done: FoldResult
) -> None:
    norm, name = block.get_submodule(path), f"{prefix}{path}"
    before = run()
    gain = fit_norm(norm, width, before)
    if gain is None:
        done.not_folded[name] = f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm"
        return
    readers = _readers(block, path, run)
    undo = _Undo()
    try:
        if not readers:
            raise UnsupportedEditError("nothing reads it directly")
        for reader in readers:
            _fold_into(block.get_submodule(reader), gain.scale_D, gain.shift_D, width, undo, centre=gain.centres)
        _reset_norm(norm, gain.scale_D, undo)
        if not _same(run(), before):
            raise UnsupportedEditError("something else than these matrices reads it")
    except UnsupportedEditError as error:
        undo.all()
        done.not_folded[name] = str(error)
        return
    if any(True for _ in norm.parameters()):
        done.folded.append(name)
    if gain.centres:
        done.centered += [f"{prefix}{reader}" for reader in readers]


def _readers(block: nn.Module, norm: str, run: Callable[[], torch.Tensor]) -> list[str]:
    """Modules with matrices of their own that are given just what a norm returns."""
    paths = [
        name
        for name, module in block.named_modules()
        if name and any(p.dim() > 1 for p in module._parameters.values() if p is not None)
    ]
    places = [(block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], path) for path in (norm, *paths)]
    with record_calls(places) as log:
        run()
    outputs = [output for call in log.of_module(norm) if (output := first_tensor(call.output)) is not None]
    found = []
    for call in log.calls:
        given = [
            value
            for value in (*call.args, *call.kwargs.values())
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        ]
        if call.name != norm and any(
            value.numel() == output.numel() and torch.equal(value.flatten(), output.flatten())
            for value in given[:1]
            for output in outputs
        ):
            found.append(call.name)
    # A module that only hands it on to matrices inside does not read it itself.
    return [name for name in dict.fromkeys(found) if not any(inner.startswith(f"{name}.") for inner in found)]


def _fold_into(
    module: nn.Module, scale: torch.Tensor, shift: torch.Tensor, width: int, undo: _Undo, *, centre: bool
) -> None:
    """Have what reads a norm scale and shift by itself; where the norm centres, nobody misses its weights' mean over inputs."""
    shifted = bool(shift.abs().max() > 0)
    for name in _reading(module, width):
        weight = undo.keep(module, name)
        dim = input_dim(module, name, width)
        wide = weight.detach().double().movedim(dim, -1)
        moved = wide @ shift.to(weight.device)
        wide = wide * scale.to(weight.device)
        wide = wide - wide.mean(-1, keepdim=True) if centre else wide
        weight.copy_(wide.movedim(-1, dim))
        if shifted:
            if name != "weight" or weight.dim() != 2 or not hasattr(module, "bias"):
                raise UnsupportedEditError(f"{type(module).__name__}, which reads it, has no bias to take its shift")
            if isinstance(module.bias, torch.Tensor):
                bias = undo.keep(module, "bias")
                bias.copy_(bias.double() + moved)
            else:
                undo.add(module, "bias", nn.Parameter(moved.to(weight.dtype), requires_grad=weight.requires_grad))


def _reading(module: nn.Module, width: int) -> list[str]:
    """Weights of a module that read something as wide as the stream: its matrix; of experts, all but those that write."""
    names = [
        name
        for name, value in module._parameters.items()
        if value is not None and value.dim() > 1 and not name.endswith("bias")
    ]
    if len(names) == 1:
        return names
    outputs = ("down_proj", "w2", "output_linear", "wo", "fc2")
    found = [name for name in names if name not in outputs and width in module._parameters[name].shape[-2:]]  # type: ignore[union-attr]
    if not found:
        raise UnsupportedEditError(f"{type(module).__name__}, which reads it, has no weight that is known to")
    return found


def _reset_norm(norm: nn.Module, scale: torch.Tensor, undo: _Undo) -> None:
    """Give a norm the scale 1 and the shift 0, however it writes them down (Gemma's scale is 1 + weight)."""
    weight = norm._parameters.get("weight")
    if weight is not None:
        offset = scale - weight.detach().double().cpu()
        nearest = offset.mean().round()
        if bool((offset - nearest).abs().max() > 0.02 * scale.abs().max()):
            raise UnsupportedEditError(f"how the weight of {type(norm).__name__} makes its scale is not known")
        undo.keep(norm, "weight").fill_(1 - float(nearest))
    if norm._parameters.get("bias") is not None:
        undo.keep(norm, "bias").zero_()


def _fold_end(runner: BlockRunner, done: FoldResult, *, unembedding: bool) -> None:
    """The final norm into the unembedding."""
    model, path, head = runner.model, runner.anatomy.final_norm, runner.anatomy.unembedding
    readout = find_readout(runner)
    if head is None or path is None or not isinstance(readout, Unembedding) or readout.norm is None:
        done.not_folded[head or "unembedding"] = "the unembedding is not a plain matrix right behind the final norm"
        return
    module: Any = model.get_submodule(head)
    norm = model.get_submodule(path)
    ids = torch.arange(TOKENS)[None] % 2
    inputs = model_inputs(model, ids, torch.ones_like(ids))

    def run() -> torch.Tensor:
        logits: torch.Tensor = model(**inputs).logits
        return logits.log_softmax(-1)

    before = run()
    gain = fit_norm(norm, runner.width, module.weight.detach())
    undo = _Undo()
    try:
        if gain is None:
            raise UnsupportedEditError(f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm")
        _untie(model, module, undo)
        _fold_into(module, gain.scale_D, gain.shift_D, runner.width, undo, centre=gain.centres)
        _reset_norm(norm, gain.scale_D, undo)
        if unembedding and readout.cap is None:
            for name in ("weight", "bias"):
                if isinstance(getattr(module, name, None), torch.Tensor):
                    held = undo.keep(module, name)
                    held.copy_(held.double() - held.double().mean(0))
        if not _same(run(), before):
            raise UnsupportedEditError("something else than the unembedding reads it")
    except UnsupportedEditError as error:
        undo.all()
        done.not_folded[path] = str(error)
        return
    done.folded.append(path)
    if unembedding and readout.cap is not None:
        done.not_folded[f"mean of {head} over the vocabulary"] = (
            "a soft-cap behind it does not let a common number pass"
        )
    elif gain.centres or unembedding:
        done.centered.append(head)


def _untie(model: nn.Module, head: Any, undo: _Undo) -> None:
    inner: Any = unwrap_transformers(model)
    embedding = inner.get_input_embeddings()
    if embedding.weight is not head.weight:
        return
    undo.add(head, "weight", nn.Parameter(head.weight.detach().clone(), requires_grad=embedding.weight.requires_grad))
    for config in {id(config): config for config in (inner.config, text_config(model))}.values():
        if getattr(config, "tie_word_embeddings", False):
            undo.also(lambda config=config: setattr(config, "tie_word_embeddings", True))  # type: ignore[misc]
            config.tie_word_embeddings = False


def _centre_writers(runner: BlockRunner, trials: Sequence[_FoldProbe], done: FoldResult) -> None:
    """Take away the mean over the width of all that writes the stream; whoever reads it does not see that."""
    model = runner.model
    inside = {id(module) for block in runner.blocks for module in block.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and id(module) not in inside and module.weight.shape[1] == runner.width:
            _centre(module, "weight", 1)
            done.centered.append(f"{name}.weight")
    for number, trial in enumerate(trials):
        block, parts = runner.blocks[number], runner.anatomy.parts(number)
        names = [*parts.outputs("attention"), *parts.outputs("mlp")]
        if parts.fault or not names or any(not skip.savable for skip in (*parts.attention_skips, *parts.mlp_skips)):
            done.not_folded[f"what block {number} writes"] = (
                parts.fault or "the weights with which it writes cannot be told"
            )
            continue
        before = trial.run()
        undo = _Undo()
        for path in names:
            owner, _, key = path.rpartition(".")
            module = block.get_submodule(owner)
            undo.keep(module, key)
            weight = block.get_parameter(path)
            bias = weight.dim() == 1 or key.endswith("bias")
            _centre(module, key, weight.dim() - 1 if bias else output_dim(module, key, runner.width))
        after = trial.run()
        if _same(after, before - before.mean(-1, keepdim=True)):
            done.centered += [f"{runner.path}.{number}.{path}" for path in names]
        else:
            undo.all()
            done.not_folded[f"what block {number} writes"] = "it does not leave the block as it is written"


def _centre(module: nn.Module, name: str, dim: int) -> None:
    weight = module._parameters[name]
    assert weight is not None
    wide = weight.detach().double()
    weight.copy_(wide - wide.mean(dim, keepdim=True))


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= _TOLERANCE.get(wanted.dtype, 6e-2) * wanted.abs().max())


class _Undo:
    """What was there before."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def keep(self, module: nn.Module, name: str) -> nn.Parameter:
        """A parameter that is going to be overwritten."""
        held = module._parameters[name]
        assert held is not None
        copy = held.detach().clone()
        self._steps.append(lambda: held.copy_(copy))
        return held

    def add(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Put a new parameter into a module."""
        before = module._parameters.get(name)
        self._steps.append(lambda: module._parameters.__setitem__(name, before))
        module._parameters[name] = parameter

    def also(self, step: Callable[[], object]) -> None:
        """Something else to do."""
        self._steps.append(step)

    def all(self) -> None:
        """Put everything back, the last change first."""
        for step in reversed(self._steps):
            step()
