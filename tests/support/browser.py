"""Start a real browser for the tests of pages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
# Where every push is tested they have to be there: these tests fail without, and are not skipped.
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and not os.environ.get("CI"),
    reason="no chromium and chromedriver on this machine; .ci/run installs them",
)
PATIENCE = 60  # seconds, for a machine that does much else

CONTRAST = """
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => {
  const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = numbers(colour).map((value) => linear(value / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (numbers(colour)[3] !== 0) return colour;
  }
};
let least = 99;
for (const node of document.body.querySelectorAll("*")) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  if (!own || !node.checkVisibility() || ["SCRIPT", "NOSCRIPT"].includes(node.tagName)) continue;
  const style = getComputedStyle(node);
  let back = node.matches(".choice label") ? getComputedStyle(node).backgroundColor : behind(node);
  if (numbers(back)[3] === 0) back = behind(node.parentElement);
  const both = [light(node instanceof SVGElement ? style.fill : style.color), light(back)].sort((a, b) => a - b);
  least = Math.min(least, (both[1] + 0.05) / (both[0] + 0.05));
}
return least;
"""
"""Script that returns the least contrast of a text with what is behind it."""


class Browser:
    """Drive a page in a real browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, *, width: int = 1280, media: str = "", scheme: str = "light") -> Browser:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.media(media, scheme)
        self.driver.get("about:blank")
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(page.resolve().as_uri())
        return self

    def media(self, media: str, scheme: str = "light") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def js(self, script: str, *given: Any) -> Any:
        return self.driver.execute_script(script, *given)

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def until(self, happens: Callable[[], bool]) -> None:
        WebDriverWait(self.driver, PATIENCE, 0.05).until(lambda _driver: happens())

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def column(self, place: int) -> list[float]:
        """Exact values of a column of the routes, in the rows to be seen."""
        rows = "[...document.querySelectorAll('#table-routes tbody tr:not([hidden])')]"
        values = self.js(f"return {rows}.map((row) => row.cells[arguments[0]].dataset.v)", place)
        return [float(value) for value in values]

    def exact(self, chart: str = "edits") -> float:
        """Return the value in the box of a chart that is open."""
        return float(self.one(f"#chart-{chart} .tip .exact").text.removeprefix("exactly "))

    def choose(self, chart: str, label: str) -> None:
        """Choose a view or a metric of a chart."""
        labels = f"[...document.querySelectorAll('#chart-{chart} label')]"
        self.js(f"{labels}.find((one) => one.textContent === arguments[0]).click()", label)

    def errors(self) -> list[Any]:
        return list(self.driver.get_log("browser"))

    def requests(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]


@contextmanager
def start_browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or "/usr/bin/chromium"
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={profile}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER or "/usr/bin/chromedriver"))
    try:
        executor: Any = driver.command_executor
        executor.client_config.timeout = 2 * PATIENCE
        driver.set_page_load_timeout(PATIENCE)
        driver.set_script_timeout(PATIENCE)
        yield Browser(driver)
    finally:
        driver.quit()
