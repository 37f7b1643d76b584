"""`layersurgery analyze subjoiners`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..session.model_session import Bench
from ..session.one_shot import Made, look
from ..session.processes import run_tasks
from ..terminal.analysis_results import show_analysis
from ..terminal.console import Talk
from ..terminal.progress import counting

if TYPE_CHECKING:
    from layersurgery.runs.run_directory import Run
    from layersurgery.runs.text import Asked as TextAsked

    from ..session.run_options import Options

WORD, SAMPLES = "subjoiners", 200
_BATCH = 128


def run_subjoiners(model: str, samples: int, options: Options, talk: Talk) -> None:
    """Look for heads that join words, and end with the results."""
    options = dataclasses.replace(options, tokens=options.tokens or "1M")

    def lead(bench: Bench) -> None:
        directory = options.output or Path(f"{bench.source.name}-{WORD}")
        show_analysis(subjoiners_in(bench, directory, samples, anew=options.overwrite), talk)

    run_tasks(model, options, talk, lead)


def subjoiners_in(bench: Bench, directory: Path, samples: int = SAMPLES, *, asked: TextAsked | None = None, anew: bool) -> Run:
    """The run in a directory, made now or found finished; the text is read either way, to see whether it is still the same."""
    from layersurgery.analyses.word_windows import WINDOW, windows_of
    from layersurgery.runs.text import bos_of, check_data, documents

    asked, options, talk = asked or bench.asked, bench.options, bench.talk
    check_data(asked)
    tokenizer = bench.tokenizer
    first = bos_of(tokenizer) if asked.bos else None
    with talk.step(f"Looking for words of four tokens in {asked.data}"):
        windows = windows_of(documents(asked), tokenizer, tokens=asked.tokens, samples=samples, seed=asked.seed, name=asked.data)
    bench.check_vocabulary(int(windows.ids.max()))
    about = windows.about
    each = about["four_token_windows"]
    caption = f"{each} + {each} windows of {WINDOW} tokens, from {about['tokens']:,} tokens of {asked.data}"
    talk.say(
        f"{about['four_token_windows_found']} windows end in a word of four tokens ({about['four_token_words_found']} words) among "
        f"{about['tokens']:,} tokens; {each} of them are taken ({about['four_token_words']} words), and as many that end in a word of one"
    )

    def make() -> Made:
        from layersurgery.analyses.subjoiner_heads import heads_on, joining_in_words
        from layersurgery.models.anatomy import anatomy

        with counting(talk, "windows") as on_windows:
            model = bench.load()
            found = heads_on(
                model, windows, first=first, batch_size=options.batch_size or _BATCH, anatomy=anatomy(model, blocks=options.blocks),
                progress=on_windows,
            )  # fmt: skip
        name = bench.source.label
        frames = {WORD: found.heads, "attention_to_words": found.attention, "examples": found.examples}
        facts: dict[str, Any] = {
            "left_out": found.left_out, "windows": about, "caption": caption, "in_words": joining_in_words(found.heads),
        }  # fmt: skip
        return {table: frame.assign(model=name) for table, frame in frames.items()}, facts

    text = {name: getattr(asked, name) for name in ("data", "split", "column", "tokens", "bos", "seed")}
    arguments = {
        "analysis": WORD,
        "samples": samples,
        "text": {**text, "shuffle": asked.shuffled, "tokenizer": options.tokenizer, "fingerprint": windows.fingerprint},
    }
    return look(directory, bench.arguments(arguments), talk, make, anew=anew)
