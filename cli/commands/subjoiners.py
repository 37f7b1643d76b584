"""`layersurgery analyze subjoiners`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..session.model_session import ModelSession
from ..session.one_shot import Made, run_once
from ..session.processes import run_tasks
from ..terminal.analysis_results import show_analysis
from ..terminal.console import Console
from ..terminal.progress import counter

if TYPE_CHECKING:
    from layersurgery.runs.run_directory import Run
    from layersurgery.runs.text import TextRequest as TextAsked

    from ..session.run_options import MeasureOptions

WORD, SAMPLES = "subjoiners", 200
_BATCH = 128


def run_subjoiners(model: str, samples: int, options: MeasureOptions, console: Console) -> None:
    """Look for heads that join words, and end with the results."""
    options = dataclasses.replace(options, tokens=options.tokens or "1M")

    def lead(session: ModelSession) -> None:
        directory = options.output or Path(f"{session.source.name}-{WORD}")
        show_analysis(subjoiners_in(session, directory, samples, anew=options.overwrite), console)

    run_tasks(model, options, console, lead)


def subjoiners_in(
    session: ModelSession, directory: Path, samples: int = SAMPLES, *, asked: TextAsked | None = None, anew: bool
) -> Run:
    """The run in a directory, made now or found finished; the text is read either way, to see whether it is still the same."""
    from layersurgery.analyses.word_windows import WINDOW, find_word_windows
    from layersurgery.runs.text import bos_of, check_data, documents

    asked, options, console = asked or session.asked, session.options, session.console
    check_data(asked)
    tokenizer = session.tokenizer
    first = bos_of(tokenizer) if asked.bos else None
    with console.status(f"Looking for words of four tokens in {asked.data}"):
        windows = find_word_windows(
            documents(asked), tokenizer, tokens=asked.tokens, samples=samples, seed=asked.seed, name=asked.data
        )
    session.check_vocabulary(int(windows.ids.max()))
    about = windows.about
    each = about["four_token_windows"]
    caption = f"{each} + {each} windows of {WINDOW} tokens, from {about['tokens']:,} tokens of {asked.data}"
    console.log(
        f"{about['four_token_windows_found']} windows end in a word of four tokens ({about['four_token_words_found']} words) among "
        f"{about['tokens']:,} tokens; {each} of them are taken ({about['four_token_words']} words), and as many that end in a word of one"
    )

    def make() -> Made:
        from layersurgery.analyses.subjoiner_heads import describe_subjoiners, score_heads
        from layersurgery.models.anatomy import anatomy

        with counter(console, "windows") as on_windows:
            model = session.load()
            found = score_heads(
                model, windows, first=first, batch_size=options.batch_size or _BATCH, anatomy=anatomy(model, blocks=options.blocks),
                progress=on_windows,
            )  # fmt: skip
        name = session.source.label
        frames = {WORD: found.heads, "attention_to_words": found.attention, "examples": found.examples}
        facts: dict[str, Any] = {
            "skipped": found.skipped, "windows": about, "caption": caption, "summary": describe_subjoiners(found.heads),
        }  # fmt: skip
        return {table: frame.assign(model=name) for table, frame in frames.items()}, facts

    text = {name: getattr(asked, name) for name in ("data", "split", "column", "tokens", "bos", "seed")}
    arguments = {
        "analysis": WORD,
        "samples": samples,
        "text": {**text, "shuffle": asked.shuffled, "tokenizer": options.tokenizer, "fingerprint": windows.fingerprint},
    }
    return run_once(directory, session.arguments(arguments), console, make, overwrite=anew)
