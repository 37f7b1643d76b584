"""Make the documentation site of the pages in docs/ and of the files that they link to.

The pages are written for a forge: they link to pictures, tables, programs and pages outside docs/ with relative links.
This hook of MkDocs adds those files to the site and turns the links to them, so that the site needs no address of the
repository. README.md becomes the first page, docs/README.md the page "All pages", and docs/reference.md the pages of
the Python API, which mkdocstrings makes.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"""(?P<before>\]\(|(?:src|href)=")(?P<target>[^)#"\s:]+)(?P<anchor>#[^)"\s]*)?(?P<after>\)|")""")
_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.DOTALL | re.MULTILINE)
_NAMES = {
    "README.md": "index.md",
    "docs/README.md": "all-pages.md",
    "docs/reference.md": "api/index.md",
    "ARCHITECTURES.md": "architectures-table.md",  # docs/architectures.md is another page
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_CODE = re.compile(r"`[^`\n]+`")
_FILE_NAME = re.compile(r"\[(?:docs/)?[\w-]+\.md\]\((?P<target>[^)#\s:]+)(?=[)#])")
_COMMAND = re.compile(r"^(?P<heading>### `layersurgery (?P<label>[a-z -]+[a-z])\b.*`)$", re.MULTILINE)
_ERROR = re.compile(r"^(?P<heading>### \w+: (?P<label>.+))$", re.MULTILINE)
_LABELED = {"commands.md": _COMMAND, "errors.md": _ERROR}
_PROGRAMS = {".py": "py", ".slurm": "bash"}
_PAGES = {*_PROGRAMS, ".ipynb"}
_made: dict[str, str] = {}
"""Path in the repository of each page of the site that is not in docs/, by its path in the site."""


def on_config(config: Any) -> Any:
    """Show a list of versions where mike builds one of them; elsewhere there is none to be loaded."""
    if "MIKE_DOCS_VERSION" in os.environ:
        config.extra["version"] = {"provider": "mike"}
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add to the site what its pages link to, and the pages of the Python API."""
    _made.clear()
    for name in ("README.md", "reference.md"):
        if (page := files.get_file_from_path(name)) is not None:
            files.remove(page)
    waiting = ["README.md", "docs/README.md", "CHANGELOG.md"]
    waiting += [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        place = site_path(source)
        if not source.startswith("docs/") or (source in _NAMES and source != "docs/reference.md"):
            files.append(_file(source, place, config))
        for target in _targets(source):
            if target not in seen and (not target.startswith("docs/") or target.endswith(".md")):
                seen.add(target)
                waiting.append(target)
    for name, text in api_pages().items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn a page's links to files outside docs/ into links to their copies in the site, and shorten its contents."""
    place = page.file.src_uri
    if place.startswith("api/"):
        return markdown
    source = _made.get(place, f"docs/{place}")

    def turn(match: re.Match[str]) -> str:
        target = _resolve(source, match["target"])
        if target is None:
            return match[0]
        link = posixpath.relpath(site_path(target), posixpath.dirname(place) or ".")
        return f"{match['before']}{link}{match['anchor'] or ''}{match['after']}"

    def title(match: re.Match[str]) -> str:
        # On a forge a link shows which file it leads to; on the site there are pages with titles.
        target = _resolve(source, match["target"])
        return match[0] if target is None else f"[{_title(target)}]({match['target']}"

    def turn_all(text: str) -> str:
        # A forge needs escaped bars in the code of a table, and Python's Markdown shows the backslash.
        text = _CODE.sub(lambda match: match[0].replace(chr(92) + "|", "|"), text)
        return _LINK.sub(turn, _FILE_NAME.sub(title, text))

    text = "".join(part if code else turn_all(part) for code, part in _split(markdown))
    if (labels := _LABELED.get(place)) is not None:
        text = labels.sub(r'\g<heading> { data-toc-label="\g<label>" }', text)
    return text


def site_path(source: str) -> str:
    """Return where the site has a file or directory of the repository.

    >>> site_path("docs/maps.md"), site_path("README.md"), site_path("LICENSE")
    ('maps.md', 'index.md', 'LICENSE')
    """
    if source in _NAMES:
        return _NAMES[source]
    path = ROOT / source
    if path.is_dir():
        return f"{source}/index.md"
    return f"{source}.md" if path.suffix in _PAGES else source.removeprefix("docs/")


def api_pages() -> dict[str, str]:
    """Return the pages of the Python API in Markdown with the directives of mkdocstrings."""
    groups = yaml.safe_load((Path(__file__).parent / "api.yml").read_text("utf-8"))
    lines = [
        "# Python API\n",
        "`import layersurgery as ls` does not import torch; names that need torch import it when they are first used.",
        "Only the names on these pages are public; everything else in the package may change without notice.\n",
        "| page | names |\n|---|---|",
    ]
    pages = {}
    for key, group in groups.items():
        links = ", ".join(f"[`ls.{name}`][layersurgery.{name}]" for name in group["names"])
        lines.append(f"| [{group['title']}]({key}.md) | {links} |")
        pages[key] = f"# {group['title']}\n\n{group['about']}\n"
        for name in group["names"]:
            options = {"heading": f"ls.{name}", "toc_label": name.split(".")[-1], **group.get("options", {})}
            text = yaml.safe_dump({"options": options}, sort_keys=False)
            pages[key] += f"\n::: layersurgery.{name}\n{textwrap.indent(text, '    ')}"
    return {"index": "\n".join(lines) + "\n", **pages}


def _title(source: str) -> str:
    """Return the first words of a page's heading."""
    heading = re.search(r"^# (.+)$", _markdown(source), re.MULTILINE)
    return heading[1].partition(":")[0].strip() if heading else source


def _file(source: str, place: str, config: Any) -> File:
    if not place.endswith(".md"):
        return File.generated(config, place, abs_src_path=str(ROOT / source))
    _made[place] = source
    return File.generated(config, place, content=_markdown(source))


def _markdown(source: str) -> str:
    """Return the text of a page for a file or directory; None if there is no page for it."""
    path = ROOT / source
    if path.is_dir():
        return _listing(path)
    if path.suffix == ".md":
        return path.read_text("utf-8")
    if path.suffix == ".ipynb":
        return "\n\n".join(_cells(json.loads(path.read_text("utf-8"))))
    if language := _PROGRAMS.get(path.suffix):
        return f"# {path.name}\n\n{_block(language, path.read_text('utf-8'))}\n"
    return ""


def _listing(directory: Path) -> str:
    """Return a page that links to each file of a directory, with the first line of what a program says of itself."""
    lines = [f"# {directory.relative_to(ROOT).as_posix()}\n"]
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        about = re.match(r'"""(.+?)[."]*$', path.read_text("utf-8"), re.M) if path.suffix == ".py" else None
        if not name.startswith(("__", ".")):
            lines.append(f"- [{name}]({name})" + (f": {about[1]}" if about else ""))
    return "\n".join(lines) + "\n"


def _cells(notebook: Any) -> Iterator[str]:
    """Yield the cells of a notebook and their outputs as Markdown."""
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        yield _block("py", text) if cell["cell_type"] == "code" else text
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                yield f"![output](data:image/png;base64,{''.join(data['image/png'].split())})"
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                yield _block("text", text)


def _block(language: str, text: str) -> str:
    return f"````{language}\n{text.strip()}\n````"


def _targets(source: str) -> Iterator[str]:
    """Yield the files and directories of the repository that a page links to."""
    for code, part in _split(_markdown(source)):
        for match in () if code else _LINK.finditer(part):
            if target := _resolve(source, match["target"]):
                yield target


def _resolve(source: str, target: str) -> str | None:
    """Return the path in the repository of a link's target; None for one that is not there."""
    base = source if (ROOT / source).is_dir() else posixpath.dirname(source)
    found = posixpath.normpath(posixpath.join(base, target))
    return found if found not in (".", "..") and not found.startswith("../") and (ROOT / found).exists() else None


def _split(markdown: str) -> Iterator[tuple[bool, str]]:
    """Split a page into code blocks and the text between them, and say of each part whether it is code."""
    end = 0
    for match in _FENCE.finditer(markdown):
        yield False, markdown[end : match.start()]
        yield True, match[0]
        end = match.end()
    yield False, markdown[end:]
