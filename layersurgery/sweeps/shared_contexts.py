"""Pack requests so that a context that several of them share is run once.

A request is a sequence that ends with a continuation, of which only the predictions are read. Neighbouring requests
with the same context become a tree: the context, then one branch for each continuation, all in one sequence. A branch
sees the context and itself, and its positions go on where the context ends. Several trees, and requests that share
nothing, are put into one sequence as long as there is room; they do not see each other.

>>> import torch
>>> from layersurgery.sweeps.shared_contexts import fill_sequences, find_trees, pack_requests
>>> ids = torch.tensor([[5, 6, 7, 1, 2], [5, 6, 7, 3, 4]])
>>> reads = torch.tensor([[False, False, True, True]] * 2)
>>> requests = ids, torch.tensor([4, 4]), reads
>>> packed = pack_requests(*requests, fill_sequences(find_trees(*requests)))
>>> packed.ids.tolist(), packed.positions.tolist()
([[5, 6, 7, 1, 3]], [[0, 1, 2, 3, 3]])
>>> packed.visible[0, -1].int().tolist()  # the second branch does not see the first one
[1, 1, 1, 0, 1]
>>> packed.reads.positions.tolist(), packed.reads.targets.tolist(), packed.reads.counts
([2, 3, 2, 4], [1, 2, 3, 4], [2, 2])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .read_positions import ReadTokens

_PADDING = -1


@dataclass(frozen=True, slots=True)
class Tree:
    """Hold requests with one context; a single request is a tree, too.

    Attributes:
        context: number of tokens of the context.
        requests: numbers of the requests.
        length: number of tokens that are run.
    """

    context: int
    requests: tuple[int, ...]
    length: int


@dataclass(frozen=True, slots=True)
class PackedRequests:
    """Hold requests as sequences of trees, padded on the right.

    Attributes:
        ids: token ids, (sequences, length).
        positions: the position of each token in its request, the same shape.
        visible: True where a token (the second dimension) sees another one, (sequences, length, length).
        reads: what is read, by request in the order of the requests.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    reads: ReadTokens


def find_trees(ids: torch.Tensor, lengths: torch.Tensor, reads: torch.Tensor, longest: float = math.inf) -> list[Tree]:
    """Find neighbouring requests with the same context.

    Args:
        ids: tokens of the requests, (requests, length).
        lengths: number of tokens to run of each request, from its start.
        reads: True at the positions that are read, (requests, length - 1).
        longest: tokens of the longest tree; a context with more continuations is run several times.
    """
    trees: list[Tree] = []
    contexts = (reads.int().argmax(-1) + 1).tolist()
    rows = ids.tolist()
    for number, (length, context) in enumerate(zip(lengths.tolist(), contexts, strict=True)):
        if trees:
            last, before = trees[-1], rows[trees[-1].requests[0]]
            longer = last.length + length - context
            if context == last.context and longer <= longest and rows[number][:context] == before[:context]:
                trees[-1] = Tree(context, (*last.requests, number), longer)
                continue
        trees.append(Tree(context, (number,), length))
    return trees


def fill_sequences(trees: Sequence[Tree]) -> list[list[Tree]]:
    """Put trees into sequences as long as the longest tree: each into the first one that has room for it."""
    ordered = sorted(trees, key=lambda tree: -tree.length)
    sequences: list[list[Tree]] = []
    room: list[int] = []
    for tree in ordered:
        number = next((number for number, free in enumerate(room) if free >= tree.length), len(room))
        if number == len(room):
            sequences.append([])
            room.append(ordered[0].length)
        sequences[number].append(tree)
        room[number] -= tree.length
    return sequences


def pack_requests(
    ids: torch.Tensor, lengths: torch.Tensor, reads: torch.Tensor, sequences: Sequence[Sequence[Tree]]
) -> PackedRequests:
    """Put requests into sequences of trees.

    Args:
        ids: tokens of the requests, (requests, length).
        lengths: number of tokens to run of each request.
        reads: True at the positions that are read.
        sequences: the trees of each sequence; each request is in one of them.
    """
    shape = len(sequences), max(sum(tree.length for tree in sequence) for sequence in sequences)
    packed, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    tree_of, branch_of = torch.full(shape, _PADDING), torch.zeros(shape, dtype=torch.long)
    read_at: dict[int, torch.Tensor] = {}
    for row, sequence in enumerate(sequences):
        start = 0
        for number, tree in enumerate(sequence):
            context, end = slice(start, start + tree.context), start + tree.length
            packed[row, context] = ids[tree.requests[0], : tree.context]
            positions[row, context] = torch.arange(tree.context)
            tree_of[row, start:end] = number
            branch_start = context.stop
            for branch, request in enumerate(tree.requests):
                length = int(lengths[request])
                branch_end = branch_start + length - tree.context
                packed[row, branch_start:branch_end] = ids[request, tree.context : length]
                positions[row, branch_start:branch_end] = torch.arange(tree.context, length)
                branch_of[row, branch_start:branch_end] = branch + 1
                where = reads[request].nonzero()[:, 0]
                where = where + torch.where(where < tree.context, start, branch_start - tree.context)
                read_at[request] = row * shape[1] + where
                branch_start = branch_end
            start = end
    same_tree = tree_of[:, :, None] == tree_of[:, None]
    same_branch = branch_of[:, :, None] == branch_of[:, None]
    visible = (same_tree & (same_branch | (branch_of == 0)[:, None])).tril()
    where = torch.cat([read_at[request] for request in range(len(ids))])
    return PackedRequests(packed, positions, visible, ReadTokens(where, ids[:, 1:][reads], reads.sum(-1).tolist()))
