"""Write conversations as text, with the chat template of a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from ..errors import SourceError
from .data_files import describe

Messages = Sequence[Mapping[str, Any]]
# Of ShareGPT's format, in which a message has "from" and "value".
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_DATE = date(2024, 7, 26)  # the date that Llama's templates use without a clock


def as_messages(value: Any) -> list[Mapping[str, Any]] | None:
    """Return a conversation's messages; None if the value is not a conversation.

    Args:
        value: a list of objects, or, as some datasets give it, an object of lists.
    """
    if isinstance(value, Mapping):
        fields = {name: list(items) for name, items in value.items() if isinstance(items, list | tuple)}
        if not ({"role", "content"} <= fields.keys() or {"from", "value"} <= fields.keys()):
            return None
        if len({len(items) for items in fields.values()}) > 1:
            return None
        value = [dict(zip(fields, items, strict=True)) for items in zip(*fields.values(), strict=True)]
    if isinstance(value, list | tuple) and value and all(isinstance(message, Mapping) for message in value):
        return list(value)
    return None


class ChatWriter:
    """Write conversations with a tokenizer's chat template.

    Args:
        tokenizer: the tokenizer.

    Attributes:
        template: the template; None before the first conversation.
        notes: messages about differences from what `apply_chat_template` would write.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template: str | None = None
        self.notes: list[str] = []

    def write(self, messages: Messages, place: str) -> str:
        """Return a conversation as text, with the special tokens of the template, and no prompt for an answer.

        Args:
            messages: objects with role and content, or with from and value.
            place: where the conversation stands, for errors.

        Raises:
            SourceError: the tokenizer has no template, a message is malformed, or the template refuses it.
        """
        if self.template is None:
            self._find_template(place)
        assert self.template is not None
        plain = [_plain(message, f"{place}: message {number}") for number, message in enumerate(messages, 1)]
        if any("tool_calls" in message for message in plain) and "tool_calls" not in self.template:
            raise SourceError(
                f"{place}: a message has tool_calls, and the tokenizer's chat template would leave them out"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    plain,
                    chat_template=_without_clock(self.template),
                    tokenize=False,
                    add_generation_prompt=False,
                )
            )
        except Exception as error:  # a template may raise any exception
            raise SourceError(f"{place}: the tokenizer's chat template refuses this conversation: {error}") from error

    def _find_template(self, place: str) -> None:
        way_out = (
            "name the tokenizer of a chat model that has the same vocabulary (tokenizer), or give the tokenizer a "
            "template (its chat_template, or the file chat_template.jinja in the same directory)"
        )
        if not getattr(self.tokenizer, "chat_template", None):
            raise SourceError(f"{place}: this is a conversation, and the tokenizer has no chat template; {way_out}")
        try:
            self.template = str(self.tokenizer.get_chat_template())
        except ValueError as error:
            raise SourceError(f"{place}: this is a conversation, and {error}; {way_out}") from error
        if "strftime_now(" in self.template:
            self.notes.append(
                f"the chat template writes today's date; {_DATE.isoformat()} is written instead, so that the tokens "
                "are the same on every day"
                if "strftime_now(" not in _without_clock(self.template)
                else "the chat template writes today's date, so the tokens are the same on this day only"
            )


def _without_clock(template: str) -> str:
    """Write a fixed date where a template asks for today's."""
    return _TODAY.sub(lambda found: repr(_DATE.strftime(found[2])), template)


def _plain(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a message with role and content, without what is empty: tables give all messages the same keys.

    Raises:
        SourceError: it has no role or no content, or its content is not text.
    """
    plain = {str(name): value for name, value in message.items() if value is not None}
    if "role" not in plain and "from" in plain:
        sender = str(plain.pop("from"))
        if sender not in _ROLES:
            raise SourceError(f"{place} is from {sender!r}; known are {', '.join(_ROLES)}")
        plain["role"] = _ROLES[sender]
        if "value" in plain:
            plain["content"] = plain.pop("value")
    if "role" not in plain or not ("content" in plain or plain.get("tool_calls")):
        raise SourceError(f"{place} has {', '.join(plain) or 'nothing'}, and not role and content (or from and value)")
    content = plain.get("content", "")
    if not isinstance(plain["role"], str):
        raise SourceError(f"{place} has a role that is not text: {describe(plain['role'])}")
    if isinstance(content, list | tuple) and content:
        content = "".join(_text_of(part, place) for part in content)
    if not isinstance(content, str):
        raise SourceError(f"{place} has content that is not text: {describe(content)}")
    if "content" in plain:
        plain["content"] = content
    if not plain.get("tool_calls"):
        plain.pop("tool_calls", None)
    return plain


def _text_of(part: Any, place: str) -> str:
    """Return the text of a part of a message's content."""
    if not isinstance(part, Mapping) or not isinstance(text := part.get("text"), str) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else None
        found = f"a part of type {kind}" if kind not in (None, "text") else describe(part)
        raise SourceError(f"{place} has content that is not text: {found}")
    return text
