"""Run `layersurgery analyze subjoiners`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..session.model_session import ModelSession
from ..session.one_shot import TablesAndFacts, run_once
from ..session.processes import run_tasks
from ..terminal.analysis_results import show_analysis
from ..terminal.console import Console
from ..terminal.progress import counter

if TYPE_CHECKING:
    from layersurgery.runs.run_directory import Run
    from layersurgery.runs.text import TextRequest

    from ..session.run_options import MeasureOptions

NAME, SAMPLES = "subjoiners", 200
_BATCH = 128


def run_subjoiners(model: str, samples: int, options: MeasureOptions, console: Console) -> None:
    """Score the heads that attend within words, and print the results."""
    options = dataclasses.replace(options, tokens=options.tokens or "1M")

    def lead(session: ModelSession) -> None:
        directory = options.output or Path(f"{session.source.name}-{NAME}")
        show_analysis(subjoiners_in(session, directory, samples, overwrite=options.overwrite), console)

    run_tasks(model, options, console, lead)


def subjoiners_in(
    session: ModelSession,
    directory: Path,
    samples: int = SAMPLES,
    *,
    request: TextRequest | None = None,
    overwrite: bool,
) -> Run:
    """Run the analysis, or use the finished run in the directory.

    The text is read in both cases, since the run is only reused if the text is unchanged.

    Returns:
        The finished run.
    """
    from layersurgery.analyses.word_windows import WINDOW, find_word_windows
    from layersurgery.runs.text import bos_token_id, check_data, read_documents

    request, options, console = request or session.request, session.options, session.console
    check_data(request)
    tokenizer = session.tokenizer
    bos = bos_token_id(tokenizer) if request.bos else None
    with console.status(f"Searching for words of four tokens in {request.data}"):
        windows = find_word_windows(
            read_documents(request),
            tokenizer,
            tokens=request.tokens,
            samples=samples,
            seed=request.seed,
            name=request.data,
        )
    session.check_vocabulary(int(windows.ids.max()))
    window_facts = windows.about
    count = window_facts["four_token_windows"]
    searched = f"{window_facts['tokens']:,} tokens"
    caption = f"{count} + {count} windows of {WINDOW} tokens, from {searched} of {request.data}"
    console.log(
        f"Found {window_facts['four_token_windows_found']} windows that end in a word of four tokens "
        f"({window_facts['four_token_words_found']} different words) in {searched}; using {count} of them "
        f"({window_facts['four_token_words']} words) and {count} that end in a word of one token"
    )

    def make() -> TablesAndFacts:
        from layersurgery.analyses.subjoiner_heads import describe_subjoiners, score_heads
        from layersurgery.models.anatomy import anatomy

        with counter(console, "windows") as on_windows:
            model = session.load()
            result = score_heads(
                model,
                windows,
                first=bos,
                batch_size=options.batch_size or _BATCH,
                anatomy=anatomy(model, blocks=options.blocks),
                progress=on_windows,
            )
        model_name = session.source.label
        frames = {NAME: result.heads, "attention_to_words": result.attention, "examples": result.examples}
        facts: dict[str, Any] = {
            "skipped": result.skipped,
            "windows": window_facts,
            "caption": caption,
            "summary": describe_subjoiners(result.heads),
        }
        return {table: frame.assign(model=model_name) for table, frame in frames.items()}, facts

    text = {name: getattr(request, name) for name in ("data", "split", "column", "tokens", "bos", "seed")}
    arguments = {
        "analysis": NAME,
        "samples": samples,
        "text": {
            **text,
            "shuffle": request.shuffled,
            "tokenizer": options.tokenizer,
            "fingerprint": windows.fingerprint,
        },
    }
    return run_once(directory, session.arguments(arguments), console, make, overwrite=overwrite)
