"""Refuse wrong values of options at once: before torch is imported, a model is found or the network is used."""

from __future__ import annotations

from .documents import check_data
from .first_token import parse_bos
from .options import RunOptions
from .text_request import TextRequest, parse_count
from .tracking import tracker_names


def check_options(options: RunOptions) -> None:
    """Check the text that options name, and the trackers.

    Raises:
        PlanError: a value cannot be read, or an option is for other data.
        SourceError: the text does not exist, or a tracker's package is not installed.

    Example:
        >>> from layersurgery.runs.option_checks import check_options
        >>> from layersurgery.runs.options import RunOptions
        >>> check_options(RunOptions(data="pydoc", tokens="100k"))
    """
    tokens = 1 if options.tokens is None else parse_count(str(options.tokens))
    bos = parse_bos(options.bos)
    tracker_names(options.track)
    if options.data:
        names = TextRequest(options.data, tokens, 1, options.split, options.column, bos=bos, lines=options.lines)
        check_data(names)
