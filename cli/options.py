"""The options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Hub id, directory of a checkpoint, .gguf file, or smollm2-135m.", show_default=False
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Directory to write.", show_default="./<name>-<plan>", metavar="DIR"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that exists at the output.")]
Link = Annotated[
    bool,
    typer.Option("--link", help="Hard-link files that do not change; who edits such a file edits the source's, too."),
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Check first that a reload would be the model meant (needs torch).")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.", metavar="REV")]
Blocks = Annotated[
    str | None,
    typer.Option("--blocks", help="Prefix of the decoder blocks' tensors, where it is not found.", metavar="NAME"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout; talk goes to stderr.")]
Layer = Annotated[
    int, typer.Option("--layer", "-l", help="Block number; negative counts from the end.", show_default=False)
]
Layers = Annotated[
    str, typer.Option("--layers", help="Half-open range of blocks, as in 8:16.", metavar="A:B", show_default=False)
]
SomeLayers = Annotated[
    list[str] | None,
    typer.Option("--layer", "-l", help="Block number; may be given several times.", metavar="N", show_default=False),
]
Range = Annotated[
    str | None,
    typer.Option("--layers", help="Half-open range of blocks, as in 20:24.", metavar="A:B", show_default=False),
]

_WHAT = "What to measure"
_TEXT = "On which text"
_HOW = "How"

Edits = Annotated[
    str | None,
    typer.Option(
        "--edits",
        help="Families, separated by commas: swap, drop, skip-attention, skip-mlp, drop-span:N, swap-pairs.",
        show_default="swap,drop; none with --plans",
        metavar="NAMES",
        rich_help_panel=_WHAT,
    ),
]
Plans = Annotated[
    Path | None,
    typer.Option(
        "--plans", help="File of plans, one a line: 'name: drop 20:24'.", metavar="FILE", rich_help_panel=_WHAT
    ),
]
LayerRange = Annotated[
    str | None,
    typer.Option(
        "--layers",
        help="Of families, only edits that touch none but these blocks, as in 4:20.",
        metavar="A:B",
        rich_help_panel=_WHAT,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="A hub dataset (id or id:configuration), a .txt or .jsonl file (also .zst or .gz), a .parquet file, a directory of these, or "
        "pydoc, Python's own help.",
        show_default="EleutherAI/the_pile_deduplicated; pydoc for smollm2-135m",
        metavar="DATA",
        rich_help_panel=_TEXT,
    ),
]
Split = Annotated[str, typer.Option("--split", help="Of a hub dataset.", metavar="NAME", rich_help_panel=_TEXT)]
Column = Annotated[
    str, typer.Option("--column", help="The column that holds the text.", metavar="NAME", rich_help_panel=_TEXT)
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        "-n",
        help="How many, as in 4096, 100k or 1M; rounded up to whole contexts.",
        show_default="1M; 4096 of pydoc",
        metavar="N",
        rich_help_panel=_TEXT,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=2,
        help="Tokens of one sequence.",
        show_default="2048, or what the model takes; 512 of pydoc",
        metavar="N",
        rich_help_panel=_TEXT,
    ),
]
Pack = Annotated[
    bool,
    typer.Option(
        "--pack/--no-pack",
        help="Join documents and cut them into contexts; or one document a sequence.",
        rich_help_panel=_TEXT,
    ),
]
Bos = Annotated[
    bool, typer.Option("--bos", help="Begin every sequence with the beginning-of-text token.", rich_help_panel=_TEXT)
]
Shuffle = Annotated[
    bool | None,
    typer.Option(
        "--shuffle/--no-shuffle",
        help="Take text at random (from 16 times as much, or a buffer of 10,000 documents of the hub's), or from the start.",
        show_default="shuffled from the hub only",
        rich_help_panel=_TEXT,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of the shuffling.", metavar="N", rich_help_panel=_TEXT)]
Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Another model whose tokenizer to take.", metavar="MODEL", rich_help_panel=_TEXT),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        "-b",
        min=1,
        help="Sequences at once.",
        show_default="by the free memory",
        metavar="N",
        rich_help_panel=_HOW,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="float32, bfloat16, float16, or auto: the checkpoint's own (float32 for float16 on a CPU).",
        metavar="NAME",
        rich_help_panel=_HOW,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu, cuda or cuda:1.",
        show_default="cuda if there is one",
        metavar="NAME",
        rich_help_panel=_HOW,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Spread the model over devices, main memory and disk: auto, balanced, sequential, a JSON object or a file of one.",
        metavar="MAP",
        rich_help_panel=_HOW,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        help="What each device may give (to each process) for --device-map, as in 0=70GiB,cpu=100GiB.",
        metavar="SIZES",
        rich_help_panel=_HOW,
    ),
]
OffloadFolder = Annotated[
    Path | None,
    typer.Option(
        "--offload-folder",
        help="For weights on disk that the checkpoint does not hold as they are wanted.",
        show_default="a temporary one",
        metavar="DIR",
        rich_help_panel=_HOW,
    ),
]
Order = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        help="depth-first, or layer-major: each block's weights are brought in once a batch. The digits are the same.",
        show_default="layer-major where weights are offloaded",
        metavar="NAME",
        rich_help_panel=_HOW,
    ),
]
Estimate = Annotated[
    bool,
    typer.Option(
        "--estimate",
        help="Say what it would take in memory, traffic and arithmetic, from the config alone, and stop.",
        rich_help_panel=_HOW,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Have torch compile the blocks: faster, after some seconds; needs a C++ compiler.",
        rich_help_panel=_HOW,
    ),
]
BlockList = Annotated[
    str | None,
    typer.Option(
        "--blocks", help="Path of the list of blocks, where it is not found.", metavar="NAME", rich_help_panel=_HOW
    ),
]
SweepOutput = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Directory of results.", show_default="./<name>-sweep", metavar="DIR"),
]
AnalysisOutput = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Directory of results.", show_default="./<name>-<analysis>", metavar="DIR"),
]
OverwriteResults = Annotated[bool, typer.Option("--overwrite", help="Begin anew where another run is at the output.")]
PerToken = Annotated[bool, typer.Option("--per-token", help="Write tokens.parquet: every metric of every token.")]
