"""`layersurgery analyze probe`."""

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

WORD, SAMPLES = "probe", 1000
_BATCH = 128


@dataclasses.dataclass(frozen=True, slots=True)
class ProbeOptions:
    """What `probe` is asked for beside the model and the text: a class of tokens, and how many windows of it."""

    suffix: str | None = None
    regex: str | None = None
    samples: int = SAMPLES


def run_probe(model: str, asked: ProbeOptions, options: MeasureOptions, console: Console) -> None:
    """Probe neurons for a class of next tokens, and end with the results."""
    from layersurgery.analyses.token_classes import check_class

    check_class(asked.suffix, asked.regex)
    options = dataclasses.replace(options, tokens=options.tokens or "1M")

    def lead(session: ModelSession) -> None:
        directory = options.output or Path(f"{session.source.name}-{WORD}")
        show_analysis(probe_in(session, directory, asked, anew=options.overwrite), console)

    run_tasks(model, options, console, lead)


def probe_in(
    session: ModelSession, directory: Path, wanted: ProbeOptions, *, asked: TextAsked | None = None, anew: bool
) -> Run:
    """The run in a directory, made now or found finished; the text is read either way, to see whether it is still the same."""
    from layersurgery.analyses.token_classes import CONTEXT, find_balanced_windows, token_class
    from layersurgery.runs.text import bos_of, check_data, documents

    asked, options, console = asked or session.asked, session.options, session.console
    check_data(asked)
    tokenizer = session.tokenizer
    first = bos_of(tokenizer) if asked.bos else None
    chosen = token_class(tokenizer, suffix=wanted.suffix, regex=wanted.regex)
    some = ", ".join(repr(text) for text in chosen.examples[:8])
    console.log(f"The text of {chosen.about['tokens']:,} of {chosen.about['of']:,} tokens {chosen.words}: {some}")
    with console.status(f"Looking for them in {asked.data}"):
        windows = find_balanced_windows(
            documents(asked),
            tokenizer,
            chosen,
            tokens=asked.tokens,
            samples=wanted.samples,
            seed=asked.seed,
            name=asked.data,
        )
    about = windows.about
    total = about["training"] + about["held_out"]
    session.check_vocabulary(int(max(windows.ids.max(), windows.following.max())))
    caption = f"next token {chosen.words}; {about['training']} + {about['held_out']} windows of {CONTEXT} tokens, from {about['tokens']:,} tokens of {asked.data}"
    console.log(
        f"{about['class_windows_found']:,} windows go on with one of them among {about['tokens']:,} tokens; {total // 2} are taken, none of which shares text "
        f"with another, and as many that go on otherwise: {about['training']} to train on, {about['held_out']} held out"
    )

    def make() -> Made:
        from layersurgery.analyses.neuron_probes import describe_probes, fit_probes
        from layersurgery.models.anatomy import anatomy

        model = session.load()
        with counter(console, "blocks' neurons") as on_layer, counter(console, "windows") as on_windows:
            found = fit_probes(
                model, windows, chosen, first=first, seed=asked.seed, batch_size=options.batch_size or _BATCH,
                anatomy=anatomy(model, blocks=options.blocks), on_layer=on_layer, progress=on_windows,
            )  # fmt: skip
        frames = {
            WORD: found.probes,
            "single_neurons": found.single_neurons,
            "top_k": found.top_k,
            "effects": found.effects,
        }
        facts: dict[str, Any] = {
            "skipped": found.skipped, "windows": about, "class": chosen.about, "caption": caption, "summary": describe_probes(found.probes),
        }  # fmt: skip
        return {table: frame.assign(model=session.source.label) for table, frame in frames.items()}, facts

    text = {name: getattr(asked, name) for name in ("data", "split", "column", "tokens", "bos", "seed")}
    arguments = {
        "analysis": WORD,
        "class": chosen.words,
        "samples": wanted.samples,
        "text": {**text, "shuffle": asked.shuffled, "tokenizer": options.tokenizer, "fingerprint": windows.fingerprint},
    }
    return run_once(directory, session.arguments(arguments), console, make, overwrite=anew)
