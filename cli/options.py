"""Define the options that several commands share.

The names and defaults of a measurement's options are those of `layersurgery.runs.options.RunOptions`; this module adds
what the terminal shows of each. A command has one parameter of such a group, and `expand` turns it into the options.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from layersurgery.plans.families import FAMILIES
from layersurgery.runs.options import NOT_FOR_COMPARE, SWEEP_ONLY, RunOptions

from . import completion
from .terminal.console import Console, SharingConsole

_MODEL_HELP = "Hub id, checkpoint directory, .gguf file, or smollm2-135m."
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False, autocompletion=completion.models)
]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help=f"{_MODEL_HELP[:-1]}; not needed if the recipe names it.",
        autocompletion=completion.models,
    ),
]
FirstModel = Annotated[str, typer.Argument(metavar="A", help=_MODEL_HELP, autocompletion=completion.models)]
PlanText = Annotated[
    str | None,
    typer.Option(
        "--plan",
        help="Edits, for example 'swap 12 13; drop 20'.",
        metavar="TEXT",
        autocompletion=completion.plans,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Directory to write the edited checkpoint to, or .gguf file.",
        show_default="./<name>-<plan>",
        metavar="DIR",
    ),
]
Gguf = Annotated[
    bool,
    typer.Option(
        "--gguf",
        help="Edit the model's GGUF file to a GGUF file; its quantised weights are copied as they are. An output whose "
        "name ends in .gguf means the same.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Run all checks, say what would be written and how large, and write nothing.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint at the output.")]
Link = Annotated[
    bool,
    typer.Option(
        "--link",
        help="Hard-link unchanged files to the source instead of copying them; a later change to such a file "
        "changes both.",
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Check that the edited checkpoint will reload as the intended model, else leave nothing (needs torch).",
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.", metavar="REV")]
Blocks = Annotated[
    str | None,
    typer.Option(
        "--blocks", help="Name prefix of the decoder blocks' tensors, if it is not found automatically.", metavar="NAME"
    ),
]
MeansFile = Annotated[
    Path | None,
    typer.Option(
        "--means",
        help="For edits that add means: the file of the branches' means (layersurgery means).",
        metavar="FILE",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout; messages go to stderr.")]
_SHARE = "Share"
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push",
        help="Upload what the command writes to this repository on the Hub, as one commit: a checkpoint to a model "
        "repository, results to a dataset repository. The token is checked before the work begins.",
        metavar="USER/NAME",
        show_default=False,
        rich_help_panel=_SHARE,
    ),
]
Public = Annotated[
    bool,
    typer.Option(
        "--public", help="Let everybody read the repository. Without it, a new one is private.", rich_help_panel=_SHARE
    ),
]
Layer = Annotated[
    int, typer.Option("--layer", "-l", help="Block number; negative numbers count from the end.", show_default=False)
]
Layers = Annotated[
    str,
    typer.Option("--layers", help="Half-open range of blocks, for example 8:16.", metavar="A:B", show_default=False),
]
RepeatedLayers = Annotated[
    list[str] | None,
    typer.Option("--layer", "-l", help="Block number; may be repeated.", metavar="N", show_default=False),
]
Range = Annotated[
    str | None,
    typer.Option("--layers", help="Half-open range of blocks, for example 20:24.", metavar="A:B", show_default=False),
]

BlockSources = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        help="Checkpoint that blocks are taken from, and its name in plans: base=MODEL or base=MODEL@REVISION. May be "
        "repeated.",
        metavar="NAME=MODEL",
        show_default=False,
    ),
]

_EDITS = "Edits to measure"
_TEXT = "Text"
_TASKS = "Tasks"
_PRECISION = "Precision"
_EXECUTION = "Execution"

Edits = Annotated[
    str | None,
    typer.Option(
        "--edits",
        help=f"Families of edits, comma-separated: {', '.join(family.usage for family in FAMILIES.values())}.",
        show_default="swap,drop; none with --plans",
        metavar="NAMES",
        autocompletion=completion.families,
        rich_help_panel=_EDITS,
    ),
]
Plans = Annotated[
    Path | None,
    typer.Option(
        "--plans",
        help="File of plans, one per line, for example 'name: drop 20:24'.",
        metavar="FILE",
        rich_help_panel=_EDITS,
    ),
]
LayerRange = Annotated[
    str | None,
    typer.Option(
        "--layers",
        help="Restrict the families of edits to these blocks, for example 4:20; with exit, the model ends after these.",
        metavar="A:B",
        rich_help_panel=_EDITS,
    ),
]
MaxSpan = Annotated[
    int | None,
    typer.Option(
        "--max-span",
        min=1,
        help="Longest span of the families of spans, and largest distance of two blocks in families of pairs.",
        show_default="no limit",
        metavar="N",
        rich_help_panel=_EDITS,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        help="Measure these tasks of lm-eval (multiple choice or log-likelihoods), for example "
        "lambada_openai,arc_easy; after the text if an option names one, such as --data, else alone. Needs the extra "
        "'tasks'.",
        metavar="NAMES",
        rich_help_panel=_TASKS,
    ),
]
Requests = Annotated[
    list[Path] | None,
    typer.Option(
        "--requests",
        help="Measure requests of your own like a task: a .jsonl file whose lines have a context and a continuation. "
        "May be repeated. Needs the extra 'tasks'.",
        metavar="FILE",
        show_default=False,
        rich_help_panel=_TASKS,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=1,
        help="Documents of each task.",
        show_default="all",
        metavar="N",
        rich_help_panel=_TASKS,
    ),
]
Shots = Annotated[
    int | None,
    typer.Option(
        "--shots",
        min=0,
        help="Examples before each document of a task.",
        show_default="the task's own number",
        metavar="N",
        rich_help_panel=_TASKS,
    ),
]
TaskPath = Annotated[
    list[Path] | None,
    typer.Option(
        "--task-path",
        help="Directory with task definitions of your own (.yaml); may be repeated.",
        metavar="DIR",
        show_default=False,
        rich_help_panel=_TASKS,
    ),
]


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Options of a criterion that is a task."""

    limit: Limit = None
    shots: Shots = None
    task_path: TaskPath = None


Keep = Annotated[
    str | None,
    typer.Option(
        "--keep",
        help="Layers that stay as they are, for example 0:2,-1: half-open ranges and numbers, also from the end.",
        show_default="none",
        metavar="LAYERS",
    ),
]


class Of(StrEnum):
    """What is ranked or removed."""

    blocks = "blocks"
    attention = "attention"
    mlp = "mlp"
    branches = "branches"


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
    of: Annotated[Of | None, typer.Option("--of", help="What a budget removes.", show_default="blocks")] = None
    keep: Keep = None


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """Options of the checkpoint that a command writes after it has measured."""

    link: Link = False
    verify: Verify = True
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output, and measurements made with other arguments.")
    ] = False


Heal = Annotated[
    str | None,
    typer.Option(
        "--heal",
        help="linear: fold a linear map, fitted on the same text, into the block before each cut (see heal-linear).",
        metavar="linear",
        show_default="not healed",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Text to measure on: a Hub dataset (id or id:configuration), a .txt, .jsonl, .json, .csv or .tsv file "
        "(also .zst or .gz), a .parquet file, a directory of these, a dataset saved with save_to_disk, or pydoc "
        "(Python's own help text).",
        show_default="EleutherAI/the_pile_deduplicated; pydoc for smollm2-135m and gemma3-270m",
        metavar="DATA",
        rich_help_panel=_TEXT,
    ),
]
Split = Annotated[
    str,
    typer.Option(
        "--split", help="Split of the Hub dataset or of the saved dataset.", metavar="NAME", rich_help_panel=_TEXT
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        "--column",
        help="Column that holds the texts, or conversations (lists of messages), which the tokenizer's chat template "
        "writes.",
        show_default="text, or else messages, conversations or conversation",
        metavar="NAME",
        rich_help_panel=_TEXT,
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        "-n",
        help="Number of tokens, for example 4096, 100k or 1M; rounded up to full sequences.",
        show_default="1M; 4096 for pydoc",
        metavar="N",
        rich_help_panel=_TEXT,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=2,
        help="Tokens per sequence.",
        show_default="2048 or the model's maximum; 512 for pydoc",
        metavar="N",
        rich_help_panel=_TEXT,
    ),
]
Pack = Annotated[
    bool | None,
    typer.Option(
        "--pack/--no-pack",
        help="Join documents and cut them into sequences of equal length, or use one document per sequence.",
        show_default="pack; no-pack with --lines",
        rich_help_panel=_TEXT,
    ),
]
Lines = Annotated[
    bool,
    typer.Option("--lines", help="Each line of a text file is one document, such as a prompt.", rich_help_panel=_TEXT),
]
Bos = Annotated[
    str,
    typer.Option(
        "--bos",
        help="Start every sequence with the beginning-of-text token; auto does what the tokenizer does.",
        metavar="auto|yes|no",
        rich_help_panel=_TEXT,
    ),
]
Shuffle = Annotated[
    bool | None,
    typer.Option(
        "--shuffle/--no-shuffle",
        help="Sample the text at random (from 16 times as much text, or from a buffer of 10,000 Hub documents), "
        "or take it from the start.",
        show_default="shuffle Hub datasets only",
        rich_help_panel=_TEXT,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed for shuffling.", metavar="N", rich_help_panel=_TEXT)]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", help="Model to take the tokenizer from, if not MODEL.", metavar="MODEL", rich_help_panel=_TEXT
    ),
]
Until = Annotated[
    str | None,
    typer.Option(
        "--until",
        help="Measure each edit until it is known this precisely, for example agreement=0.5pt,kl=2%: half of the "
        "interval's width, in percentage points (pt), nats or bits, or in % of the value. --tokens is then the most "
        "that is used. With --tasks also the name of a task: arc_easy=2pt is of the change of its accuracy.",
        show_default="measure all text",
        metavar="METRIC=AMOUNT,...",
        rich_help_panel=_PRECISION,
    ),
]
Confidence = Annotated[
    float,
    typer.Option(
        "--confidence",
        help="For --until: probability that an interval holds the true value.",
        metavar="P",
        rich_help_panel=_PRECISION,
    ),
]
Read = Annotated[
    str | None,
    typer.Option(
        "--read",
        help="Read predictions at a random share of the positions of each sequence, for example 1/4, or at a number "
        "of them, for example 64. The standard errors include what this adds.",
        show_default="all",
        metavar="SHARE",
        rich_help_panel=_PRECISION,
    ),
]
Propagation = Annotated[
    bool,
    typer.Option(
        "--propagation",
        help="Also write propagation.parquet: for each edit, how much what each later layer's attention and MLP add "
        "changes. This runs no more blocks.",
    ),
]
Means = Annotated[
    Path | None,
    typer.Option(
        "--means",
        help="For edits that add means, such as drop-mean: the file of the branches' means (layersurgery means). "
        "Without it, they are measured first, on the same text.",
        metavar="FILE",
        rich_help_panel=_EDITS,
    ),
]
Tails = Annotated[
    bool,
    typer.Option(
        "--tails",
        help="Also measure what quantizations are judged by: quantiles of KL over tokens, the RMS change of the true "
        "token's probability, the overlap of the five most likely tokens, and the expected calibration error.",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        "-b",
        min=1,
        help="Sequences per batch.",
        show_default="chosen from the free memory",
        metavar="N",
        rich_help_panel=_EXECUTION,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Data type of the weights: float32, bfloat16, float16, or auto for the checkpoint's own (on a CPU, "
        "float16 becomes float32).",
        metavar="NAME",
        rich_help_panel=_EXECUTION,
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="Quantize the linear layers while the model is loaded: nf4 (4 bits) or int8. Needs bitsandbytes "
        "(pip install 'layersurgery\\[quantize]').",
        metavar="nf4|int8",
        rich_help_panel=_EXECUTION,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Device to run on: cpu, cuda or, for example, cuda:1.",
        show_default="cuda if available, else cpu",
        metavar="NAME",
        rich_help_panel=_EXECUTION,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Spread the model over devices, main memory and disk: auto, balanced, sequential, a JSON object, "
        "or a JSON file.",
        metavar="MAP",
        rich_help_panel=_EXECUTION,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        help="Memory limit of each device for --device-map (per process), for example 0=70GiB,cpu=100GiB.",
        metavar="SIZES",
        rich_help_panel=_EXECUTION,
    ),
]
OffloadFolder = Annotated[
    Path | None,
    typer.Option(
        "--offload-folder",
        help="Directory for offloaded weights that the checkpoint does not hold in the form needed.",
        show_default="a temporary directory",
        metavar="DIR",
        rich_help_panel=_EXECUTION,
    ),
]
Order = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        help="Order of computation: depth-first, or layer-major, which loads each block's weights once per batch. The "
        "results are identical.",
        show_default="layer-major if weights are offloaded",
        metavar="NAME",
        rich_help_panel=_EXECUTION,
    ),
]
Estimate = Annotated[
    bool,
    typer.Option(
        "--estimate",
        help="Print the memory, traffic and arithmetic the run needs, computed from the config (and the requests of "
        "tasks) without weights, and exit.",
        rich_help_panel=_EXECUTION,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the blocks with torch: faster after some seconds of compilation; needs a C++ compiler.",
        rich_help_panel=_EXECUTION,
    ),
]
BlockList = Annotated[
    str | None,
    typer.Option(
        "--blocks",
        help="Module path of the list of decoder blocks, if it is not found automatically.",
        metavar="NAME",
        rich_help_panel=_EXECUTION,
    ),
]
SweepOutput = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Directory to write the results to.", show_default="./<name>-sweep", metavar="DIR"
    ),
]
AnalysisOutput = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Directory to write the results to.", show_default="./<name>-<analysis>", metavar="DIR"
    ),
]
OverwriteResults = Annotated[
    bool, typer.Option("--overwrite", help="Discard existing results at the output and measure again.")
]
PerToken = Annotated[bool, typer.Option("--per-token", help="Also write tokens.parquet: every metric for every token.")]

Track = Annotated[
    str | None,
    typer.Option(
        "--track",
        help="Log the run to experiment trackers while it runs: tensorboard (into ./runs; pip install "
        "'layersurgery\\[track]'), trackio or wandb; several with commas between.",
        metavar="NAMES",
        show_default=False,
        rich_help_panel=_SHARE,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that comes with the model. Without it, such code is never run, and nothing is asked.",
        rich_help_panel=_EXECUTION,
    ),
]

_SHOWN: dict[str, Any] = {
    "data": Data,
    "split": Split,
    "column": Column,
    "tokens": Tokens,
    "context": Context,
    "pack": Pack,
    "lines": Lines,
    "bos": Bos,
    "shuffle": Shuffle,
    "seed": Seed,
    "tokenizer": Tokenizer,
    "until": Until,
    "confidence": Confidence,
    "read": Read,
    "propagation": Propagation,
    "sources": BlockSources,
    "means": Means,
    "tails": Tails,
    "batch_size": BatchSize,
    "dtype": Dtype,
    "quantize": Quantize,
    "device": Device,
    "device_map": DeviceMap,
    "max_memory": MaxMemory,
    "offload_folder": OffloadFolder,
    "schedule": Order,
    "compile": Compile,
    "per_token": PerToken,
    "track": Track,
    "revision": Revision,
    "blocks": BlockList,
    "trust_remote_code": TrustRemoteCode,
}


@dataclass(frozen=True, slots=True)
class Group:
    """Options of a command that stand for one parameter.

    Attributes:
        options: what the terminal shows of each, by name.
        defaults: other defaults than those of `kind`.
        kind: the dataclass that holds the options.
    """

    options: dict[str, Any]
    defaults: dict[str, Any]
    kind: type[Any] = RunOptions

    def parameters(self) -> list[inspect.Parameter]:
        """Return the options as parameters of a command."""
        known = {field.name: field.default for field in fields(self.kind)} | self.defaults
        return [_parameter(name, shown, known[name]) for name, shown in self.options.items()]


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
            rich_help_panel=_TEXT,
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
            rich_help_panel=_EXECUTION,
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
            rich_help_panel=_EXECUTION,
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
            rich_help_panel=_TEXT,
        ),
    ],
    "seed": Annotated[
        int,
        typer.Option(
            "--seed",
            help="Seed for shuffling, for the order of the sequences and for LoRA's first matrices.",
            metavar="N",
            rich_help_panel=_TEXT,
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


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def expand(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a function into a command: each group of options, and the console, becomes the options that it stands for.

    A parameter `console: Console` stands for --quiet and --json; `console: SharingConsole` for --push and --public,
    too.
    """
    signature = inspect.signature(function, eval_str=True)
    expanded: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        annotation = parameter.annotation
        if annotation in (Console, SharingConsole):
            if annotation is SharingConsole:
                expanded += [_parameter("push", PushTo, None), _parameter("public", Public, False)]
            expanded += [_parameter("quiet", Quiet, False), _parameter("as_json", Json, False)]
        elif _group_of(annotation) is not None:
            expanded += _group_of(annotation).parameters()  # type: ignore[union-attr]
        else:
            expanded.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(function)
    def command(**values: Any) -> None:
        from .terminal.progress import RunConsole  # imports what --help does not need

        arguments: dict[str, Any] = {}
        for name, parameter in signature.parameters.items():
            group = _group_of(parameter.annotation)
            if parameter.annotation in (Console, SharingConsole):
                push = _checked_push(values.get("push"), values.get("public", False))
                arguments[name] = RunConsole(
                    quiet=values["quiet"], as_json=values["as_json"], push=push, public=values.get("public", False)
                )
            elif group is not None:
                arguments[name] = group.kind(**{option: values[option] for option in group.options})
            else:
                arguments[name] = values[name]
        function(**arguments)

    command.__signature__ = inspect.Signature(expanded)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in expanded}
    return command


def _checked_push(repo: str | None, public: bool) -> str | None:
    """Refuse a push that cannot succeed before the command's work begins; return where to push to.

    Raises:
        PlanError: --public without --push, or not the name of a repository.
        OutputError: no token can write, or the Hub cannot be reached.
    """
    if repo is not None and os.environ.get("RANK", "0") == "0":  # of several processes, one pushes
        from layersurgery.repositories.hub_errors import check_push

        check_push(repo)
    elif repo is None and public:
        raise typer.BadParameter("it says who can read what --push uploads; give --push, too", param_hint="'--public'")
    return repo


def _group_of(annotation: Any) -> Group | None:
    """Return the group of options that an annotation names, or None."""
    if get_origin(annotation) is Annotated:
        return next((item for item in get_args(annotation) if isinstance(item, Group)), None)
    return None
