"""Run `layersurgery analyze probe`."""

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

NAME, SAMPLES = "probe", 1000
_BATCH = 128


@dataclasses.dataclass(frozen=True, slots=True)
class ProbeOptions:
    """Options of `probe` other than those of measuring: the class of tokens, and the number of windows per class."""

    suffix: str | None = None
    regex: str | None = None
    samples: int = SAMPLES


def run_probe(model: str, probe_options: ProbeOptions, options: MeasureOptions, console: Console) -> None:
    """Probe neurons for a class of next tokens, and print the results."""
    from layersurgery.analyses.token_classes import check_class

    check_class(probe_options.suffix, probe_options.regex)
    options = dataclasses.replace(options, tokens=options.tokens or "1M")

    def lead(session: ModelSession) -> None:
        directory = options.output or Path(f"{session.source.name}-{NAME}")
        show_analysis(probe_in(session, directory, probe_options, overwrite=options.overwrite), console)

    run_tasks(model, options, console, lead)


def probe_in(
    session: ModelSession,
    directory: Path,
    probe_options: ProbeOptions,
    *,
    request: TextRequest | None = None,
    overwrite: bool,
) -> Run:
    """Run the analysis, or use the finished run in the directory.

    The text is read in both cases, since the run is only reused if the text is unchanged.

    Returns:
        The finished run.
    """
    from layersurgery.analyses.token_classes import CONTEXT, find_balanced_windows, token_class
    from layersurgery.runs.text import bos_token_id, check_data, read_documents

    request, options, console = request or session.request, session.options, session.console
    check_data(request)
    tokenizer = session.tokenizer
    bos = bos_token_id(tokenizer) if request.bos else None
    target = token_class(tokenizer, suffix=probe_options.suffix, regex=probe_options.regex)
    examples = ", ".join(repr(text) for text in target.examples[:8])
    counts = f"{target.about['tokens']:,} of {target.about['of']:,} tokens"
    console.log(f"The text of {counts} {target.words}: {examples}")
    with console.status(f"Searching for them in {request.data}"):
        windows = find_balanced_windows(
            read_documents(request),
            tokenizer,
            target,
            tokens=request.tokens,
            samples=probe_options.samples,
            seed=request.seed,
            name=request.data,
        )
    window_facts = windows.about
    total = window_facts["training"] + window_facts["held_out"]
    session.check_vocabulary(int(max(windows.ids.max(), windows.following.max())))
    searched = f"{window_facts['tokens']:,} tokens"
    caption = (
        f"next token {target.words}; {window_facts['training']} + {window_facts['held_out']} windows of "
        f"{CONTEXT} tokens, from {searched} of {request.data}"
    )
    console.log(
        f"Found {window_facts['class_windows_found']:,} windows followed by one of them in {searched}; "
        f"using {total // 2} that do not overlap, and as many followed by another token: "
        f"{window_facts['training']} for training, "
        f"{window_facts['held_out']} held out"
    )

    def make() -> TablesAndFacts:
        from layersurgery.analyses.neuron_probes import describe_probes, fit_probes
        from layersurgery.models.anatomy import anatomy

        model = session.load()
        with counter(console, "blocks' neurons") as on_layer, counter(console, "windows") as on_windows:
            result = fit_probes(
                model,
                windows,
                target,
                first=bos,
                seed=request.seed,
                batch_size=options.batch_size or _BATCH,
                anatomy=anatomy(model, blocks=options.blocks),
                on_layer=on_layer,
                progress=on_windows,
            )
        frames = {
            NAME: result.probes,
            "single_neurons": result.single_neurons,
            "top_k": result.top_k,
            "effects": result.effects,
        }
        facts: dict[str, Any] = {
            "skipped": result.skipped,
            "windows": window_facts,
            "class": target.about,
            "caption": caption,
            "summary": describe_probes(result.probes),
        }
        return {table: frame.assign(model=session.source.label) for table, frame in frames.items()}, facts

    text = {name: getattr(request, name) for name in ("data", "split", "column", "tokens", "bos", "seed")}
    arguments = {
        "analysis": NAME,
        "class": target.words,
        "samples": probe_options.samples,
        "text": {
            **text,
            "shuffle": request.shuffled,
            "tokenizer": options.tokenizer,
            "fingerprint": windows.fingerprint,
        },
    }
    return run_once(directory, session.arguments(arguments), console, make, overwrite=overwrite)
