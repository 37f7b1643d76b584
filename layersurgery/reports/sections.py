"""Build the sections of a page, the summary first and the details last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..version import __version__
from .charts import Chart, charts
from .collect import CollectedRuns, FinishedRun, labels
from .html import Html, data, joined, tag
from .images import Picture
from .provenance import provenance
from .tables import Cell, Column, Table, format_table, route_table

_CELLS_A_ROUTE = 12
_LONG = 40
_BANDS = (
    "Bands show one standard error over sequences on each side. Point at a curve for its values, or focus the chart "
    "and use the arrow keys."
)
_NO_SCRIPT = (
    "These curves need the page's own script, which does not run here; the figures and tables show the same numbers."
)
_COLUMNS = (
    "KL is measured from the unedited model's predictions to the edited model's; changes are edited minus unedited; ± "
    "is one standard error over sequences. Headings sort by the exact values."
)


def build_sections(
    collected: CollectedRuns, most_rows: int, pictures: Sequence[Picture]
) -> tuple[str, Html, list[str]]:
    """Build a page's title and body.

    Args:
        collected: the runs.
        most_rows: maximum number of routes; all other tables together get as many cells as these.
        pictures: figures to show.

    Returns:
        The title, the body, and descriptions of what is left out to limit the size.
    """
    models = list(dict.fromkeys(run.model for run in collected.runs))
    names = list(dict.fromkeys(run.short for run in collected.runs))
    title = f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
    tables, left_out = _tables(collected.runs, _CELLS_A_ROUTE * most_rows)
    sections = [section for section in _sections(collected, most_rows, pictures, tables, left_out) if section[2]]
    links = [tag("li", tag("a", heading, href=f"#{key}")) for key, heading, _ in sections]
    body = joined(
        [
            tag("a", "To the contents", class_="skip", href="#main"),
            tag(
                "header", tag("p", "layersurgery report", class_="kicker"), tag("h1", title), *_lead(collected, models)
            ),
            tag("nav", tag("ul", links), aria_label="Sections"),
            tag("main", [_section(*entry) for entry in sections], id="main"),
            tag(
                "footer",
                tag(
                    "p",
                    f"Made by layersurgery {__version__}. This page is self-contained: it loads nothing.",
                    class_="note",
                ),
            ),
        ]
    )
    return f"{title} \N{EM DASH} layersurgery", body, left_out


def _section(key: str, heading: str, content: Sequence[Html]) -> Html:
    return tag("section", tag("h2", heading, id=f"{key}-heading"), content, id=key, aria_labelledby=f"{key}-heading")


def _sections(
    collected: CollectedRuns, most_rows: int, pictures: Sequence[Picture], tables: Sequence[Table], left_out: list[str]
) -> Iterator[tuple[str, str, list[Html]]]:
    runs = collected.runs
    drawn = {chart.key: chart for chart in charts(runs)}
    sweeps = [run for run in runs if run.is_sweep]
    stages = [picture for picture in pictures if picture.name == "stages"]
    others = [picture for picture in pictures if picture.name != "stages"]
    yield "words", "In words", [*_words(runs)]
    if "edits" in drawn:
        yield "edits", drawn["edits"].title, _chart(drawn["edits"])
    yield "stages", "The stages of inference", [_figure(picture) for picture in stages]
    if "signals" in drawn:
        yield "signals", drawn["signals"].title, _chart(drawn["signals"])
    yield (
        "figures",
        "All other figures",
        [tag("div", [_figure(picture) for picture in others], class_="figures")] if others else [],
    )
    if sweeps:
        routes = route_table(sweeps, most_rows)
        left_out += routes.notes
        yield (
            "routes",
            "Every route",
            [tag("p", _COLUMNS, class_="note"), *_notes(routes.notes), *_table(routes, "table-routes")],
        )
    yield "tables", "All other tables", [*_folded(tables)]
    yield "how", "How it was run, and how to repeat it", [*_accounts(runs)]
    yield "missing", "What is not in this page", [*_missing(collected, left_out)]


def _lead(collected: CollectedRuns, models: Sequence[str]) -> Iterator[Html]:
    texts: dict[str, None] = {}
    for run in collected.runs:
        tokens, where = run.fact("text", "tokens"), run.fact("arguments", "text", "data")
        if isinstance(tokens, int) and where:
            texts[f"{tokens:,} tokens of {where}"] = None
    count = len(collected.runs)
    parts = [f"{count} run{'s'[: count != 1]}", ", ".join(models), *texts]
    yield tag("p", " \N{MIDDLE DOT} ".join(parts), class_="about")
    if collected.others:
        number = len(collected.others)
        what = f"{number} director{'ies are' if number > 1 else 'y is'} not shown: "
        yield tag("p", what, tag("a", "which, and why", href="#missing"), class_="warn")


def _words(runs: Sequence[FinishedRun]) -> Iterator[Html]:
    """Yield the summaries of the runs, those of sweeps first and in large type."""
    for run, label in sorted(zip(runs, labels(runs), strict=True), key=lambda entry: not entry[0].is_sweep):
        if run.words:
            words = f"{run.words[0].upper()}{run.words[1:].removesuffix('.')}."
            yield tag("p", tag("b", label), words, class_="lede" if run.is_sweep else "told")


def _chart(chart: Chart) -> list[Html]:
    return [
        tag("p", chart.about) if chart.about else Html(),
        tag("div", id=f"chart-{chart.key}", class_="chart", data_of=f"data-{chart.key}"),
        tag("p", _BANDS, class_="note"),
        tag("noscript", tag("p", _NO_SCRIPT)),
        data(f"data-{chart.key}", chart.data),
    ]


def _figure(picture: Picture) -> Html:
    caption = tag("figcaption", tag("b", f"{picture.label}: "), f"{picture.about}.")
    if picture.reason:
        return tag("p", tag("b", f"{picture.label}, {picture.name}: "), f"left out: {picture.reason}.", class_="warn")
    return tag("figure", tag("img", src=picture.source, alt=picture.alt, loading="eager"), caption)


def _tables(runs: Sequence[FinishedRun], most_cells: int) -> tuple[list[Table], list[str]]:
    """Return all tables except those of routes, and descriptions of those that are too large."""
    shown, left_out = [], []
    for run, label in zip(runs, labels(runs), strict=True):
        for name, frame in run.tables.items():
            if name == "results":
                continue
            if frame.size > most_cells:
                left_out.append(f"{label}: table {name}, {len(frame)} rows; it is {run.path / f'{name}.parquet'}")
                continue
            most_cells -= frame.size
            shown.append(format_table(f"{label}: {name}", frame))
        left_out += [
            f"{label}: table {name}, {rows} rows; it is {run.path / f'{name}.parquet'}"
            for name, rows in run.large.items()
        ]
    return shown, left_out


def _folded(tables: Sequence[Table]) -> Iterator[Html]:
    for number, table in enumerate(tables):
        rows = tag("span", f" {len(table.rows)} row{'s'[: len(table.rows) != 1]}")
        yield tag("details", tag("summary", table.name, rows), *_table(table, f"table-{number}"))


def _notes(notes: Iterable[str]) -> Iterator[Html]:
    for note in notes:
        yield tag("p", f"{note}.", class_="warn")


def _table(table: Table, key: str) -> Iterator[Html]:
    heads = [tag("th", column.title, *_unit(column), scope="col", data_n=column.numeric) for column in table.columns]
    long = [any(len(row[column].text) > _LONG for row in table.rows) for column in range(len(table.columns))]
    rows = [tag("tr", [_cell(cell, is_long) for cell, is_long in zip(row, long, strict=True)]) for row in table.rows]
    whole = tag("table", tag("thead", tag("tr", heads)), tag("tbody", rows), id=key, aria_label=table.name)
    yield tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=f"Table: {table.name}")


def _unit(column: Column) -> list[object]:
    return [", ", tag("i", column.unit)] if column.unit else []


def _cell(cell: Cell, is_long: bool) -> Html:
    error = tag("small", f" ±\N{NO-BREAK SPACE}{cell.error}") if cell.error else None
    return tag("td", cell.text, error, data_v=cell.value or None, class_="long" if is_long else None)


def _accounts(runs: Sequence[FinishedRun]) -> Iterator[Html]:
    for run, label in zip(runs, labels(runs), strict=True):
        origin = provenance(run)
        yield tag("h3", label if label == run.word else f"{label}: {run.word}")
        if origin.command:
            words = [part for word in origin.command for part in (tag("span", word), " ")]
            yield tag("pre", tag("code", words[:-1]), class_="command")
        if origin.note:
            yield tag("p", origin.note, class_="note")
        facts = [*origin.facts]
        facts += [
            ("Left out", f"{', '.join(whats[:6])}{f' and {len(whats) - 6} more' if len(whats) > 6 else ''}: {why}")
            for why, whats in origin.skipped
        ]
        facts += [("Not finite", f"{what}: NaN or infinity in batch {batches}") for what, batches in origin.non_finite]
        yield tag("dl", [(tag("dt", name), tag("dd", value)) for name, value in facts])


def _missing(collected: CollectedRuns, left_out: Sequence[str]) -> Iterator[Html]:
    items = [f"{path}: {why}" for path, why in collected.others] + list(left_out)
    if items:
        yield tag("ul", [tag("li", item) for item in items])
