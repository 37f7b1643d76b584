"""Names, plans and tokens as text that shows all that is in it, and numbers as people read them."""

from __future__ import annotations

import math
import numbers
import unicodedata
from typing import Any

NOTHING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
_MOST_WRITTEN_OUT = 1e9
_MOST_PLACES = 7
_HIDDEN = (
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Zl",
    "Zp",
)  # controls, marks of direction, halves of characters, separators of lines


def show_control_characters(text: str) -> str:
    """Text with everything shown that would not be seen, or would change the order of what is.

    A control character becomes its picture, any other such character its number; so a token of a line break is seen, an override of
    direction turns nothing around, and half a character can be written as UTF-8.

    Example:
        >>> visible("a\\nb\\u202ec")
        'a␊b⟨U+202E⟩c'
    """
    return "".join(_shown(letter) if is_hidden(letter) else letter for letter in text)


def is_hidden(letter: str) -> bool:
    """Whether a character would not be seen, or would move others."""
    return unicodedata.category(letter) in _HIDDEN


def _shown(letter: str) -> str:
    code = ord(letter)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def is_number(value: Any) -> bool:
    """Whether it is one, however pandas or numpy write it; a truth value is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """A cell of a table as None, bool, int, float or str; a float that is no number stays one."""
    if value is None or isinstance(value, bool | str):
        return value
    if is_number(value):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    text = str(value)
    if text in ("<NA>", "NaT"):
        return None
    return {"True": True, "False": False}.get(text, text)


def rounded(value: Any, digits: int = 4) -> str:
    """A cell as a person reads it: so many digits of a number that is not whole, all of one that is, spaces at a text's ends as ␣.

    Example:
        >>> rounded(7.413232929707758), rounded(44580.2), rounded(0.00012345), rounded(float("nan")), rounded(" the")
        ('7.413', '44580', '0.0001234', 'NaN', '␣the')
    """
    value = plain(value)
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{_MINUS}∞"
    if isinstance(value, float):
        whole = len(str(int(abs(value)))) if abs(value) < _MOST_WRITTEN_OUT else 0
        text = f"{value:.{max(digits, whole)}g}"
        return f"{_MINUS}{text[1:]}" if value < 0 else text
    text = str(value)
    inner = text.strip(" ")
    before, _, after = text.partition(inner) if inner else (text, "", "")
    return f"{'␣' * len(before)}{inner}{'␣' * len(after)}"


def format_with_error(value: Any, error: Any) -> tuple[str, str]:
    """A number to the digits that its error leaves it, and the error to two; as `rounded` where there is none.

    Example:
        >>> measured(7.413232929707758, 0.1166), measured(1536, None)
        (('7.41', '0.12'), ('1536', ''))
    """
    value, error = plain(value), plain(error)
    if not (is_number(value) and is_number(error) and math.isfinite(value) and math.isfinite(error)):
        return rounded(value), ""
    places = 1 - math.floor(math.log10(error)) if error > 0 else 99
    if not 0 <= places <= _MOST_PLACES:
        return rounded(value), rounded(error, 2)
    text = f"{value:.{places}f}"
    return f"{_MINUS}{text[1:]}" if value < 0 else text, f"{error:.{places}f}"
