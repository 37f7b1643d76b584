"""`layersurgery report`: its page in a real browser, and what it does with text and files that mean no good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import layersurgery as ls
from layersurgery.analyses.descriptions import describe_costs, describe_ranks
from layersurgery.figures.style import COLORS
from layersurgery.registry import METRICS, Column
from layersurgery.reports import charts, tables
from layersurgery.reports.page import template
from layersurgery.reports.text_format import format_with_error, is_hidden, show_control_characters
from layersurgery.runs.tables import write_table
from tests.analyses.test_descriptions import costs, ranks
from tests.cli.test_cli import result_of, run
from tests.support.browser import CONTRAST, Browser, needs_browser
from tests.support.tiny_checkpoint import checkpoint
from tests.support.zoo import tiny_model, tokens

HOSTILE = "<script>alert('ran')</script><img src=x onerror=\"document.title='ran'\">&amp;\"'\x00\x07\x1b[31m\u202eevil\u2066\u200b\x85"
EXAMPLES = Path(__file__).parents[2] / "examples" / "smollm2-135m"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of a tiny model with its figure, the stages of a real one from the examples, and an interrupted sweep."""
    path = tmp_path_factory.mktemp("runs")
    model = checkpoint(path / "tiny", "gpt2")
    (path / "story.txt").write_text("".join(f"Once upon a time there were {number} layers.\n" for number in range(60)))
    words = ["--data", path / "story.txt", "-n", 120, "--context", 30]
    result_of("sweep", model, *words, "--edits", "swap,drop,skip-mlp", "-o", path / "results" / "sweep")
    facts = json.loads((path / "results" / "sweep" / "run.json").read_text())
    stages = path / "results" / "stages"
    stages.mkdir()
    tables, figures = ("stages", "boundaries", "neurons", "similarity"), ("stages.png", "similarity.png")
    for table in tables:
        pd.read_csv(EXAMPLES / f"{table}.csv").to_parquet(stages / f"{table}.parquet")
    for figure in figures:
        shutil.copy(EXAMPLES / figure, stages)
    of_stages = {
        "kind": "layersurgery analysis",
        "arguments": facts["arguments"]
        | {"analysis": "stages", "model": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct"}},
        "command": "layersurgery stages -o stages",
        "files": [f"{table}.parquet" for table in tables],
        "figures": figures,
    }
    (stages / "run.json").write_text(json.dumps(facts | of_stages))
    stopped = path / "results" / "deeper" / "stopped"
    stopped.mkdir(parents=True)
    (stopped / "run.json").write_text(json.dumps(facts | {"state": "begun"}))
    return path / "results"


@pytest.fixture(scope="module")
def made(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> ls.Report:
    return ls.report(runs, tmp_path_factory.mktemp("made") / "page.html")


def results_in(directory: Path, name: str = "tiny", plans: int = 0, **facts: Any) -> Path:
    """A finished sweep of four drops and as many plans as are asked for, made by hand."""
    directory.mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"name": "unedited", "edit": "none", "layer": None, "route": "0:4"}]
    for layer, route in enumerate(("1:4", "0 2:4", "0:2 3", "0:3")):
        rows.append({"name": f"drop {layer}", "edit": "drop", "layer": layer, "route": route})
    rows += [{"name": f"plan {number}", "edit": "plan", "layer": None, "route": "0 2 1 3"} for number in range(plans)]
    frame = pd.DataFrame(rows).astype({"layer": "Int64"}).assign(model=name, depth=4)
    frame["plan"] = frame["name"]
    frame["relative_depth"] = frame.layer.astype(float) / 3
    for place, column in enumerate(("kl_nats", "agreement")):
        edited = [abs((7919 * row) % 1000 - 500 * place) / 1000 + 1e-3 for row in range(1, len(frame))]
        frame[column] = [0.0 + place, *edited]
        frame[f"{column}_sem"] = 0.012345
    write_table(directory, "results", frame)
    facts = {
        "kind": "layersurgery sweep",
        "state": "finished",
        "arguments": {"model": {"name": name}},
        "figures": [],
    } | facts
    (directory / "run.json").write_text(json.dumps(facts))
    return directory


# In a browser


@needs_browser
def test_it_loads_nothing_and_complains_of_nothing(browser: Browser, made: ls.Report) -> None:
    browser.open(made.path)
    assert browser.errors() == []
    others = [url for url in browser.requests() if not url.startswith("data:")]
    assert others == [made.path.resolve().as_uri()]
    assert browser.js("return [...document.images].every((image) => image.complete && image.naturalWidth > 100)")
    assert len(browser.all("img")) == 3
    assert browser.js("return document.documentElement.lang") == "en"
    levels = browser.js("return [...document.querySelectorAll('h1,h2,h3,h4')].map((head) => Number(head.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(browser.all(name) for name in ("header", "nav", "main", "footer"))
    assert browser.js("return [...document.images].every((image) => image.alt.length > 40)")


@needs_browser
def test_curves_show_the_value_that_the_table_holds(browser: Browser, made: ls.Report, runs: Path) -> None:
    frame = ls.read_results(runs / "sweep")
    browser.open(made.path)
    browser.js("document.querySelector('#chart-edits').scrollIntoView()")
    for edit, words in (("swap", "swap"), ("skip-mlp", "skip MLP")):
        browser.choose("edits", words)
        meant = frame[frame.edit == edit].sort_values("layer")
        marks = browser.all("#chart-edits .frame .mark")
        assert len(marks) == len(meant)
        for mark, (_, row) in zip(marks, meant.iterrows(), strict=True):
            ActionChains(browser.driver).move_to_element(mark).perform()
            assert browser.exact() == row.kl_nats
            assert browser.one("#chart-edits .tip b").text == row["name"]
            assert (
                browser.one("#chart-edits .tip .value").text.split(" ")[0]
                == format_with_error(row.kl_nats, row.kl_nats_sem)[0]
            )
    ActionChains(browser.driver).move_to_element(browser.one("h1")).perform()
    assert not browser.one("#chart-edits .tip").is_displayed()


@needs_browser
def test_everything_can_be_done_with_the_keyboard(browser: Browser, made: ls.Report, runs: Path) -> None:
    frame = ls.read_results(runs / "sweep")
    browser.open(made.path)
    for _ in range(40):
        browser.press(Keys.TAB)
        if browser.js("return document.activeElement.name") == "chart-edits-view":
            break
    caption = browser.one("#chart-edits .axis")
    assert caption.text == "KL from the unedited model (nats, log scale) · all edits"
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert caption.text == "KL from the unedited model (nats, log scale) · drop"
    browser.press(Keys.TAB, Keys.ARROW_RIGHT)
    assert caption.text == "Top-1 agreement (%) · drop"
    browser.press(Keys.TAB)
    drops = frame[frame.edit == "drop"].sort_values("layer").agreement.tolist()
    assert browser.exact() == drops[0]
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.exact() == drops[2]
    browser.press(Keys.ARROW_LEFT)
    assert browser.exact() == drops[1]
    browser.press(Keys.END)
    assert browser.exact() == drops[-1]
    browser.press(Keys.HOME)
    assert browser.exact() == drops[0]
    browser.press(Keys.ESCAPE)
    assert not browser.one("#chart-edits .tip").is_displayed()
    # Back to all edits, and down from the swaps to the drops.
    ActionChains(browser.driver).key_down(Keys.SHIFT).send_keys(Keys.TAB, Keys.TAB).key_up(Keys.SHIFT).perform()
    browser.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert caption.text == "Top-1 agreement (%) · all edits"
    browser.press(Keys.TAB, Keys.TAB)
    assert browser.exact() == frame[frame.edit == "swap"].agreement.iloc[0]
    browser.press(Keys.ARROW_DOWN)
    assert browser.exact() == drops[0]
    browser.press(Keys.ARROW_UP, Keys.ARROW_UP)
    assert browser.exact() == frame[frame.edit == "skip-mlp"].agreement.iloc[0]
    outline = "const style = getComputedStyle(document.activeElement); return style.outlineStyle + parseFloat(style.outlineWidth)"
    assert browser.js(outline) == "solid2"


@needs_browser
def test_the_table_of_routes_sorts_by_exact_values_and_filters(browser: Browser, made: ls.Report, runs: Path) -> None:
    frame = ls.read_results(runs / "sweep")
    browser.open(made.path)
    heads = browser.all("#table-routes th")
    place = next(number for number, head in enumerate(heads) if head.text.startswith("KL from"))
    assert browser.column(place) == frame.kl_nats.tolist()
    button = heads[place].find_element(By.TAG_NAME, "button")
    browser.js("arguments[0].focus()", button)
    browser.press(Keys.ENTER)
    assert browser.column(place) == sorted(frame.kl_nats)
    assert heads[place].get_attribute("aria-sort") == "ascending"
    browser.press(Keys.SPACE)
    assert browser.column(place) == sorted(frame.kl_nats, reverse=True)
    assert heads[place].get_attribute("aria-sort") == "descending"
    browser.press(Keys.ENTER)
    assert browser.column(place) == frame.kl_nats.tolist()
    assert heads[place].get_attribute("aria-sort") is None
    browser.one("#routes input").send_keys("skip-mlp 2")
    assert browser.column(place) == frame[frame.plan == "skip-mlp 2"].kl_nats.tolist()
    assert browser.one("#routes output").text == f"1 of {len(frame)} rows"


@needs_browser
def test_a_narrow_window_does_not_scroll_sideways(browser: Browser, made: ls.Report) -> None:
    browser.open(made.path, width=390)
    browser.js("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert browser.js("return [innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]") == [
        390,
        390,
        390,
    ]
    assert browser.js("return document.querySelector('.frame svg').viewBox.baseVal.width") < 390
    ActionChains(browser.driver).move_to_element(browser.all("#chart-edits .mark")[4]).perform()
    box = browser.one("#chart-edits .tip").rect
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


@needs_browser
def test_print_shows_everything_but_controls(browser: Browser, made: ls.Report, runs: Path) -> None:
    frame = ls.read_results(runs / "sweep")
    browser.open(made.path)
    browser.one("#routes input").send_keys("swap")
    browser.media("print")
    shown = "return [...document.querySelectorAll(arguments[0])].filter((node) => node.checkVisibility({contentVisibilityAuto: true})).length"
    browser.until(lambda: browser.js(shown, "details table") == 4)  # a page hears of it with its next picture
    assert browser.js(shown, "nav, input, .controls, .copy, .tip") == 0
    assert browser.js(shown, "#table-routes tbody tr") == len(frame)
    assert browser.js(shown, "details table") == len(browser.all("details table")) == 4
    assert browser.js(shown, "figure img, .frame svg") == 5
    assert browser.js(shown, "th") == len(browser.all("th"))
    browser.media("")
    browser.until(lambda: browser.js(shown, "details table") == 0)


@needs_browser
def test_dark_and_light_can_be_read(browser: Browser, made: ls.Report) -> None:
    papers = set()
    for scheme in ("light", "dark"):
        browser.open(made.path, scheme=scheme)
        browser.js("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
        papers.add(browser.js("return getComputedStyle(document.documentElement).backgroundColor"))
        assert 4.5 <= browser.js(CONTRAST) < 22
    assert papers == {"rgb(255, 255, 255)", "rgb(21, 23, 26)"}


@needs_browser
def test_hostile_text_is_shown_and_not_run(browser: Browser, tmp_path: Path) -> None:
    place = results_in(
        tmp_path / "<img src=x onerror=alert(1)>",
        HOSTILE,
        skipped={HOSTILE: HOSTILE},
        command=f"layersurgery sweep '{HOSTILE}'".replace("'", '"'),
    )
    facts = json.loads((place / "run.json").read_text())
    tokens = pd.DataFrame(
        {
            "layer": range(12),
            "relative_depth": [layer / 11 for layer in range(12)],
            f"{HOSTILE[:40]}_nats": range(12),
            "token": ["</script><script>alert(2)</script>", " the\n", "\u202e<b>", *["x"] * 9],
        }
    )
    write_table(place, "examples", tokens, csv=False)
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="200" height="200"><script>alert(3)</script></svg>'
    (place / "odd.svg").write_text(svg)
    facts |= {"files": ["results.parquet", "examples.parquet"], "figures": ["odd.svg", "../../secret.png", "none.png"]}
    (place / "run.json").write_text(json.dumps(facts))
    page = ls.report(place, tmp_path / "page.html").path
    text = page.read_text()
    assert text.count("<script") == 2  # the data, and the page's own
    assert not [letter for letter in text if is_hidden(letter) and letter != "\n"]
    assert "secret" not in text.partition("<main")[2]
    browser.open(page)
    assert browser.errors() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page.as_uri()]
    assert "ran" not in browser.js("return document.title.split('—')[0].replace(\"'ran'\", '')")
    assert show_control_characters(HOSTILE.rpartition("/")[2]) in browser.one("h1").text
    shown = browser.js("return document.querySelector('#table-0').textContent")
    assert "</script><script>alert(2)</script>" in shown
    assert "␣the␊" in shown
    assert "⟨U+202E⟩<b>" in shown
    browser.js("document.querySelector('#chart-edits .plot').focus()")
    browser.press(Keys.ARROW_RIGHT)
    assert show_control_characters(HOSTILE.rpartition("/")[2]) in browser.one("#chart-edits .tip").text


@needs_browser
def test_metrics_of_tasks_are_in_the_chart_the_table_and_the_words(browser: Browser, tmp_path: Path) -> None:
    place = results_in(tmp_path / "tasks")
    frame = pd.read_parquet(place / "results.parquet")
    values = [0.625, 0.25, 0.5, 0.6, 0.375]
    write_table(place, "results", frame.assign(task_arc_easy_acc=values, task_arc_easy_acc_sem=0.05))
    browser.open(ls.report(place, tmp_path / "page.html").path)
    assert browser.errors() == []
    words = "Accuracy on arc_easy is 0.625 in the unedited model; under edits it is highest with drop 2 (0.6)"
    assert words in browser.one("#words .lede").text
    heads = browser.all("#table-routes th")
    at = next(number for number, head in enumerate(heads) if head.text == "Accuracy on arc_easy")
    assert browser.column(at) == values
    browser.js("document.querySelector('#chart-edits').scrollIntoView()")
    browser.choose("edits", "accuracy on arc_easy")
    for mark, value in zip(browser.all("#chart-edits .frame .mark"), values[1:], strict=True):
        ActionChains(browser.driver).move_to_element(mark).perform()
        assert browser.exact() == value


# Without a browser


def test_what_it_says_of_itself(made: ls.Report, runs: Path) -> None:
    page = made.path.read_text()
    assert made.bytes == made.path.stat().st_size < 3_000_000
    assert made.runs == [runs / "stages", runs / "sweep"]
    assert list(made.not_shown) == [runs / "deeper" / "stopped"]
    assert "has not finished" in page
    assert "1 directory is not shown" in page
    words = ls.summary_sentence(ls.read_results(runs / "sweep"))
    assert f"{words[0].upper()}{words[1:]}." in page
    stages = ls.analyses.describe_stages(ls.read_results(runs / "stages"))
    assert stages.split("'")[0][:60] in page
    assert made.skipped == []


def test_the_same_results_give_the_same_page(made: ls.Report, runs: Path, tmp_path: Path) -> None:
    assert ls.report([runs / "stages", runs], tmp_path / "again.html").path.read_bytes() == made.path.read_bytes()


def test_the_command_that_repeats_a_run(made: ls.Report, runs: Path) -> None:
    facts = json.loads((runs / "sweep" / "run.json").read_text())
    story = runs.parent / "story.txt"
    options = "-n 120 --context 30 --edits swap,drop,skip-mlp"
    assert facts["command"] == (
        f"layersurgery sweep {runs.parent / 'tiny'} --data {story} {options} -o {runs / 'sweep'} --json"
    )
    text = Text.of(made.path.read_text())
    assert text.find(f"layersurgery sweep tiny --data story.txt {options} -o sweep --json")
    assert text.find("Files are shown without their directories.")


def test_a_page_names_files_and_not_the_directories_of_the_machine(made: ls.Report, runs: Path, tmp_path: Path) -> None:
    assert str(runs.parent) not in made.path.read_text()
    secret, windows = "/home/some one/models", "C:\\Users\\someone\\models"
    arguments = {"model": {"name": f"{secret}/first"}, "text": {"data": f"{secret}/text.txt", "tokenizer": windows}}
    facts: Any = {
        "text": {"notes": [f"cannot read {tmp_path / 'a.txt'}: gone"], "tokens": 5},
        "files": ["results.parquet"],
    }
    command = f"layersurgery sweep '{secret}/first' --data='{secret}/text.txt' -o {tmp_path}"
    results_in(tmp_path / "a" / "run", f"{secret}/first", arguments=arguments, command=command, **facts)
    results_in(
        tmp_path / "b" / "run", f"{secret}/first", arguments=arguments, figure_error="no /home/someone/x", plans=9000
    )
    results_in(tmp_path / "c", windows, arguments={"model": {"name": windows}})
    results_in(tmp_path / "d", state="begun")
    page = ls.report(tmp_path, tmp_path / "page.html").path.read_text()
    for word in ("some one", "someone", str(tmp_path), str(tmp_path.parent)):
        assert word not in page
    for word in ("first", "text.txt", "a.txt: gone"):
        assert word in page


def test_runs_that_noted_no_command(tmp_path: Path) -> None:
    arguments = {
        "model": {"name": "some/model", "revision": "abc"},
        "text": {"data": "pydoc", "tokens": 4096, "context": 512, "split": "train", "shuffle": False},
        "per_token": True,
        "propagation": True,
    }
    results_in(tmp_path / "sweep", arguments=arguments)
    results_in(
        tmp_path / "step", kind="layersurgery analysis", arguments={"analysis": "step", "model": {"name": "some/model"}}
    )
    (tmp_path / "step" / "results.parquet").rename(tmp_path / "step" / "step.parquet")
    facts = json.loads((tmp_path / "step" / "run.json").read_text())
    (tmp_path / "step" / "run.json").write_text(json.dumps(facts | {"files": ["step.parquet"]}))
    text = Text.of(ls.report(tmp_path, tmp_path / "page.html").path.read_text())
    assert text.find(
        "layersurgery sweep some/model --edits drop --data pydoc --tokens 4096 --context 512 --no-shuffle "
        "--propagation --per-token --revision abc"
    )
    assert text.find("its arguments were used to reconstruct one")
    assert text.find("and it cannot be reconstructed")


def test_from_the_command_line(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("report", runs)
    assert found.exit_code == 0
    assert "Not shown" in found.stdout
    assert "Wrote report.html: 2 runs" in " ".join(found.stdout.split())
    (tmp_path / "report.html").write_text("mine")
    found = run("report", runs)
    assert found.exit_code == 1
    assert "report.html already exists" in found.stderr
    assert (tmp_path / "report.html").read_text() == "mine"
    value = result_of("report", runs / "sweep", runs / "stages", "-o", tmp_path, "--overwrite")
    assert value["runs"] == [str(runs / "sweep"), str(runs / "stages")]
    assert value["not_shown"] == {}
    assert value["bytes"] == (tmp_path / "report.html").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"]


def test_what_cannot_be_reported_on(runs: Path, tmp_path: Path) -> None:
    assert run("report").exit_code == 2
    (tmp_path / "empty").mkdir()
    for place, words in (
        ("nowhere", "nowhere does not exist"),
        ("empty", "holds no results"),
        (runs / "deeper", "no finished run to report on"),
    ):
        found = run("report", tmp_path / place, "-o", tmp_path / "page.html")
        assert found.exit_code == 1
        assert words in found.stderr
        assert not (tmp_path / "page.html").exists()
    with pytest.raises(ls.OutputError, match="cannot make"):
        ls.report(runs, runs / "sweep" / "run.json" / "page.html")


def test_damaged_results_are_named_and_the_others_shown(tmp_path: Path) -> None:
    results_in(tmp_path / "fine")
    ways: list[tuple[str, Callable[[Path], object]]] = [
        ("torn", lambda path: path.write_bytes(path.read_bytes()[:-9])),
        ("gone", lambda path: path.unlink()),
        ("strange", lambda path: pd.read_parquet(path).drop(columns="edit").to_parquet(path)),
        ("unreadable", lambda path: pd.read_parquet(path).assign(route="0:x").to_parquet(path)),
    ]
    for name, spoil in ways:
        spoil(results_in(tmp_path / name) / "results.parquet")
    (results_in(tmp_path / "foreign") / "run.json").write_text('{"kind": "other"}')
    made = ls.report(tmp_path, tmp_path / "page.html")
    assert made.runs == [tmp_path / "fine"]
    assert {path.name for path in made.not_shown} == {"torn", "gone", "strange", "unreadable", "foreign"}


def test_what_has_no_room_is_left_out_and_named(tmp_path: Path) -> None:
    results_in(tmp_path / "many", plans=4996, figures=["noise.png", "small.png"])
    Image.effect_noise((2400, 2400), 90).save(tmp_path / "many" / "noise.png")
    Image.new("RGB", (300, 200), "white").save(tmp_path / "many" / "small.png")
    made = ls.report(tmp_path, tmp_path / "page.html")
    page = made.path.read_text()
    assert made.bytes < 3_000_000
    assert any("of 5001 routes" in what for what in made.skipped)
    assert any(what.startswith("tiny, noise: it would have made this page too large") for what in made.skipped)
    assert page.count("<img") == 1
    assert "it would have made this page too large" in page


def test_tables_of_any_analysis_are_shown(tmp_path: Path) -> None:
    place = results_in(tmp_path / "probe", kind="layersurgery analysis")
    (place / "results.parquet").unlink()
    frame = pd.DataFrame(
        {
            "neuron": [3, 5],
            "token": [" ing", None],
            "score": [0.123456789, float("nan")],
            "score_sem": [0.01, 0.01],
            "good": [True, False],
        }
    )
    write_table(place, "single_neurons", frame)
    facts = json.loads((place / "run.json").read_text()) | {"files": ["single_neurons.parquet", "single_neurons.csv"]}
    (place / "run.json").write_text(json.dumps(facts))
    text = ls.report(place, tmp_path / "page.html").path.read_text()
    for cell in (
        'data-v="0.123456789">0.123<small> ±\N{NO-BREAK SPACE}0.010</small>',
        ">␣ing<",
        ">yes<",
        ">NaN<",
        "2 rows",
    ):
        assert cell in text


def test_a_metric_of_the_registry_is_shown_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = results_in(tmp_path / "sweep")
    write_table(place, "results", pd.read_parquet(place / "results.parquet").assign(flips=0.125, flips_sem=0.01))
    metrics = (*METRICS, Column("flips", "share of flips", "%", 100, definition="how often a flip happens"))
    for module in (charts, tables):
        monkeypatch.setattr(module, "METRICS", metrics)
    monkeypatch.setattr(charts, "column", {metric.name: metric for metric in metrics}.__getitem__)
    text = ls.report(place, tmp_path / "page.html").path.read_text()
    assert "Share of flips, <i>%</i>" in text
    assert 'data-v="0.125">12.5<small>' in text
    assert "Share of flips: how often a flip happens." in text
    assert '"flips":{"label":"share of flips","unit":"%","times":100,"log":false}' in text


def test_what_pruning_found_is_said_in_words(tmp_path: Path) -> None:
    for analysis, frame in (("rank", ranks()), ("costs", costs())):
        place = results_in(
            tmp_path / analysis,
            kind="layersurgery analysis",
            arguments={"analysis": analysis, "model": {"name": "tiny"}},
        )
        (place / "results.parquet").unlink()
        write_table(place, analysis, frame)
        facts = json.loads((place / "run.json").read_text()) | {"files": [f"{analysis}.parquet"]}
        (place / "run.json").write_text(json.dumps(facts))
    shown = Text.of(ls.report(tmp_path, tmp_path / "page.html").path.read_text())
    assert shown.find(describe_ranks(ranks()))
    assert shown.find(describe_costs(costs()))


def test_a_sweep_that_stopped_says_what_each_edit_took(tmp_path: Path) -> None:
    directory = tmp_path / "stopped"
    ids = tokens(96, 12)
    frame = ls.sweep(tiny_model("llama"), "swap,drop", ids, until="kl=15%", directory=directory, batch_size=4)
    assert 0 < frame.precise[1:].sum() < len(frame) - 1
    page = ls.report([directory], tmp_path / "report.html").path.read_text("utf-8")
    assert f"{int(frame.precise[1:].sum())} of {len(frame) - 1} edits are known as precisely as asked" in page
    assert "As precise as asked" in page
    assert "kl_nats to 15 %, each with 0.95 confidence" in page
    assert "swap, True" not in page  # one curve for each family


def test_colours_are_those_of_the_figures() -> None:
    style = files("layersurgery.reports").joinpath("page.css").read_text()
    for number, colour in enumerate(COLORS):
        assert f"--c{number}: {colour.lower()};" in style


class Text(HTMLParser):
    """What a browser would show."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = ""
        self.tags: list[str] = []
        self.attributes: dict[str, str | None] = {}

    @classmethod
    def of(cls, page: str) -> Text:
        parser = cls()
        parser.feed(page)
        parser.close()
        return parser

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes = dict(attrs)

    def handle_data(self, data: str) -> None:
        self.shown += data

    def find(self, words: str) -> bool:
        return words in self.shown


@given(st.text())
def test_text_is_never_markup(text: str) -> None:
    parsed = Text.of(template('<p title="{{ text }}">{{ text }}</p>').render(text=text))
    assert parsed.tags == ["p"]
    assert parsed.shown == show_control_characters(text) == parsed.attributes["title"]
    assert not any(map(is_hidden, parsed.shown))
    parsed.shown.encode()


@given(st.recursive(st.none() | st.text() | st.integers(), lambda inner: st.dictionaries(st.text(), inner)))
def test_data_is_never_markup(value: Any) -> None:
    whole = template("<script>{{ value | tojson }}</script>").render(value=value)
    assert whole.count("<") == 2
    assert json.loads(whole.partition(">")[2].removesuffix("</script>")) == value
