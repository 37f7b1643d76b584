"""`layersurgery analyze probe`."""

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

WORD, SAMPLES = "probe", 1000
_BATCH = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What `probe` is asked for beside the model and the text: a class of tokens, and how many windows of it."""

    suffix: str | None = None
    regex: str | None = None
    samples: int = SAMPLES


def run_probe(model: str, asked: Asked, options: Options, talk: Talk) -> None:
    """Probe neurons for a class of next tokens, and end with the results."""
    from layersurgery.analyses.token_classes import check_class

    check_class(asked.suffix, asked.regex)
    options = dataclasses.replace(options, tokens=options.tokens or "1M")

    def lead(bench: Bench) -> None:
        directory = options.output or Path(f"{bench.source.name}-{WORD}")
        show_analysis(probe_in(bench, directory, asked, anew=options.overwrite), talk)

    run_tasks(model, options, talk, lead)


def probe_in(bench: Bench, directory: Path, wanted: Asked, *, asked: TextAsked | None = None, anew: bool) -> Run:
    """The run in a directory, made now or found finished; the text is read either way, to see whether it is still the same."""
    from layersurgery.analyses.token_classes import CONTEXT, token_class, windows_on
    from layersurgery.runs.text import bos_of, check_data, documents

    asked, options, talk = asked or bench.asked, bench.options, bench.talk
    check_data(asked)
    tokenizer = bench.tokenizer
    first = bos_of(tokenizer) if asked.bos else None
    chosen = token_class(tokenizer, suffix=wanted.suffix, regex=wanted.regex)
    some = ", ".join(repr(text) for text in chosen.examples[:8])
    talk.say(f"The text of {chosen.about['tokens']:,} of {chosen.about['of']:,} tokens {chosen.words}: {some}")
    with talk.step(f"Looking for them in {asked.data}"):
        windows = windows_on(
            documents(asked), tokenizer, chosen, tokens=asked.tokens, samples=wanted.samples, seed=asked.seed, name=asked.data
        )
    about = windows.about
    total = about["training"] + about["held_out"]
    bench.check_vocabulary(int(max(windows.ids.max(), windows.following.max())))
    caption = f"next token {chosen.words}; {about['training']} + {about['held_out']} windows of {CONTEXT} tokens, from {about['tokens']:,} tokens of {asked.data}"
    talk.say(
        f"{about['class_windows_found']:,} windows go on with one of them among {about['tokens']:,} tokens; {total // 2} are taken, none of which shares text "
        f"with another, and as many that go on otherwise: {about['training']} to train on, {about['held_out']} held out"
    )

    def make() -> Made:
        from layersurgery.analyses.neuron_probes import probes_in_words, probes_on
        from layersurgery.models.anatomy import anatomy

        model = bench.load()
        with counting(talk, "blocks' neurons") as on_layer, counting(talk, "windows") as on_windows:
            found = probes_on(
                model, windows, chosen, first=first, seed=asked.seed, batch_size=options.batch_size or _BATCH,
                anatomy=anatomy(model, blocks=options.blocks), on_layer=on_layer, progress=on_windows,
            )  # fmt: skip
        frames = {WORD: found.probes, "singles": found.singles, "together": found.together, "effects": found.effects}
        facts: dict[str, Any] = {
            "left_out": found.left_out, "windows": about, "class": chosen.about, "caption": caption, "in_words": probes_in_words(found.probes),
        }  # fmt: skip
        return {table: frame.assign(model=bench.source.label) for table, frame in frames.items()}, facts

    text = {name: getattr(asked, name) for name in ("data", "split", "column", "tokens", "bos", "seed")}
    arguments = {
        "analysis": WORD,
        "class": chosen.words,
        "samples": wanted.samples,
        "text": {**text, "shuffle": asked.shuffled, "tokenizer": options.tokenizer, "fingerprint": windows.fingerprint},
    }
    return look(directory, bench.arguments(arguments), talk, make, anew=anew)
