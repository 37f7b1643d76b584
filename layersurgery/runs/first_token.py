"""Decide whether sequences begin with the tokenizer's beginning-of-text token."""

from __future__ import annotations

from typing import Any

from ..errors import PlanError

_BOS = {"auto": None, "yes": True, "no": False}


def bos_token_id(tokenizer: Any) -> int:
    """Return the id of the tokenizer's beginning-of-text token.

    Raises:
        PlanError: the tokenizer has none.
    """
    if tokenizer.bos_token_id is None:
        raise PlanError("`bos`: this tokenizer has no beginning-of-text token; leave it out")
    return int(tokenizer.bos_token_id)


def parse_bos(bos: bool | str | None) -> bool | None:
    """Return whether sequences begin with the beginning-of-text token; None for what the tokenizer does.

    Raises:
        PlanError: it is not "auto", "yes", "no" or a bool.
    """
    if bos is None or isinstance(bos, bool):
        return bos
    if bos not in _BOS:
        raise PlanError(f"`bos` is auto, yes or no, not {bos!r}")
    return _BOS[bos]


def uses_bos(bos: bool | str | None, tokenizer: Any) -> bool:
    """Return whether sequences begin with the beginning-of-text token, as asked for or as the tokenizer does.

    Without the token that their training put first, models such as Gemma predict much worse.

    Raises:
        PlanError: it is asked for, and the tokenizer has none.
    """
    choice = parse_bos(bos)
    if choice is None:
        return adds_bos(tokenizer)
    if choice:
        bos_token_id(tokenizer)
    return choice


def adds_bos(tokenizer: Any) -> bool:
    """Return whether a tokenizer puts its beginning-of-text token before plain text by itself."""
    first = getattr(tokenizer, "bos_token_id", None)
    if first is None:
        return False
    with_special, text = (
        tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"][:1] for special in (True, False)
    )
    return bool(list(with_special) == [first] != list(text))
