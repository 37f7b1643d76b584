"""Maps show the values of the table at their places, on even scales, and say what they cannot show."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

import layersurgery as ls
from layersurgery.figures.map_scale import DIVERGING, SEQUENTIAL, MapScale, is_band, lowest_cells
from layersurgery.figures.maps import draw_map, edit_map
from layersurgery.figures.style import new_figure
from layersurgery.figures.sweeps import Sweep, maps
from layersurgery.plans.families import FAMILIES
from layersurgery.registry import column
from tests.support.zoo import tiny_model, tokens

KL, LOSS = column("kl_nats"), column("loss_change_nats")
MAPS = [family.name for family in FAMILIES.values() if family.axes]


def square(depth: int, **values: Any) -> pd.DataFrame:
    """A map of all pairs of blocks, with KL from 0.01 to 10 or other values."""
    start, stop = np.indices((depth, depth)).reshape(2, -1)
    kl = np.geomspace(0.01, 10, depth * depth)
    return pd.DataFrame({"from": start, "to": stop, "kl_nats": kl} | values)


def drawn(frame: pd.DataFrame, about: Any = KL, **options: Any) -> tuple[Axes, Any, Any]:
    """Draw a map alone, and return its axis, its matrix and the colors of its cells."""
    with new_figure(5, 5) as figure:
        axis = figure.subplots()
        draw_map(figure, axis, frame, about, rows="down", columns="right", **options)
        figure.draw_without_rendering()
    image = axis.get_images()[0]
    matrix: Any = image.get_array()
    return axis, np.ma.filled(matrix, np.nan), image.to_rgba(np.ma.filled(matrix, np.nan))


def points(axis: Axes, marker: str) -> list[tuple[float, float]]:
    """Return the places of a kind of marks, each once."""
    lines: Any = [line for line in axis.get_lines() if line.get_marker() == marker]
    return sorted({(float(x), float(y)) for line in lines for x, y in line.get_xydata()})


@pytest.fixture(scope="module")
def results() -> pd.DataFrame:
    return ls.sweep(tiny_model("llama"), ",".join([*MAPS, "repeat-spans:3"]), tokens(2))


@pytest.fixture(scope="module")
def figures(results: pd.DataFrame) -> dict[str, Figure]:
    return maps(Sweep.of(results, "pydoc"))


def test_every_family_of_cells_has_its_figure_with_the_values_of_the_table(
    results: pd.DataFrame, figures: dict[str, Figure]
) -> None:
    assert list(figures) == ["heads", "drop-spans", "repeat-spans", "repeat-spans-2", "jump", "replace", "swap-pairs"]
    for name in MAPS:
        rows = results[(results.edit == name) & ~results.plan.str.contains("x3")]
        axis = figures[name].axes[0]
        assert (axis.get_ylabel(), axis.get_xlabel().splitlines()[0]) == FAMILIES[name].axes
        left, _, *ends = axis.get_images()[0].get_extent()
        top = min(ends)
        matrix: Any = axis.get_images()[0].get_array()
        for _, row in rows.iterrows():
            assert matrix[int(row["from"] - top - 0.5), int(row["to"] - left - 0.5)] == row.kl_nats
    three = results[results.plan == "repeat 1:3 x3"].iloc[0]
    matrix = figures["repeat-spans-2"].axes[0].get_images()[0].get_array()
    assert three.kl_nats in matrix
    assert "3 passes" in figures["repeat-spans-2"].get_suptitle()


def test_a_band_is_drawn_along_itself() -> None:
    frame = square(64).query("0 < to - `from` <= 8")
    axis, matrix, _ = drawn(frame)
    assert matrix.shape == (8, 63)
    for _, row in frame.iterrows():
        assert matrix[int(row["to"] - row["from"] - 1), int(row["from"])] == row.kl_nats
    assert axis.get_xlabel().splitlines()[0] == "→ down    ↑ right \N{MINUS SIGN} down"
    assert axis.get_images()[0].origin == "lower"
    assert not is_band(square(64))
    assert not is_band(square(8).query("0 < to - `from` <= 4"))


def test_cells_without_a_value_are_hatched_and_said() -> None:
    frame = square(6).query("not (`from` == 2 and to == 3)").reset_index(drop=True)
    frame.loc[0, "kl_nats"], frame.loc[7, "kl_nats"], frame.loc[8, "kl_nats"] = np.nan, np.inf, 0.0
    axis, matrix, colors = drawn(frame)
    assert np.isnan(matrix[2, 3])
    assert np.isnan(matrix[0, 0])
    assert (colors[2, 3, 3], colors[0, 0, 3], colors[4, 4, 3]) == (0, 0, 1)  # the hatched ground shows through
    assert axis.patch.get_hatch() == "////"
    assert points(axis, "x") == [(0, 0), (1, 1)]
    assert np.isfinite(frame.kl_nats[2:7]).all()
    assert " ".join(axis.get_xlabel().split()) == (
        "right \N{MULTIPLICATION SIGN}: not a finite number (2); hatched: not measured; "
        "1 cell of zero or less in the lowest color"
    )
    assert colors[1, 2] == pytest.approx(matplotlib.colors.to_rgba(SEQUENTIAL[0]), abs=0.01)


@pytest.mark.parametrize("value", [0.25, 0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("about", [KL, LOSS])
def test_a_constant_map_has_one_color(value: float, about: Any) -> None:
    axis, _, colors = drawn(square(4, **{about.name: value}), about, best=1)
    assert len(np.unique(colors.reshape(-1, 4), axis=0)) == 1
    if np.isfinite(value):
        assert axis.child_axes[0].get_yticks().size
        if about is KL:
            assert colors[0, 0] == pytest.approx(matplotlib.colors.to_rgba(SEQUENTIAL[4]), abs=0.02)


def test_changes_are_white_at_zero_and_alike_on_both_sides() -> None:
    changes = np.concatenate([np.linspace(-0.02, 0.02, 35), [7]])
    _, _, colors = drawn(square(6, loss_change_nats=changes), LOSS)
    of_cells = [lightness(color) for color in colors.reshape(-1, 4)]
    assert of_cells[:17] == pytest.approx(of_cells[34:17:-1], abs=0.7)
    assert colors[2, 5] == pytest.approx(matplotlib.colors.to_rgba(DIVERGING[4]), abs=0.01)
    # One large value does not take the colors from the small ones.
    assert lightness(colors[5, 4]) < lightness(colors[2, 5]) - 8


def lightness(color: Any) -> float:
    """CIELAB lightness of a color, 0 to 100."""
    rgb = np.array(matplotlib.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16)


def test_scales_are_even_in_lightness() -> None:
    cividis = matplotlib.colormaps["cividis"]
    assert [matplotlib.colors.to_hex(cividis(step)) for step in np.linspace(0, 1, 9)] == list(SEQUENTIAL)
    for colors in (SEQUENTIAL, DIVERGING[:5], DIVERGING[:3:-1]):
        steps = [lightness(after) - lightness(before) for before, after in pairwise(colors)]
        assert min(steps) > 0.7 * np.mean(steps)
        assert max(steps) < 1.3 * np.mean(steps)
    assert [lightness(color) for color in DIVERGING] == pytest.approx([lightness(c) for c in DIVERGING[::-1]], abs=1)


@settings(max_examples=30)
@given(
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=30),
    st.sampled_from(["kl_nats", "agreement", "loss_change_nats"]),
)
def test_a_scale_orders_all_values_and_its_ticks_are_on_it(values: list[float], name: str) -> None:
    scale = MapScale.of(values, column(name))
    assert scale.low < scale.high
    assert scale.low <= min(values) or scale.kind == "log"
    assert max(values) <= scale.high
    room = 1e-3 * (scale.high - scale.low)
    assert all(scale.low - room <= tick <= scale.high + room for tick in scale.ticks)
    inside = np.sort(np.clip(values, scale.low, scale.high))
    assert (np.diff(scale.forward(inside)) >= 0).all()
    np.testing.assert_allclose(scale.inverse(scale.forward(inside)), inside, rtol=1e-6, atol=1e-12)
    assert scale.low == -scale.high or not scale.diverging


@settings(max_examples=30)
@given(st.lists(st.sampled_from([0.1, 0.2, 0.5, np.nan, np.inf]), min_size=16, max_size=16), st.integers(0, 3))
def test_the_lowest_cells_are_those_of_a_search(values: list[float], count: int) -> None:
    frame = square(4, kl_nats=values)
    found = lowest_cells(frame, "kl_nats", count)
    for side, sign in (("above", 1), ("below", -1)):
        of_side = frame[np.sign(frame["to"] - frame["from"]) == sign]
        known = sorted(value for value in of_side.kl_nats if np.isfinite(value))[:count]
        assert found[np.sign(found["to"] - found["from"]) == sign].kl_nats.tolist() == known, side


def test_the_lowest_cells_have_a_ring_and_a_name(results: pd.DataFrame, figures: dict[str, Figure]) -> None:
    jumps = results[results.edit == "jump"]
    figure = figures["jump"]
    drops, repeats = jumps[jumps["from"] < jumps["to"]], jumps[jumps["from"] > jumps["to"]]
    lowest = [rows.loc[rows.kl_nats.idxmin()] for rows in (drops, repeats)]
    for axis in figure.axes[:3]:
        assert points(axis, "o") == sorted((row["to"], row["from"]) for row in lowest)
    said = " ".join(figure.axes[0].get_xlabel().split())
    assert said.endswith("; ".join(f"{row['name']}: {float(f'{row.kl_nats:.3g}'):g} nats" for row in lowest))
    assert "○" not in figure.axes[1].get_xlabel()


@pytest.mark.parametrize(("depth", "longest"), [(8, None), (30, None), (32, None), (64, 8), (80, None), (80, 8)])
def test_labels_of_blocks_do_not_touch(depth: int, longest: int | None) -> None:
    frame = square(depth, agreement=0.5, loss_change_nats=0.1)
    if longest:
        frame = frame[(frame["to"] - frame["from"]).abs() <= longest]
    figure = edit_map(frame, ("$down_$", "$right_$"), "$a title_$")
    with matplotlib.rc_context():
        figure.draw_without_rendering()
    for axis in figure.axes[:3]:
        for labels, side in ((axis.get_xticklabels(), "x"), (axis.get_yticklabels(), "y")):
            boxes = [label.get_window_extent() for label in labels]
            ends = sorted((getattr(box, f"{side}0"), getattr(box, f"{side}1")) for box in boxes)
            assert len(boxes) >= 2
            assert all(before[1] < after[0] for before, after in pairwise(ends))
        bar = axis.child_axes[0]
        ends = sorted((box.y0, box.y1) for box in (label.get_window_extent() for label in bar.get_yticklabels()))
        assert all(before[1] < after[0] + 1 for before, after in pairwise(ends))
    texts = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(texts) == (4 if longest and depth > 32 else 7)
    assert not any(text.get_parse_math() for text in texts)
