"""Put together what a page shows, the summary first and the details last, and fill in its template."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from ..path_names import without_directories
from ..units import format_list
from ..version import __version__
from .charts import Chart, charts
from .collect import CollectedRuns, FinishedRun, labels
from .images import Picture
from .maps import Maps, maps
from .provenance import Provenance, provenance
from .tables import Table, format_table, route_table, tails_of
from .text_format import show_control_characters

_CELLS_A_ROUTE = 12
_SCRIPTS = ("page", "plot", "curves", "maps", "tables")


@dataclass(frozen=True, slots=True)
class _Section:
    """A section of the page: its id, its heading, and the part of the template that shows its content."""

    key: str
    heading: str
    kind: str
    content: Any


def build_page(collected: CollectedRuns, most_rows: int, pictures: Sequence[Picture]) -> tuple[str, list[str]]:
    """Write a page's HTML.

    Args:
        collected: the runs.
        most_rows: maximum number of routes; all other tables together get as many cells as these.
        pictures: figures to show.

    Returns:
        The page, and descriptions of what is left out to limit its size.
    """
    names = list(dict.fromkeys(run.short for run in collected.runs))
    left_out: list[str] = []
    sections = [section for section in _sections(collected, most_rows, pictures, left_out) if section.content]
    style, script = _read("page.css"), "\n".join(_read(f"{part}.js") for part in _SCRIPTS)
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    page = template(_read("page.html.j2")).render(
        title=format_list(names, 4),
        about=_about(collected), others=len(collected.others), sections=sections,
        style=style, script=script, policy=policy, version=__version__,
    )  # fmt: skip
    return page, left_out


@cache
def template(source: str) -> Template:
    """Compile a template that escapes every value, and shows invisible characters of values.

    Example:
        >>> from layersurgery.reports.page import template
        >>> template("<p>{{ text }}</p>").render(text="1 < 2\\n")
        '<p>1 &lt; 2␊</p>'
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_show, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    return environment.from_string(source)


def _show(value: Any) -> Any:
    return show_control_characters(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _about(collected: CollectedRuns) -> list[str]:
    texts: dict[str, None] = {}
    for run in collected.runs:
        tokens, where = run.fact("text", "tokens"), run.fact("arguments", "text", "data")
        if isinstance(tokens, int) and where:
            texts[f"{tokens:,} tokens of {where}"] = None
    count = len(collected.runs)
    models = dict.fromkeys(run.model for run in collected.runs)
    return [f"{count} run{'s'[: count != 1]}", ", ".join(models), *texts]


def _sections(
    collected: CollectedRuns, most_rows: int, pictures: Sequence[Picture], left_out: list[str]
) -> Iterator[_Section]:
    """Yield the sections, and add to `left_out` what they leave out."""
    runs = collected.runs
    drawn: list[Chart | Maps] = [*charts(runs), *maps(runs, left_out)]
    figures = [_Section(one.key, one.title, "chart", one) for one in drawn]
    sweeps = [run for run in runs if run.is_sweep]
    stages = [picture for picture in pictures if picture.name == "stages"]
    tables = _tables(runs, _CELLS_A_ROUTE * most_rows, left_out)
    yield _Section("words", "In words", "words", [*_words(runs)])
    yield from (one for one in figures if one.key.startswith("edit"))
    yield _Section("stages", "The stages of inference", "figures", stages)
    yield from (one for one in figures if not one.key.startswith("edit"))
    yield _Section("figures", "All other figures", "figures", [one for one in pictures if one not in stages])
    if sweeps:
        routes = route_table(sweeps, most_rows)
        left_out += routes.notes
        yield _Section("routes", "Every route", "routes", routes)
    yield _Section("tables", "All other tables", "tables", tables)
    yield _Section("how", "How it was run, and how to repeat it", "accounts", [*_accounts(runs)])
    missing = [f"{path.name}: {without_directories(why)}" for path, why in collected.others]
    missing += map(without_directories, left_out)
    yield _Section("missing", "What is not in this page", "list", missing)


def _words(runs: Sequence[FinishedRun]) -> Iterator[tuple[str, str, bool]]:
    """Yield labels and summaries of the runs, and whether they are sweeps; these come first."""
    for run, label in sorted(zip(runs, labels(runs), strict=True), key=lambda entry: not entry[0].is_sweep):
        if run.words:
            yield label, f"{run.words[0].upper()}{run.words[1:].removesuffix('.')}.", run.is_sweep


def _tables(runs: Sequence[FinishedRun], most_cells: int, left_out: list[str]) -> list[Table]:
    """Return all tables except those of routes, and add to `left_out` those that are too large."""
    shown = []
    for run, label in zip(runs, labels(runs), strict=True):
        large = dict(run.large)
        for name, frame in run.tables.items():
            if name == "results":
                name, frame = "tails", tails_of(frame)  # the table of routes has all other columns
                if frame.empty:
                    continue
            if name in large or frame.size > most_cells:
                large[name] = len(frame)
                continue
            most_cells -= frame.size
            shown.append(format_table(f"{label}: {name}", frame, name))
        left_out += [
            f"{label}: table {name}, {rows} rows; see {name}.parquet in {run.path.name}" for name, rows in large.items()
        ]
    return shown


def _accounts(runs: Sequence[FinishedRun]) -> Iterator[tuple[str, Provenance, list[tuple[str, str]]]]:
    """Yield a heading for each run, how it was made, and all facts about it."""
    for run, label in zip(runs, labels(runs), strict=True):
        origin = provenance(run)
        facts = [*origin.facts]
        facts += [("Left out", f"{format_list(whats, 6)}: {why}") for why, whats in origin.skipped]
        facts += [("Not finite", f"{what}: NaN or infinity in batch {batches}") for what, batches in origin.non_finite]
        yield label if label == run.word else f"{label}: {run.word}", origin, facts
