"""What a loaded transformers model is made of: where its blocks are, what they consist of, and what surrounds them.

Found by structure and confirmed by behaviour: one small forward is watched, and one block of each kind is run a few times on
random numbers. There is no table of architectures.

>>> print(anatomy(model))  # doctest: +SKIP
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..plans.edits import Branch
from ..plans.route import Visit
from .block_list import BlockList, find_decoder_blocks, unwrap_transformers
from .block_parts import BlockParts, find_block_parts
from .call_tracing import TOKENS, Call, eval_no_grad, first_tensor, record_calls
from .skipped_branch import SkipSpec

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What a model is made of.

    Attributes:
        model: its class.
        blocks: path of the list of decoder blocks.
        kinds: class and parts of each kind of block.
        kind_of: for each block, which kind it is.
        signatures: what all blocks of a kind have in common: classes of modules, names and shapes of parameters.
        embedding: path of the token embedding.
        final_norm: path of the norm behind the last block; None where there is none.
        unembedding: path of the projection to the vocabulary; None where the model has none.
    """

    model: str
    blocks: str
    kinds: tuple[tuple[str, BlockParts], ...]
    kind_of: tuple[int, ...]
    signatures: tuple[object, ...]
    embedding: str | None
    final_norm: str | None
    unembedding: str | None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.kind_of)

    def parts(self, block: int) -> BlockParts:
        """The parts of one block."""
        return self.kinds[self.kind_of[block]][1]

    def skip_specs(self, visit: Visit) -> tuple[SkipSpec, ...]:
        """Stand-ins for what a visit leaves out of its block.

        Raises:
            UnsupportedEditError: it cannot be left out; says why.
        """
        if visit.whole:
            return ()
        part: Branch = "attention" if visit.mlp else "mlp"
        parts, kind = self.parts(visit.block), self.kinds[self.kind_of[visit.block]][0]
        if parts.fault:
            raise UnsupportedEditError(f"no branch of block {visit.block} ({kind}) can be skipped: {parts.fault}")
        skips = parts.skips(part)
        if not skips:
            raise UnsupportedEditError(
                f"block {visit.block} ({kind}) has no {part} that could be skipped; drop it instead"
            )
        return skips

    def rows(self) -> list[dict[str, str]]:
        """One row for each run of blocks of one kind, as text."""
        rows = []
        for kind, run in groupby(range(self.depth), key=lambda block: self.kind_of[block]):
            numbers = list(run)
            name, parts = self.kinds[kind]
            layout = {None: "", True: "parallel", False: "in turn"}[parts.parallel]
            rows.append(
                {
                    "blocks": f"{numbers[0]}:{numbers[-1] + 1}" if len(numbers) > 1 else str(numbers[0]),
                    "kind": name,
                    "attention": ", ".join(parts.attention) or "none",
                    "MLP": ", ".join(parts.mlp) or "none",
                    "order": layout,
                    "norms before": ", ".join(parts.norms_before),
                    "norms after": ", ".join(parts.norms_after),
                    "writes the stream": ", ".join(_short([*parts.outputs("attention"), *parts.outputs("mlp")])),
                    "can be skipped": parts.fault or ", ".join(_skippable(parts)) or "nothing",
                }
            )
        return rows

    def __rich__(self) -> Table:
        from rich.table import Table

        rows = self.rows()
        where = f"embedding {self.embedding}, final norm {self.final_norm}, unembedding {self.unembedding}"
        table = Table(title=f"{self.model}: {self.depth} blocks at {self.blocks}", caption=where)
        for name in rows[0]:
            if any(row[name] for row in rows):
                table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*[value for name, value in row.items() if any(other[name] for other in rows)])
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def _skippable(parts: BlockParts) -> list[str]:
    return [name for name, skips in (("attention", parts.attention_skips), ("MLP", parts.mlp_skips)) if skips]


def _short(names: list[str]) -> list[str]:
    """Parameter names, experts' numbers and the ending .weight left out."""
    short = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name).removesuffix(".weight") for name in names)
    return [name for name in short if not name.endswith(".bias")]


def anatomy(model: nn.Module, *, blocks: str | None = None) -> Anatomy:
    """Find out what a model is made of, by running it once on seven tokens and one block of each kind a few times more.

    The model comes back as it was: mode, gradients, random numbers and modules.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        blocks: path of the list of blocks ("model.layers"), where it cannot be found.

    Raises:
        UnsupportedEditError: it does not run its blocks once each and in order, or cannot be run; with what was found.
    """
    found = find_decoder_blocks(model, blocks)
    # A compiled model would be compiled anew for seven tokens.
    with eval_no_grad(model), torch.compiler.set_stance("force_eager"):
        calls, final_norm = _recorded(model, found)
        _check_order(model, found, calls)
        kinds: list[tuple[str, BlockParts]] = []
        seen: dict[object, int] = {}
        kind_of = []
        for block, call in zip(found.blocks, calls, strict=True):
            kind = block_signature(block)
            if kind not in seen:
                seen[kind] = len(kinds)
                kinds.append((type(block).__name__, find_block_parts(block, call)))
            kind_of.append(seen[kind])
    return Anatomy(
        model=type(model).__name__,
        blocks=found.path,
        kinds=tuple(kinds),
        kind_of=tuple(kind_of),
        signatures=tuple(seen),
        embedding=_path_of(model, "get_input_embeddings"),
        final_norm=final_norm,
        unembedding=_path_of(model, "get_output_embeddings"),
    )


def block_signature(block: nn.Module) -> object:
    """What two blocks of one kind have in common."""
    return (
        tuple((name, type(module)) for name, module in block.named_modules()),
        tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters()),
    )


def _recorded(model: nn.Module, found: BlockList) -> tuple[list[Call], str | None]:
    """The calls of the blocks in one small forward, and the norm that reads what the last of them returned."""
    count = len(found.blocks)
    norms = dict(_beside(model, found.path))
    places: list[tuple[nn.Module, str, str]] = [
        (found.blocks, str(number), f"block {number}") for number in range(count)
    ]
    places += [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], path) for path in norms]
    with record_calls(places) as log:
        probe_forward(model)
    calls = [call for call in log.calls if call.name.startswith("block ")]
    last = first_tensor(calls[-1].output) if calls else None
    for call in log.calls:
        where = call.hidden_states_argument()
        if call.name in norms and where is not None and last is not None:
            given = call[where].flatten()
            if given.numel() == last.numel() and torch.equal(given, last.flatten().to(given.device)):
                return calls, call.name
    return calls, None


def record_block(model: nn.Module, blocks: nn.ModuleList, place: int) -> Call:
    """The call of one block in one small forward of its model.

    Raises:
        UnsupportedEditError: the model raised, or did not run the block.
    """
    with record_calls([(blocks, str(place), "block")]) as log:
        probe_forward(model)
    if not log.calls:
        raise UnsupportedEditError(f"{type(model).__name__} did not run its block {place}")
    return log.calls[0]


def _beside(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """Modules without matrices that stand beside the list of blocks or above it."""
    parts = path.split(".")
    above = {".".join(parts[:end]) for end in range(len(parts))}
    return [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[0] in above and name not in above and name != path
        and not isinstance(module, nn.ModuleList | nn.ModuleDict)
        and not any(parameter.dim() > 1 for parameter in module.parameters())
    ]  # fmt: skip


def probe_forward(model: nn.Module, tokens: int = TOKENS) -> None:
    """One forward without cache on one short sequence.

    Raises:
        UnsupportedEditError: the model raised.
    """
    try:
        model = unwrap_transformers(model)
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        ids = torch.arange(1, tokens + 1) % max(2, min(weight.shape[0], 64))
        model(input_ids=ids[None].to("cpu" if weight.is_meta else weight.device), use_cache=False)
    except Exception as error:  # a model's forward may raise anything
        raise UnsupportedEditError(
            f"{type(model).__name__} could not be run on {tokens} tokens ({type(error).__name__}: {str(error).partition(chr(10))[0]}), so what it is made of cannot be told"
        ) from error


def _check_order(model: nn.Module, found: BlockList, calls: list[Call]) -> None:
    ran = [int(call.name.removeprefix("block ")) for call in calls]
    if ran != list(range(len(found.blocks))):
        times = ", ".join(map(str, ran[:12])) + (", ..." if len(ran) > 12 else "") if ran else "none"
        raise UnsupportedEditError(
            f"{type(model).__name__} does not run the {len(found.blocks)} blocks at {found.path} once each and in order (it ran {times}), so "
            "moving them would not mean what it says; if the blocks are elsewhere, name their list: blocks=..."
        )
    for number, call in enumerate(calls):
        if any(
            hasattr(value, "get_seq_length") and value.get_seq_length() for value in (*call.args, *call.kwargs.values())
        ):
            raise UnsupportedEditError(
                f"{type(model).__name__} gives block {number} a key-value cache although none was asked for (a prefix that was tuned?), and every "
                "call of a block by itself would add to it; take the model without it"
            )
    for number, (before, after) in enumerate(pairwise(calls)):
        output, where = first_tensor(before.output), after.hidden_states_argument()
        if output is not None and bool(output.isnan().any()):
            raise UnsupportedEditError(
                f"{type(model).__name__}: block {number} returns NaN on seven tokens; look at its weights, or in half precision try another dtype"
            )
        if output is None or where is None or not torch.equal(output, after[where].to(output.device)):
            raise UnsupportedEditError(
                f"{type(model).__name__}: what block {number + 1} is given is not what block {number} returned, so the blocks are not one stream"
            )


def _path_of(model: nn.Module, getter: str) -> str | None:
    try:
        wanted = getattr(unwrap_transformers(model), getter)()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, module in model.named_modules() if module is wanted), None)
