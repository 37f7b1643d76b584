"""Check the documentation site: what its pages contain, and that they are readable on a telephone and offline."""

from __future__ import annotations

import functools
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import layersurgery as ls
from tests.support.browser import needs_browser, start_browser
from tests.support.check_site import find_faults

ROOT = Path(__file__).parents[2]

OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
LOADED = "return performance.getEntriesByType('resource').map((entry) => entry.name)"


def test_the_site_has_every_public_name_once() -> None:
    groups = yaml.safe_load((ROOT / "docs" / "_site" / "api.yml").read_text("utf-8"))
    shown = [name for group in groups.values() for name in group["names"]]
    public = {name for name in ls.__all__ if name not in ("analyses", "tasks", "__version__")}
    public |= {f"analyses.{name}" for name in ls.analyses.__all__ if name not in public}
    public |= {f"tasks.{name}" for name in ls.tasks.__all__}
    assert sorted(shown) == sorted(public)


def test_faults_of_a_page_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text('<p id="here">')
    (tmp_path / "index.html").write_text(
        '<article><a href="other.html#here">1</a><a href="other.html#there">2</a><a href="no.html">3</a>'
        '<a href="https://example.com">4</a><img src="https://example.com/a.png"><code>**</code>\n- a\n</article>'
    )
    assert list(find_faults(tmp_path)) == [
        "index.html: loads https://example.com/a.png",
        "index.html: - a is Markdown that was not understood",
        "index.html: no.html is not there",
        "index.html: other.html#there has no such anchor",
    ]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.slow
@needs_browser
def test_pages_fit_a_telephone_and_load_nothing_from_elsewhere(site: Path, address: str, tmp_path: Path) -> None:
    assert not list(find_faults(site))
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    assert len(pages) > 30
    with start_browser(tmp_path) as browser:
        size = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for page in pages:
            browser.driver.get(address + page)
            assert browser.js(OVERFLOW) <= 0, page
            loaded = browser.js(LOADED)
            assert loaded, page
            assert not [name for name in loaded if not name.startswith((address, "data:", "blob:"))], page
        requests = [url for url in browser.requests() if url.startswith("http") and not url.startswith(address)]
        assert not requests
        # Search: a message that somebody pastes leads to the page that explains it.
        browser.driver.get(address + "index.html?q=is out of range counted from the end")
        browser.until(lambda: "Error messages" in browser.js("return document.body.textContent"))
        browser.until(lambda: bool(browser.all(".md-search-result__link[href*='errors.html']")))
        assert not browser.errors()
