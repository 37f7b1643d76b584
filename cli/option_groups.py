"""Group the options that commands have together: those of a measurement, of a checkpoint, of what is removed.

The names and defaults of a measurement's options are those of `layersurgery.runs.options.RunOptions`. A command has one
parameter of a group, and `expand` turns it into the options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer

from layersurgery.runs.options import NOT_FOR_COMPARE, SWEEP_ONLY, RunOptions

from . import options as o
from .expand import Group


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Options of a criterion that is a task."""

    limit: o.Limit = None
    shots: o.Shots = None
    task_path: o.TaskPath = None


def _count(option: str, what: str) -> Any:
    return typer.Option(option, min=1, help=f"Number of {what}.", metavar="N", show_default=False)


@dataclass(frozen=True, slots=True)
class GoalOptions:
    """Options that say what is removed, and how much."""

    remove: Annotated[int | None, _count("--remove", "layers to remove")] = None
    remove_attention: Annotated[int | None, _count("--remove-attention", "layers whose attention is skipped")] = None
    remove_mlp: Annotated[int | None, _count("--remove-mlp", "layers whose MLP is skipped")] = None
    remove_branches: Annotated[
        int | None, _count("--remove-branches", "branches to skip, chosen among all attentions and MLPs together")
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Share of all layers' cost to remove instead of a number: params=20%, flops=25% (multiplications for "
            "each token, estimated) or kv-cache=30% (bytes for each token). Skipped branches count as removed.",
            show_default=False,
            metavar="NAME=P%",
        ),
    ] = None
    of: Annotated[o.Of | None, typer.Option("--of", help="What a budget removes.", show_default="blocks")] = None
    keep: o.Keep = None


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """Options of the checkpoint that a command writes after it has measured."""

    link: o.Link = False
    verify: o.Verify = True
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output, and measurements made with other arguments.")
    ] = False


_SHOWN: dict[str, Any] = {
    "data": o.Data,
    "split": o.Split,
    "column": o.Column,
    "tokens": o.Tokens,
    "context": o.Context,
    "pack": o.Pack,
    "lines": o.Lines,
    "bos": o.Bos,
    "shuffle": o.Shuffle,
    "seed": o.Seed,
    "tokenizer": o.Tokenizer,
    "until": o.Until,
    "confidence": o.Confidence,
    "read": o.Read,
    "propagation": o.Propagation,
    "sources": o.BlockSources,
    "means": o.Means,
    "tails": o.Tails,
    "batch_size": o.BatchSize,
    "dtype": o.Dtype,
    "quantize": o.Quantize,
    "device": o.Device,
    "device_map": o.DeviceMap,
    "max_memory": o.MaxMemory,
    "offload_folder": o.OffloadFolder,
    "schedule": o.Order,
    "compile": o.Compile,
    "per_token": o.PerToken,
    "track": o.Track,
    "revision": o.Revision,
    "blocks": o.BlockList,
    "trust_remote_code": o.TrustRemoteCode,
}


def _group(*without: str, only: tuple[str, ...] = (), shown: dict[str, Any] | None = None, **defaults: Any) -> Group:
    names = [name for name in _SHOWN if name not in without and (not only or name in only)]
    return Group({name: (shown or {}).get(name, _SHOWN[name]) for name in names}, defaults)


_MODEL = (
    "dtype", "quantize", "device", "device_map", "max_memory", "offload_folder", "revision", "blocks",
    "trust_remote_code",
)  # fmt: skip
_SEARCHED = {
    "tokens": Annotated[
        str,
        typer.Option(
            "--tokens",
            "-n",
            help="Maximum number of tokens to search for windows.",
            metavar="N",
            rich_help_panel=o.TEXT,
        ),
    ],
}


def _fields_of(kind: type[Any]) -> Group:
    """Return the fields of a dataclass as options; their annotations are what the terminal shows."""
    return Group(get_type_hints(kind, include_extras=True), {}, kind)


TaskCriterion = Annotated[TaskOptions, _fields_of(TaskOptions)]
RemovalGoal = Annotated[GoalOptions, _fields_of(GoalOptions)]
Checkpoint = Annotated[CheckpointOptions, _fields_of(CheckpointOptions)]
SweepRun = Annotated[RunOptions, _group()]
TextRun = Annotated[RunOptions, _group(*SWEEP_ONLY, "schedule", "compile", "per_token")]
FitRun = Annotated[RunOptions, _group(*SWEEP_ONLY, "schedule", "compile", "per_token", "track")]
WindowsRun = Annotated[
    RunOptions,
    _group(*SWEEP_ONLY, "context", "pack", "schedule", "compile", "per_token", "track", shown=_SEARCHED, tokens="1M"),
]
_TRAINED = {
    "dtype": Annotated[
        str,
        typer.Option(
            "--dtype",
            help="Data type of the trained model's weights: float32, bfloat16, float16, or auto for the checkpoint's "
            "own. With --how full, float32.",
            metavar="NAME",
            rich_help_panel=o.EXECUTION,
        ),
    ],
    "batch_size": Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            min=1,
            help="Sequences in one step, of all processes together.",
            show_default="about 4,096 tokens",
            metavar="N",
            rich_help_panel=o.EXECUTION,
        ),
    ],
    "tokens": Annotated[
        str | None,
        typer.Option(
            "--tokens",
            "-n",
            help="Number of tokens, for example 100k or 1M; the last twentieth is held out.",
            show_default="as many as the steps need",
            metavar="N",
            rich_help_panel=o.TEXT,
        ),
    ],
    "seed": Annotated[
        int,
        typer.Option(
            "--seed",
            help="Seed for shuffling, for the order of the sequences and for LoRA's first matrices.",
            metavar="N",
            rich_help_panel=o.TEXT,
        ),
    ],
}
HealRun = Annotated[
    RunOptions,
    _group(
        *SWEEP_ONLY, "schedule", "compile", "per_token", "quantize", "device_map", "max_memory", "offload_folder",
        shown=_TRAINED,
    ),
]  # fmt: skip
WeightsRun = Annotated[RunOptions, _group(only=_MODEL)]
PairsRun = Annotated[RunOptions, _group(only=("split", "bos", "seed", "tokenizer", "batch_size", *_MODEL))]
ReproduceRun = Annotated[
    RunOptions, _group(*SWEEP_ONLY, "tokenizer", "schedule", "compile", "per_token", "track", "revision", "blocks")
]
CompareRun = Annotated[
    RunOptions, _group(*NOT_FOR_COMPARE, "schedule", "compile", "revision", "per_token", "track", "blocks")
]
