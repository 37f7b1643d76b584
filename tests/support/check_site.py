"""Check the pages of a built site: `python -m tests.support.check_site site`.

Each relative link and picture must be a file of the site, each anchor must exist on its page, nothing that the browser
loads by itself may come from elsewhere, and no marks of Markdown are left in the text. A forge reads some lists and
tables that Python's Markdown does not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LEFT = re.compile(r"\*\*|\]\(|``|^ *(?:- |\|).*", re.MULTILINE)
_LOADED = {"img", "script", "iframe", "source", "video", "audio", "embed"}
_CODE = {"pre", "code", "script", "style"}
_LOADED_LINKS = {"stylesheet", "icon", "preload", "preconnect", "dns-prefetch", "modulepreload", "manifest"}


class _Page(HTMLParser):
    """Hold the links, the anchors and the foreign files of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors = {"", "__skip"}
        self.foreign: list[str] = []
        self.text = ""
        self._code = 0
        self._article = False
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._code += tag in _CODE
        self._article |= tag == "article"
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        for name in ("href", "src"):
            if name not in values:
                continue
            loaded = tag in _LOADED or (tag == "link" and not _LOADED_LINKS.isdisjoint(values.get("rel", "").split()))
            if urlsplit(values[name]).netloc:
                self.foreign += [values[name]] if loaded else []
            elif not urlsplit(values[name]).scheme:
                self.links.append(values[name])

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in _CODE
        self._article &= tag != "article"

    def handle_data(self, data: str) -> None:
        if self._article:
            self.text += "..." if self._code else data


@cache
def _read(path: Path) -> _Page:
    return _Page(path)


def find_faults(site: Path) -> Iterator[str]:
    """Yield a line for each link that leads nowhere, each file from elsewhere and each mark that is left."""
    # The page of a missing address has links from the server's root.
    for path in sorted(set(site.rglob("*.html")) - {site / "404.html"}):
        page = _read(path)
        name = path.relative_to(site)
        yield from (f"{name}: loads {address}" for address in page.foreign)
        yield from (f"{name}: {found} is Markdown that was not understood" for found in _LEFT.findall(page.text))
        for link in sorted(set(page.links)):
            parts = urlsplit(link)
            target = path.parent / unquote(parts.path) if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{name}: {link} is not there"
            elif target.suffix == ".html" and unquote(parts.fragment) not in _read(target.resolve()).anchors:
                yield f"{name}: {link} has no such anchor"


if __name__ == "__main__":
    found = list(find_faults(Path(sys.argv[1]).resolve()))
    print("\n".join(found) or "every link leads somewhere, and every page is understood")
    sys.exit(bool(found))
