"""Build HTML from values; text is escaped in one place only."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from typing import Any

from .text_format import show_control_characters

_EMPTY = ("link", "meta", "img", "input")


class Html(str):
    """Markup that is inserted without escaping; all other text is escaped."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Make an element.

    Args:
        name: name of the element.
        children: markup, text, or iterables of these; None adds nothing.
        attributes: underscores become hyphens, and one at the end is dropped; True makes an attribute without a value,
            None and False omit it.

    Example:
        >>> from layersurgery.reports.html import tag
        >>> tag("a", "1 < 2", class_="x", hidden=True)
        '<a class="x" hidden>1 &lt; 2</a>'
    """
    attribute_text = "".join(_attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    return Html(
        f"<{name}{attribute_text}>" if name in _EMPTY else f"<{name}{attribute_text}>{joined(children)}</{name}>"
    )


def joined(children: Iterable[object]) -> Html:
    """Join children of an element in order."""
    return Html("".join(map(_child, children)))


def _child(child: object) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return escape(show_control_characters(child))
    return joined(child) if isinstance(child, Iterable) else escape(str(child))


def _attribute(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(show_control_characters(str(value)))}"'


def data(key: str, value: Any) -> Html:
    """Embed data for the page's script; no text in it can end the script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")
    return tag("script", Html(text), type="application/json", id=key)


def document(title: str, body: Html) -> str:
    """Return a page that may load nothing and may run only its own script."""
    style, script = (files(__package__).joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(style)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body, tag('script', Html(script))), lang='en')}\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
