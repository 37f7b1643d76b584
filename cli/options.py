"""The options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hub id, directory of a checkpoint, .gguf file, or smollm2-135m.", show_default=False),
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
Layer = Annotated[int, typer.Option("--layer", "-l", help="Block number; negative counts from the end.", show_default=False)]
Layers = Annotated[
    str, typer.Option("--layers", help="Half-open range of blocks, as in 8:16.", metavar="A:B", show_default=False)
]
SomeLayers = Annotated[
    list[str] | None,
    typer.Option("--layer", "-l", help="Block number; may be given several times.", metavar="N", show_default=False),
]
Range = Annotated[
    str | None, typer.Option("--layers", help="Half-open range of blocks, as in 20:24.", metavar="A:B", show_default=False)
]
