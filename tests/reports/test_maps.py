"""Test the interactive maps of a report in a real browser: what the table holds, by pointer and keyboard, and copied plans."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

import layersurgery as ls
from layersurgery.figures.map_scale import DIVERGING, SEQUENTIAL, MapScale, lowest_cells
from layersurgery.registry import column
from layersurgery.reports.collect import collect
from layersurgery.reports.maps import maps
from layersurgery.runs.tables import write_table
from tests.support.browser import CONTRAST, Browser, needs_browser
from tests.support.zoo import tiny_model, tokens

CHART = "#chart-edit-maps"


def results_in(directory: Path, kind: str, **tables: pd.DataFrame) -> None:
    """Write tables as a run would, without figures."""
    directory.mkdir(parents=True)
    for name, frame in tables.items():
        write_table(directory, name, frame)
    arguments = {"analysis": None if kind == "sweep" else directory.name, "model": {"name": "tiny"}}
    files = [f"{name}.parquet" for name in tables]
    facts = {"kind": f"layersurgery {kind}", "state": "finished", "figures": [], "files": files, "arguments": arguments}
    (directory / "run.json").write_text(json.dumps(facts))


def square(depth: int, **values: Any) -> pd.DataFrame:
    start, stop = np.indices((depth, depth)).reshape(2, -1)
    return pd.DataFrame({"from": start, "to": stop} | values)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of three maps with cells that are missing or not finite, and an analysis with a map for each branch."""
    path = tmp_path_factory.mktemp("maps")
    frame = ls.sweep(tiny_model("llama"), "jump,swap-pairs,drop-spans", tokens(3))
    frame = frame[~((frame.edit == "jump") & (frame.plan == "repeat 1:3"))].reset_index(drop=True)
    frame.loc[frame.plan == "drop 0:2", "kl_nats"] = np.nan
    frame.loc[(frame.plan == "drop 3") & (frame.edit == "jump"), "kl_nats"] = 0.0
    results_in(path / "sweep", "sweep", results=frame)
    halves = [square(5, part=part, effect=np.arange(25.0) * sign) for part, sign in (("attention", 1), ("mlp", -3))]
    cka = square(3, cka=np.linspace(0, 1, 9), cka_sem=0.01).query("`from` <= to")
    results_in(path / "propagation", "analysis", propagation=pd.concat(halves), cka=cka)
    return path


@pytest.fixture(scope="module")
def frame(runs: Path) -> pd.DataFrame:
    return pd.read_parquet(runs / "sweep" / "results.parquet")


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ls.report(runs, tmp_path_factory.mktemp("made") / "page.html").path


def hover(browser: Browser, frame: pd.DataFrame, row: pd.Series, chart: str = CHART) -> None:
    """Point at the middle of a cell, found by its place in the drawing."""
    edge = f"document.querySelector('{chart} .edge')"
    browser.js(f"{edge}.scrollIntoView({{ behavior: 'instant', block: 'center' }})")
    left, top, width, height = browser.js(
        f"const box = {edge}.getBoundingClientRect(); return [box.left, box.top, box.width, box.height]"
    )
    (first, last), (upper, lower) = [(int(frame[side].min()), int(frame[side].max())) for side in ("to", "from")]
    x = left + width * (row["to"] - first + 0.5) / (last - first + 1)
    y = top + height * (row["from"] - upper + 0.5) / (lower - upper + 1)
    actions: Any = ActionChains(browser.driver)
    actions.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    actions.perform()


def shown(browser: Browser, chart: str = CHART) -> str:
    return str(browser.one(f"{chart} .tip b").text)


@needs_browser
def test_cells_show_the_values_that_the_table_holds(browser: Browser, page: Path, frame: pd.DataFrame) -> None:
    browser.open(page)
    assert browser.errors() == []
    for label, edit in (("drop any span", "drop-spans"), ("jump", "jump")):
        browser.choose("edit-maps", label)
        cells = frame[frame.edit == edit]
        for metric in ("kl_nats", "agreement", "loss_change_nats"):
            about = column(metric)
            browser.choose("edit-maps", about.label)
            for _, row in cells.sample(2, random_state=1).iterrows():
                hover(browser, cells, row)
                assert shown(browser) == row.plan
                if np.isnan(row[metric]):
                    assert browser.one(f"{CHART} .tip .value").text == "not a finite number"
                    continue
                assert browser.exact("edit-maps") == row[metric]
                text = browser.one(f"{CHART} .tip").text.replace("\N{MINUS SIGN}", "-")
                low, high = map(float, re.search(r"interval: (\S+) to (\S+)", text).groups())  # type: ignore[union-attr]
                ends = [about.factor * row[f"{metric}_{end}"] for end in ("low", "high")]
                assert [low, high] == pytest.approx(ends, rel=6e-3, abs=1e-12)
                assert all(word in text for word in ("top-1 agreement", "change in loss") if about.label != word)


@needs_browser
def test_cells_without_a_value_look_different_and_say_nothing(
    browser: Browser, page: Path, frame: pd.DataFrame
) -> None:
    browser.open(page)
    browser.choose("edit-maps", "jump")
    jumps = frame[frame.edit == "jump"]
    assert len(browser.all(f"{CHART} .cell")) == jumps.kl_nats.notna().sum()
    assert len(browser.all(f"{CHART} .cross path")) == 1
    note = browser.one(f"{CHART} > .note").text
    assert note == "\N{MULTIPLICATION SIGN}: not a finite number (1). 1 cell of zero or less in the lowest color."
    hover(browser, jumps, jumps[jumps.plan == "drop 1"].iloc[0])
    assert browser.one(f"{CHART} .tip").is_displayed()
    hover(browser, jumps, pd.Series({"from": 3, "to": 1}))  # it was taken out of the table
    assert not browser.one(f"{CHART} .tip").is_displayed()


@needs_browser
def test_colors_are_those_of_the_figure(browser: Browser, page: Path, frame: pd.DataFrame) -> None:
    browser.open(page)
    cells = frame[frame.edit == "drop-spans"]
    for metric, colors in (("kl_nats", SEQUENTIAL), ("loss_change_nats", DIVERGING)):
        about = column(metric)
        browser.choose("edit-maps", about.label)
        values = cells[metric].dropna().to_numpy(float)
        scale = MapScale.of(values, about)
        norm = matplotlib.colors.FuncNorm((scale.forward, scale.inverse), scale.low, scale.high, clip=True)
        palette = matplotlib.colors.LinearSegmentedColormap.from_list("map", colors)
        fills = [cell.get_attribute("fill") for cell in browser.all(f"{CHART} .cell")]
        for fill, value in zip(fills, values, strict=True):
            drawn = [int(part) for part in re.findall(r"\d+", fill)]
            assert drawn == pytest.approx([255 * part for part in palette(norm(value))[:3]], abs=2)


@needs_browser
def test_maps_can_be_used_with_the_keyboard_and_plans_are_copied(
    browser: Browser, page: Path, frame: pd.DataFrame
) -> None:
    browser.open(page)
    browser.choose("edit-maps", "jump")
    jumps = frame[frame.edit == "jump"]
    browser.js(f"document.querySelector('{CHART} input:checked').focus()")
    browser.press(Keys.TAB, Keys.TAB)
    assert "Enter copies the plan" in browser.js("return document.activeElement.getAttribute('aria-label')")
    assert shown(browser) == lowest_cells(jumps, "kl_nats").plan.iloc[0] == "drop 3"
    steps = [
        (Keys.ARROW_UP, "drop 2:4"), (Keys.ARROW_RIGHT, "drop 2:5"), (Keys.ARROW_DOWN, "drop 3:5"),
        (Keys.ARROW_LEFT, "drop 3"), (Keys.ARROW_LEFT, "repeat 2"), (Keys.ARROW_LEFT, "repeat 0:3"),
        (Keys.ARROW_LEFT, "repeat 0:3"), (Keys.END, "drop 3:6"), (Keys.HOME, "repeat 0:3"),
    ]  # fmt: skip
    for key, plan in steps:
        browser.press(key)
        assert shown(browser) == plan
        assert browser.exact("edit-maps") == jumps.set_index("plan").kl_nats[plan]
    browser.press(Keys.ENTER)
    browser.until(lambda: browser.one(f"{CHART} .tip").text.endswith("Copied"))
    browser.press(Keys.ARROW_RIGHT)
    assert "Copied" not in browser.one(f"{CHART} .tip").text
    browser.press(Keys.ESCAPE)
    assert not browser.one(f"{CHART} .tip").is_displayed()
    assert pasted(browser) == "repeat 0:3"


@needs_browser
def test_a_click_copies_the_plan(browser: Browser, page: Path, frame: pd.DataFrame) -> None:
    browser.open(page)
    browser.choose("edit-maps", "swap two blocks")
    cells = pd.DataFrame({"from": range(6), "to": range(6)})  # a symmetric map is a square
    hover(browser, cells, pd.Series({"from": 4, "to": 1}))
    ActionChains(browser.driver).click().perform()
    browser.until(lambda: browser.one(f"{CHART} .tip").text.endswith("Copied"))
    assert shown(browser) == "swap 1 4"
    assert browser.exact("edit-maps") == frame.set_index("plan").kl_nats["swap 1 4"]
    assert pasted(browser) == "swap 1 4"


def pasted(browser: Browser) -> str:
    field = browser.one("#routes input")
    field.clear()
    field.send_keys(Keys.CONTROL, "v")
    return str(field.get_attribute("value"))


@needs_browser
def test_maps_fit_a_narrow_window(browser: Browser, page: Path, frame: pd.DataFrame) -> None:
    browser.open(page, width=390)
    browser.choose("edit-maps", "jump")
    jumps = frame[frame.edit == "jump"]
    for plan in ("drop 1", "repeat 0:6", "drop 0:5", "repeat 4"):
        row = jumps[jumps.plan == plan].iloc[0]
        hover(browser, jumps, row)
        assert shown(browser) == plan
        box, ring = browser.one(f"{CHART} .tip").rect, browser.one(f"{CHART} .ring").rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        apart = [
            box[side] + box[size] <= ring[side] or ring[side] + ring[size] <= box[side]
            for side, size in (("x", "width"), ("y", "height"))
        ]
        assert any(apart)  # the box does not hide the cell
        assert browser.js("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]


@needs_browser
def test_maps_can_be_read_in_the_dark_and_on_paper(browser: Browser, page: Path) -> None:
    for scheme in ("light", "dark"):
        browser.open(page, scheme=scheme)
        browser.js(f"document.querySelector('{CHART} input:checked').focus()")
        browser.press(Keys.TAB, Keys.TAB)
        assert browser.one(f"{CHART} .tip").is_displayed()
        assert 4.5 <= browser.js(CONTRAST) < 22
    browser.open(page, media="print")
    visible = "return [...document.querySelectorAll(arguments[0])].filter((node) => node.checkVisibility()).length"
    assert browser.js(visible, ".controls, .tip") == 0
    assert browser.js(visible, ".frame svg.map") == 2


@needs_browser
def test_tables_of_cells_are_maps_too_with_a_view_for_each_part(browser: Browser, page: Path) -> None:
    browser.open(page)
    chart = "#chart-layer-maps"
    labels = browser.js(f"return [...document.querySelectorAll('{chart} label')].map((one) => one.textContent)")
    assert labels == ["propagation: attention", "propagation: mlp", "cka"]
    cells = square(5, effect=np.arange(25.0) * -3)
    browser.choose("layer-maps", "propagation: mlp")
    for _, row in cells.sample(3, random_state=0).iterrows():
        hover(browser, cells, row, chart)
        start, end = (f"{row[side]:.0f}" for side in ("from", "to"))
        assert shown(browser, chart) == f"layer of the edit {start}, later layer {end}"
        assert browser.exact("layer-maps") == row.effect
    ActionChains(browser.driver).click().perform()
    assert "Copied" not in browser.one(f"{chart} .tip").text
    browser.choose("layer-maps", "cka")
    assert len(browser.all(f"{chart} .cell")) == 9  # both orders of each pair
    for pair in ({"from": 1, "to": 2}, {"from": 2, "to": 1}):
        hover(browser, square(3), pd.Series(pair), chart)
        assert shown(browser, chart) == "stream before block 1, stream before block 2"
        assert browser.one(f"{chart} .tip .value").text == "0.625 ± 0.010"


# Without a browser


def test_maps_without_room_are_left_out_and_named(tmp_path: Path) -> None:
    tables = {f"map{number}": square(80, value=1.5) for number in range(3)}
    results_in(tmp_path / "cosine", "analysis", **tables)
    left_out: list[str] = []
    collected = collect([tmp_path])
    (found,) = maps(collected.runs, left_out)
    assert [view["label"] for view in found.views] == ["map0"]
    assert left_out == [f"tiny: the map map{number}; the figure and the files have its 6400 cells" for number in (1, 2)]
    made = ls.report(tmp_path, tmp_path / "page.html")
    assert "tiny: table map0, 6400 rows; see map0.parquet in cosine" in made.skipped  # drawn, but not listed row by row
    assert set(left_out) < set(made.skipped)
    assert made.bytes < 3_000_000


def test_two_runs_with_one_map_are_told_apart_and_so_are_numbers_of_passes(tmp_path: Path) -> None:
    frame = ls.sweep(tiny_model("llama"), "repeat-spans:2,repeat-spans:3", tokens(2), layers="1:4")
    for name in ("first", "second"):
        results_in(tmp_path / name, "sweep", results=frame)
    (found,) = maps(collect([tmp_path]).runs, [])
    assert [view["label"] for view in found.views] == [
        f"repeat any span, {passes} passes: {name}" for name in ("first", "second") for passes in (2, 3)
    ]


def test_a_table_with_several_rows_in_a_cell_is_not_a_map(tmp_path: Path) -> None:
    twice = pd.concat([square(3, value=1.0), square(3, value=2.0)])
    results_in(
        tmp_path / "odd",
        "analysis",
        twice=twice,
        text=square(2, value=1.0).astype({"from": str}),
        empty=square(0, value=1.0),
    )
    left_out: list[str] = []
    assert maps(collect([tmp_path]).runs, left_out) == []
    assert left_out == ["tiny: 18 rows of twice on a map, since several of them have one place"]


def test_rows_of_one_place_do_not_hide_the_maps_of_other_edits(tmp_path: Path) -> None:
    """A copied layer is passed twice, so the table of propagation has two rows for its place."""
    frame = ls.sweep(tiny_model("llama"), "drop,copy:1", tokens(2), propagation=True)
    table = pd.DataFrame(frame.attrs["propagation"])
    results_in(tmp_path / "sweep", "sweep", results=frame, propagation=table)
    left_out: list[str] = []
    found = {one.key: one.views for one in maps(collect([tmp_path]).runs, left_out)}["layer-maps"]
    assert [view["label"] for view in found] == ["propagation: drop, attention", "propagation: drop, mlp"]
    copies = (table.edit == "copy").sum()
    assert left_out == [f"tiny: {copies} rows of propagation on a map, since several of them have one place"]
