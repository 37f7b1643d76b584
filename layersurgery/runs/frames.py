"""Return results as tables that are at home in a notebook: with bars, and with the figures of their command."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pandas as pd
from pandas.plotting import PlotAccessor

from ..errors import MeasurementError
from ..registry import ANALYSES, METRICS, Column

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_ROWS = 60
# What a narrow screen should show comes first: it is what the rows are, and their metrics.
_ROW = ("name", "edit", "layer")
_CELL = ("from", "to")  # of maps; in sweeps, names say it
_FIRST = ("name", "criterion", "removed", "layer", "stage", "kl_nats", "agreement", "edit")
_LAST = ("plan", "route", "model", "relative_depth", "depth", "tokens", "sequences")
_STYLE = "background:linear-gradient(90deg,#9ecae1 {percent:.0f}%,transparent {percent:.0f}%)"


class _ResultPlot(PlotAccessor):  # type: ignore[misc]
    """`frame.plot()` draws the figure of the results; with arguments, and as `frame.plot.line`, it is pandas' own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return super().__call__(*args, **kwargs)
        return self._parent.figure()


class ResultFrame(pd.DataFrame):  # type: ignore[misc]
    """Results of a sweep or an analysis: a DataFrame that shows itself with bars and draws its own figure.

    Tables that pandas makes of it (rows, columns, joins) are plain DataFrames.
    """

    _metadata = ["kind", "caption"]  # noqa: RUF012 - pandas reads this list

    kind: str = ""
    caption: str = ""

    @property
    def plot(self) -> _ResultPlot:
        """Draw the figure of the results when called without arguments; otherwise what pandas' `plot` does."""
        return _ResultPlot(self)

    @property
    def _constructor(self) -> Callable[..., pd.DataFrame]:
        plain: Callable[..., pd.DataFrame] = pd.DataFrame
        return plain

    def to_pandas(self) -> pd.DataFrame:
        """Return the results as a plain DataFrame."""
        plain = pd.DataFrame(self)
        plain.attrs = dict(self.attrs)
        return plain

    def figure(self) -> Figure:
        """Draw the figure of the results, as the command draws it.

        Raises:
            MeasurementError: these results have no figure.
        """
        from ..figures.analyses import signal_figures
        from ..figures.style import ModelTables
        from ..figures.sweeps import Sweep, sweep_figures

        label = str(self["model"].iloc[0]).rpartition("/")[2] if "model" in self and len(self) else "model"
        if self.kind == "sweep":
            figures = sweep_figures([Sweep(self.to_pandas(), label, self.caption)])
        else:
            figures = signal_figures([ModelTables({self.kind: self.to_pandas()}, label, self.caption)])
        if not figures:
            raise MeasurementError(f"the table {self.kind!r} has no figure")
        return next(iter(figures.values()))

    def _shown(self) -> list[Column]:
        columns = METRICS if self.kind == "sweep" else ANALYSES[self.kind].columns if self.kind in ANALYSES else ()
        return [column for column in columns if column.name in self]

    def _repr_html_(self) -> str:
        shown = self._shown()
        if not shown:
            return str(self.to_pandas()._repr_html_())
        keys = _ROW if "name" in self else (*_ROW, *_CELL)
        names = [name for name in keys if name in self and self[name].nunique() > 1]
        heads = [*names, *(f"{column.heading or column.label}" for column in shown)]
        rows = []
        largest = {column.name: self[column.name].abs().max() for column in shown}
        for record in self.head(_MOST_ROWS).to_dict("records"):
            cells = [f"<td>{html.escape(_text(record[name]))}</td>" for name in names]
            cells += [_number_cell(record[column.name], column, largest[column.name]) for column in shown]
            rows.append(f"<tr>{''.join(cells)}</tr>")
        more = f"<p>and {len(self) - _MOST_ROWS} more</p>" if len(self) > _MOST_ROWS else ""
        head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
        return (
            f"<p>{html.escape(self.caption)}</p><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>{more}{self._figure_html()}"
        )

    def _figure_html(self) -> str:
        """Return the figure as an image; nothing if there is none."""
        import base64
        import io

        try:
            figure = self.figure()
        except Exception:  # a table whose columns were changed may not be drawn
            return ""
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=90, bbox_inches="tight")
        return f'<img alt="figure" src="data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}">'


def as_result(frame: pd.DataFrame, kind: str, caption: str = "") -> ResultFrame:
    """Return a table as a `ResultFrame`.

    Args:
        frame: the table.
        kind: "sweep", or the name of the table of an analysis.
        caption: describes the text.
    """
    metrics = [column.name for column in METRICS] if "kl_nats" in frame else []
    first = [name for name in dict.fromkeys((*_FIRST, *metrics)) if name in frame]
    last = [name for name in _LAST if name in frame]
    order = [*first, *(name for name in frame if name not in (*first, *last)), *last]
    result = ResultFrame(frame[order])
    result.attrs = dict(frame.attrs)
    result.kind, result.caption = kind, caption
    return result


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(value)


def _number_cell(value: Any, column: Column, largest: float) -> str:
    if pd.isna(value):
        return "<td></td>"
    percent = 100 * abs(float(value)) / largest if largest and largest == largest else 0
    number = f"{column.factor * float(value):.{column.digits}f}{' %' if column.unit == '%' else ''}"
    return f'<td style="text-align:right;{_STYLE.format(percent=percent)}">{number}</td>'
