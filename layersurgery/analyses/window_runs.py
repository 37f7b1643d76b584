"""Run the analyses of windows cut from text into directories of results: subjoiner heads, and probes of neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.anatomy import anatomy as find_anatomy
from ..runs.documents import ReadingRecord, read_plain_texts
from ..runs.first_token import bos_token_id
from ..runs.run_directory import Run
from ..runs.single_step import TablesAndFacts, run_once
from ..runs.text_request import TextRequest, parse_count
from .neuron_probes import describe_probes, fit_probes
from .subjoiner_heads import describe_subjoiners, score_heads
from .token_classes import CONTEXT, check_class, find_balanced_windows, token_class
from .word_windows import WINDOW, find_word_windows

if TYPE_CHECKING:
    from ..runs.session import ModelSession

_TOKENS = "1M"
_BATCH = 128


@dataclass(frozen=True, slots=True)
class _Found:
    """Windows that were found, and how to analyze them.

    Attributes:
        windows: the windows.
        max_token: the largest token among them.
        arguments: what they depend on, besides the text.
        caption: describes them under a figure.
        make: measures them; returns tables and facts.
    """

    windows: Any
    max_token: int
    arguments: dict[str, Any]
    caption: str
    make: Callable[[Any, int | None], TablesAndFacts]


def run_subjoiners(
    session: ModelSession,
    directory: Path,
    *,
    analysis: str = "subjoiners",
    overwrite: bool = False,
    searched_tokens: int | None = None,
    samples: int = 200,
) -> Run:
    """Score the heads that attend within words, or use the finished run in the directory.

    Args:
        session: the model and the text to search.
        directory: where to write.
        analysis: the analysis's name.
        overwrite: replace what another run has left in the directory.
        searched_tokens: maximum number of tokens to search; by default what the session's options say, or 1M.
        samples: maximum number of windows of each class.
    """
    reporter, request = session.reporter, _search_request(session, searched_tokens)
    tokenizer, record = session.texts.tokenizer, ReadingRecord()

    def find() -> _Found:
        with reporter.status(f"Searching for words of four tokens in {request.data}"):
            windows = find_word_windows(
                read_plain_texts(request, tokenizer, record),
                tokenizer,
                tokens=request.tokens,
                samples=samples,
                seed=request.seed,
                name=request.data,
            )
        facts = windows.facts
        count = facts["four_token_windows"]
        searched = f"{facts['tokens']:,} tokens"
        reporter.log(
            f"Found {facts['four_token_windows_found']} windows that end in a word of four tokens "
            f"({facts['four_token_words_found']} different words) in {searched}; using {count} of them "
            f"({facts['four_token_words']} words) and {count} that end in a word of one token"
        )

        def make(model: Any, first: int | None) -> TablesAndFacts:
            with reporter.count("windows") as on_windows:
                result = score_heads(
                    model,
                    windows,
                    first=first,
                    batch_size=session.options.batch_size or _BATCH,
                    anatomy=find_anatomy(model, blocks=session.options.blocks),
                    progress=on_windows,
                )
            frames = {analysis: result.heads, "attention_to_words": result.attention, "examples": result.examples}
            return frames, {
                "skipped": result.skipped, "windows": facts, "read": record.facts(),
                "summary": describe_subjoiners(result.heads),
            }  # fmt: skip

        caption = f"{count} + {count} windows of {WINDOW} tokens, from {searched} of {request.data}"
        return _Found(windows, int(windows.ids.max()), {"samples": samples}, caption, make)

    return _run(session, directory, analysis, request, find, overwrite=overwrite)


def run_probe(
    session: ModelSession,
    directory: Path,
    *,
    analysis: str = "probe",
    overwrite: bool = False,
    searched_tokens: int | None = None,
    suffix: str | None = None,
    regex: str | None = None,
    samples: int = 1000,
) -> Run:
    """Probe neurons for a class of next tokens, or use the finished run in the directory.

    Args:
        session: the model and the text to search.
        directory: where to write.
        analysis: the analysis's name.
        overwrite: replace what another run has left in the directory.
        searched_tokens: maximum number of tokens to search; by default what the session's options say, or 1M.
        suffix: the class: next tokens that end with this text; by default "ing".
        regex: the class: next tokens that match this regular expression; instead of `suffix`.
        samples: maximum number of windows of each class; half of them are for training.
    """
    check_class(suffix, regex)
    reporter, request = session.reporter, _search_request(session, searched_tokens)
    tokenizer, record = session.texts.tokenizer, ReadingRecord()

    def find() -> _Found:
        target = token_class(tokenizer, suffix=suffix, regex=regex)
        examples = ", ".join(repr(text) for text in target.examples[:8])
        counts = f"{target.facts['tokens']:,} of {target.facts['of']:,} tokens"
        reporter.log(f"The text of {counts} {target.description}: {examples}")
        with reporter.status(f"Searching for them in {request.data}"):
            windows = find_balanced_windows(
                read_plain_texts(request, tokenizer, record),
                tokenizer,
                target,
                tokens=request.tokens,
                samples=samples,
                seed=request.seed,
                name=request.data,
            )
        facts = windows.facts
        halves = f"{facts['training']} + {facts['held_out']} windows of {CONTEXT} tokens"
        searched = f"{facts['tokens']:,} tokens"
        reporter.log(
            f"Found {facts['class_windows_found']:,} windows followed by one of them in {searched}; using "
            f"{(facts['training'] + facts['held_out']) // 2} that do not overlap, and as many followed by another "
            f"token: {facts['training']} for training, {facts['held_out']} held out"
        )

        def make(model: Any, first: int | None) -> TablesAndFacts:
            with reporter.count("blocks' neurons") as on_layer, reporter.count("windows") as on_windows:
                result = fit_probes(
                    model,
                    windows,
                    target,
                    first=first,
                    seed=request.seed,
                    batch_size=session.options.batch_size or _BATCH,
                    anatomy=find_anatomy(model, blocks=session.options.blocks),
                    on_layer=on_layer,
                    progress=on_windows,
                )
            frames = {
                analysis: result.probes,
                "single_neurons": result.single_neurons,
                "top_k": result.top_k,
                "effects": result.effects,
            }
            summary = describe_probes(result.probes)
            return frames, {
                "skipped": result.skipped, "windows": facts, "read": record.facts(), "class": target.facts,
                "summary": summary,
            }  # fmt: skip

        caption = f"next token {target.description}; {halves}, from {searched} of {request.data}"
        max_token = int(max(windows.ids.max(), windows.following.max()))
        return _Found(windows, max_token, {"class": target.description, "samples": samples}, caption, make)

    return _run(session, directory, analysis, request, find, overwrite=overwrite)


def _search_request(session: ModelSession, tokens: int | None) -> TextRequest:
    """Return the text to search: more of it than is measured, since only a few windows are found in it."""
    if tokens is None and session.options.tokens is None:
        tokens = parse_count(_TOKENS)
    return session.texts.request if tokens is None else replace(session.texts.request, tokens=tokens)


def _run(
    session: ModelSession,
    directory: Path,
    analysis: str,
    request: TextRequest,
    find: Callable[[], _Found],
    *,
    overwrite: bool,
) -> Run:
    """Find windows and measure them, or use the finished run.

    The text is read in both cases, since the run is only reused if the text is unchanged.
    """
    session.check()
    first = bos_token_id(session.texts.tokenizer) if request.bos else None
    if request.bos:
        session.reporter.log(f"Each window begins with {session.texts.tokenizer.bos_token}")
    found = find()
    session.texts.check_vocabulary(found.max_token)

    def make() -> TablesAndFacts:
        frames, facts = found.make(session.model.load(), first)
        frames = {table: frame.assign(model=session.model.label) for table, frame in frames.items()}
        return frames, {**facts, "caption": found.caption}

    text = {name: getattr(request, name) for name in ("data", "split", "tokens", "bos", "seed")}
    text["column"] = request.arguments()["column"]
    arguments = session.arguments(
        {
            "analysis": analysis,
            **found.arguments,
            "text": {
                **text,
                "shuffle": request.shuffled,
                "tokenizer": session.texts.tokenizer_name,
                "fingerprint": found.windows.fingerprint,
            },
        }
    )
    return run_once(directory, arguments, session.reporter, make, overwrite=overwrite, caption=found.caption)
