"""Format text so that every character is visible, and numbers so that they are easy to read."""

from __future__ import annotations

import math
import numbers
import unicodedata
from typing import Any

NOTHING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
_MAX_FULL_INTEGER = 1e9
_MAX_DECIMALS = 7
_HIDDEN = (
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Zl",
    "Zp",
)  # controls, direction marks, surrogates, line separators


def show_control_characters(text: str) -> str:
    """Replace characters that are invisible or change the reading direction.

    A control character becomes its Unicode symbol; any other such character becomes its code point. Line breaks in
    tokens become visible, direction overrides have no effect, and lone surrogates can be encoded as UTF-8.

    Example:
        >>> from layersurgery.reports.text_format import show_control_characters
        >>> show_control_characters("a\\nb\\u202ec")
        'a␊b⟨U+202E⟩c'
    """
    return "".join(_shown(letter) if is_hidden(letter) else letter for letter in text)


def is_hidden(letter: str) -> bool:
    """Return whether a character is invisible or changes the reading direction."""
    return unicodedata.category(letter) in _HIDDEN


def _shown(letter: str) -> str:
    code = ord(letter)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def is_number(value: Any) -> bool:
    """Return whether a value is a number of Python, numpy or pandas; booleans are not numbers."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Convert a table cell to None, bool, int, float or str; NaN and infinity stay floats."""
    if value is None or isinstance(value, bool | str):
        return value
    if is_number(value):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    text = str(value)
    if text in ("<NA>", "NaT"):
        return None
    return {"True": True, "False": False}.get(text, text)


def rounded(value: Any, digits: int = 4) -> str:
    """Format a table cell for reading.

    Floats are rounded to `digits` significant digits, integers are printed in full, and spaces at the ends of a text
    become ␣.

    Example:
        >>> from layersurgery.reports.text_format import rounded
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
        integer_digits = len(str(int(abs(value)))) if abs(value) < _MAX_FULL_INTEGER else 0
        text = f"{value:.{max(digits, integer_digits)}g}"
        return f"{_MINUS}{text[1:]}" if value < 0 else text
    text = str(value)
    inner = text.strip(" ")
    before, _, after = text.partition(inner) if inner else (text, "", "")
    return f"{'␣' * len(before)}{inner}{'␣' * len(after)}"


def format_with_error(value: Any, error: Any) -> tuple[str, str]:
    """Round a number to the precision of its error, and the error to two digits; without an error, use `rounded`.

    Example:
        >>> from layersurgery.reports.text_format import format_with_error
        >>> format_with_error(7.413232929707758, 0.1166), format_with_error(1536, None)
        (('7.41', '0.12'), ('1536', ''))
    """
    value, error = plain(value), plain(error)
    if not (is_number(value) and is_number(error) and math.isfinite(value) and math.isfinite(error)):
        return rounded(value), ""
    decimals = 1 - math.floor(math.log10(error)) if error > 0 else 99
    if not 0 <= decimals <= _MAX_DECIMALS:
        return rounded(value), rounded(error, 2)
    text = f"{value:.{decimals}f}"
    return f"{_MINUS}{text[1:]}" if value < 0 else text, f"{error:.{decimals}f}"
