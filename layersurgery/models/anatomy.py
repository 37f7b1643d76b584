"""Describe a loaded model: where its blocks are, what they contain, and which modules are around them.

The structure suggests the parts, and running the model confirms them: one small forward pass is recorded, and one
block of each kind is run a few times on random numbers. There is no table of architectures.

>>> import layersurgery as ls
>>> model, tokenizer = ls.load("smollm2-135m")
>>> ls.anatomy(model).depth
30
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..plans.visit import BRANCHES, Visit
from ..units import format_list
from .block_list import BlockList, find_decoder_blocks, unwrap_transformers
from .block_parts import BlockParts, find_block_parts
from .block_probe import probe_forward
from .call_tracing import Call, eval_no_grad, first_tensor, record_calls
from .means import Means, mean_specs
from .memory_only import refuse_memory_only
from .skipped_branch import SkipSpec

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Structure of a model.

    Attributes:
        model: name of the model's class.
        blocks: path of the list of decoder blocks.
        kinds: class name and parts of each kind of block.
        kind_of: for each block, the index of its kind in `kinds`.
        signatures: for each kind, what all its blocks have in common: classes of modules, names and shapes of
            parameters.
        embedding: path of the token embedding.
        final_norm: path of the norm after the last block; None if there is none.
        unembedding: path of the projection to the vocabulary; None if the model has none.
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
        """Return the number of blocks."""
        return len(self.kind_of)

    def parts(self, block: int) -> BlockParts:
        """Return the parts of one block."""
        return self.kinds[self.kind_of[block]][1]

    def skip_specs(self, visit: Visit, means: Means | None = None) -> tuple[SkipSpec, ...]:
        """Return the specs that replace the branches which a visit skips, or whose mean it adds.

        Args:
            visit: the visit.
            means: the means of the model, if the visit adds any.

        Raises:
            UnsupportedEditError: the branch cannot be skipped; gives the reason.
            PlanError: the means are not known, or are of another model.
        """
        if visit.start:  # `later_tokens` changes what the branches return
            return ()
        parts, kind = self.parts(visit.block), self.kinds[self.kind_of[visit.block]][0]
        specs: list[SkipSpec] = []
        missing = {*BRANCHES} if visit.mean == BRANCHES else set()  # a whole block may have one branch only
        for branch in (*visit.skipped, *visit.mean):
            if parts.skip_error:
                raise UnsupportedEditError(
                    f"no branch of block {visit.block} ({kind}) can be skipped: {parts.skip_error}"
                )
            if not parts.skips(branch) and branch not in missing:
                raise UnsupportedEditError(
                    f"block {visit.block} ({kind}) has no {branch} that could be skipped; drop it instead"
                )
            specs += parts.skips(branch) if branch in visit.skipped else ()
        of_branch = {branch: parts.skips(branch) for branch in BRANCHES}
        return (*specs, *mean_specs(of_branch, visit, means, self.depth))

    def rows(self) -> list[dict[str, str]]:
        """Return one row of text for each run of consecutive blocks of one kind."""
        rows = []
        for kind, run in groupby(range(self.depth), key=lambda block: self.kind_of[block]):
            blocks = list(run)
            name, parts = self.kinds[kind]
            layout = {None: "", True: "parallel", False: "in turn"}[parts.parallel]
            rows.append(
                {
                    "blocks": f"{blocks[0]}:{blocks[-1] + 1}" if len(blocks) > 1 else str(blocks[0]),
                    "kind": name,
                    "attention": ", ".join(parts.attention) or "none",
                    "MLP": ", ".join(parts.mlp) or "none",
                    "order": layout,
                    "norms before": ", ".join(parts.norms_before),
                    "norms after": ", ".join(parts.norms_after),
                    "writes the stream": ", ".join(_short([*parts.outputs("attention"), *parts.outputs("mlp")])),
                    "can be skipped": parts.skip_error or ", ".join(_skippable(parts)) or "nothing",
                }
            )
        return rows

    def _table(self) -> tuple[str, str, list[dict[str, str]]]:
        """Return a title, a line about what is around the blocks, and the rows without columns that are empty."""
        rows = self.rows()
        shown = [name for name in rows[0] if any(row[name] for row in rows)]
        return (
            f"{self.model}: {self.depth} blocks at {self.blocks}",
            f"embedding {self.embedding}, final norm {self.final_norm}, unembedding {self.unembedding}",
            [{name: row[name] for name in shown} for row in rows],
        )

    def __rich__(self) -> Table:
        from rich.table import Table

        title, around, rows = self._table()
        table = Table(title=title, caption=around)
        for name in rows[0]:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row.values())
        return table

    def _repr_html_(self) -> str:
        """Return the table as HTML, for notebooks."""
        title, around, rows = self._table()
        lines = [("th", list(rows[0])), *(("td", list(row.values())) for row in rows)]
        body = "".join(
            f"<tr>{''.join(f'<{cell}>{escape(text)}</{cell}>' for text in texts)}</tr>" for cell, texts in lines
        )
        return f"<p><b>{escape(title)}</b><br>{escape(around)}</p><table>{body}</table>"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def _skippable(parts: BlockParts) -> list[str]:
    """Name the branches that can be skipped."""
    return [name for name, skips in (("attention", parts.attention_skips), ("MLP", parts.mlp_skips)) if skips]


def _short(names: list[str]) -> list[str]:
    """Shorten parameter names: replace the numbers of experts by N, and omit biases and the ending .weight."""
    shortened = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name).removesuffix(".weight") for name in names)
    return [name for name in shortened if not name.endswith(".bias")]


def anatomy(model: nn.Module, *, blocks: str | None = None) -> Anatomy:
    """Describe a model by running it once on seven tokens, and one block of each kind a few more times.

    The model's mode, gradients and modules, and the state of random number generators, are restored.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        blocks: path of the list of blocks ("model.layers"), if it cannot be found automatically.

    Raises:
        PlanError: `model` is not a loaded model.
        UnsupportedEditError: the model does not run each block exactly once and in order, or cannot be run; says what
            was found.
    """
    block_list = find_decoder_blocks(model, blocks)
    refuse_memory_only(block_list.blocks)
    # Without this, a compiled model would be recompiled for seven tokens.
    with eval_no_grad(model), torch.compiler.set_stance("force_eager"):
        calls, final_norm = _record_blocks(model, block_list)
        _check_order(model, block_list, calls)
        kinds: list[tuple[str, BlockParts]] = []
        kind_numbers: dict[object, int] = {}
        kind_of = []
        for block, call in zip(block_list.blocks, calls, strict=True):
            signature = block_signature(block)
            if signature not in kind_numbers:
                kind_numbers[signature] = len(kinds)
                kinds.append((type(block).__name__, find_block_parts(block, call)))
            kind_of.append(kind_numbers[signature])
    return Anatomy(
        model=type(model).__name__,
        blocks=block_list.path,
        kinds=tuple(kinds),
        kind_of=tuple(kind_of),
        signatures=tuple(kind_numbers),
        embedding=_path_of(model, "get_input_embeddings"),
        final_norm=final_norm,
        unembedding=_path_of(model, "get_output_embeddings", block_list.path),
    )


def block_signature(block: nn.Module) -> object:
    """Return what two blocks of the same kind have in common: classes of modules, names and shapes of parameters."""
    return (
        tuple((name, type(module)) for name, module in block.named_modules()),
        tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters()),
    )


def _record_blocks(model: nn.Module, block_list: BlockList) -> tuple[list[Call], str | None]:
    """Return the blocks' calls in one small forward pass, and the path of the norm that reads the last output."""
    count = len(block_list.blocks)
    norms = dict(_modules_around(model, block_list.path))
    modules: list[tuple[nn.Module, str, str]] = [
        (block_list.blocks, str(block), f"block {block}") for block in range(count)
    ]
    modules += [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], path) for path in norms]
    with record_calls(modules) as recorded:
        probe_forward(model)
    calls = [call for call in recorded if call.name.startswith("block ")]
    last_output = first_tensor(calls[-1].output) if calls else None
    for call in recorded:
        argument = call.hidden_states_argument()
        if call.name in norms and argument is not None and last_output is not None:
            hidden = call[argument].flatten()
            if hidden.numel() == last_output.numel() and torch.equal(hidden, last_output.flatten().to(hidden.device)):
                return calls, call.name
    return calls, None


def _modules_around(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """List modules without weight matrices that are children of the modules which contain the list of blocks."""
    parts = path.split(".")
    ancestors = {".".join(parts[:length]) for length in range(len(parts))}
    return [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[0] in ancestors and name not in ancestors and name != path
        and not isinstance(module, nn.ModuleList | nn.ModuleDict)
        and not any(parameter.dim() > 1 for parameter in module.parameters())
    ]  # fmt: skip


def _check_order(model: nn.Module, block_list: BlockList, calls: list[Call]) -> None:
    """Refuse a model that does not pass one residual stream through each block once and in order."""
    order = [int(call.name.removeprefix("block ")) for call in calls]
    count = len(block_list.blocks)
    if order and order == sorted(set(order)) and len(order) < count:
        absent = format_list([str(block) for block in range(count) if block not in order])
        raise UnsupportedEditError(
            f"{type(model).__name__} does not run all of its {count} blocks on text alone (not {absent}), so edits of "
            "them cannot be measured on text"
        )
    if order != list(range(count)):
        shown = ", ".join(map(str, order[:12])) + (", ..." if len(order) > 12 else "") if order else "none"
        raise UnsupportedEditError(
            f"{type(model).__name__} does not run the {count} blocks at {block_list.path} once each "
            f"and in order (it ran {shown}), so reordering this list would not reorder the computation; if the decoder "
            "blocks are in another list, give its path: blocks=..."
        )
    for block, call in enumerate(calls):
        if any(
            hasattr(value, "get_seq_length") and value.get_seq_length() for value in (*call.args, *call.kwargs.values())
        ):
            raise UnsupportedEditError(
                f"{type(model).__name__} gives block {block} a key-value cache although use_cache is False (from "
                "prefix tuning?), and every separate call of a block would add to it; use the model without that cache"
            )
    for block, (before, after) in enumerate(pairwise(calls)):
        output, argument = first_tensor(before.output), after.hidden_states_argument()
        if output is not None and bool(output.isnan().any()):
            raise UnsupportedEditError(
                f"{type(model).__name__}: block {block} returns NaN on seven tokens; check its weights, or if the "
                "model is in half precision, try another `dtype`"
            )
        if output is None or argument is None or not torch.equal(output, after[argument].to(output.device)):
            raise UnsupportedEditError(
                f"{type(model).__name__}: the input of block {block + 1} is not the output of block {block}, so the "
                "blocks do not form one residual stream"
            )


def _path_of(model: nn.Module, getter: str, inside: str = "") -> str | None:
    """Return the path of the module that a getter of the model returns; None if there is none.

    Args:
        model: the model.
        getter: the method's name.
        inside: a path; where the model itself has no such module, the models on this path are asked.
    """
    names = inside.split(".")
    owners = [unwrap_transformers(model), *(model.get_submodule(".".join(names[:end])) for end in range(1, len(names)))]
    for owner in owners:
        try:
            target = getattr(owner, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if target is not None:
            return next((name for name, module in model.named_modules() if module is target), None)
    return None
