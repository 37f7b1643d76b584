"""Define the options that several commands share: what the terminal shows of each, and the panel that it is in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from layersurgery.plans.families import FAMILIES

from . import completion

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
DryMeasurement = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check the model, the text and the output, say what would be measured and written, and exit.",
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
TEXT = "Text"
_TASKS = "Tasks"
_PRECISION = "Precision"
EXECUTION = "Execution"

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
        rich_help_panel=TEXT,
    ),
]
Split = Annotated[
    str,
    typer.Option(
        "--split", help="Split of the Hub dataset or of the saved dataset.", metavar="NAME", rich_help_panel=TEXT
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
        rich_help_panel=TEXT,
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
        rich_help_panel=TEXT,
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
        rich_help_panel=TEXT,
    ),
]
Pack = Annotated[
    bool | None,
    typer.Option(
        "--pack/--no-pack",
        help="Join documents and cut them into sequences of equal length, or use one document per sequence.",
        show_default="pack; no-pack with --lines",
        rich_help_panel=TEXT,
    ),
]
Lines = Annotated[
    bool,
    typer.Option("--lines", help="Each line of a text file is one document, such as a prompt.", rich_help_panel=TEXT),
]
Bos = Annotated[
    str,
    typer.Option(
        "--bos",
        help="Start every sequence with the beginning-of-text token; auto does what the tokenizer does.",
        metavar="auto|yes|no",
        rich_help_panel=TEXT,
    ),
]
Shuffle = Annotated[
    bool | None,
    typer.Option(
        "--shuffle/--no-shuffle",
        help="Sample the text at random (from 16 times as much text, or from a buffer of 10,000 Hub documents), "
        "or take it from the start.",
        show_default="shuffle Hub datasets only",
        rich_help_panel=TEXT,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed for shuffling.", metavar="N", rich_help_panel=TEXT)]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", help="Model to take the tokenizer from, if not MODEL.", metavar="MODEL", rich_help_panel=TEXT
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
        rich_help_panel=EXECUTION,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Data type of the weights: float32, bfloat16, float16, or auto for the checkpoint's own (on a CPU, "
        "float16 becomes float32).",
        metavar="NAME",
        rich_help_panel=EXECUTION,
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="Quantize the linear layers while the model is loaded: nf4 (4 bits) or int8. Needs bitsandbytes "
        "(pip install 'layersurgery\\[quantize]').",
        metavar="nf4|int8",
        rich_help_panel=EXECUTION,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Device to run on: cpu, cuda or, for example, cuda:1.",
        show_default="cuda if available, else cpu",
        metavar="NAME",
        rich_help_panel=EXECUTION,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Spread the model over devices, main memory and disk: auto, balanced, sequential, a JSON object, "
        "or a JSON file.",
        metavar="MAP",
        rich_help_panel=EXECUTION,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        help="Memory limit of each device for --device-map (per process), for example 0=70GiB,cpu=100GiB.",
        metavar="SIZES",
        rich_help_panel=EXECUTION,
    ),
]
OffloadFolder = Annotated[
    Path | None,
    typer.Option(
        "--offload-folder",
        help="Directory for offloaded weights that the checkpoint does not hold in the form needed.",
        show_default="a temporary directory",
        metavar="DIR",
        rich_help_panel=EXECUTION,
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
        rich_help_panel=EXECUTION,
    ),
]
Estimate = Annotated[
    bool,
    typer.Option(
        "--estimate",
        help="Print the memory, traffic and arithmetic the run needs, computed from the config (and the requests of "
        "tasks) without weights, and exit.",
        rich_help_panel=EXECUTION,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the blocks with torch: faster after some seconds of compilation; needs a C++ compiler.",
        rich_help_panel=EXECUTION,
    ),
]
BlockList = Annotated[
    str | None,
    typer.Option(
        "--blocks",
        help="Module path of the list of decoder blocks, if it is not found automatically.",
        metavar="NAME",
        rich_help_panel=EXECUTION,
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
        rich_help_panel=EXECUTION,
    ),
]
