"""Format numbers of bytes, large counts, durations, and long lists of names, for people."""

from __future__ import annotations

from collections.abc import Sequence


def format_bytes(count: int) -> str:
    """Format a number of bytes in decimal units: 1 kB is 1000 bytes.

    >>> from layersurgery.units import format_bytes
    >>> format_bytes(269_000_000)
    '269 MB'
    """
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def format_count(count: int) -> str:
    """Format a large count, such as a number of parameters, with a suffix k, M, B or T."""
    value = float(count)
    for unit in ("", "k", "M", "B"):
        if value < 1000:
            return f"{value:.0f}" if not unit else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} T"


def format_list(names: Sequence[str], limit: int = 1, separator: str = ", ") -> str:
    """Join the first names of a list, and say how many more there are.

    >>> from layersurgery.units import format_list
    >>> format_list(["a", "b", "c"], limit=2), format_list(["a", "b"], limit=2)
    ('a, b and 1 more', 'a, b')
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more


def format_time(seconds: float) -> str:
    """Format a duration in the largest unit of which there are at least two.

    >>> from layersurgery.units import format_time
    >>> format_time(1.234), format_time(150), format_time(9000)
    ('1.2 s', '2.5 min', '2.5 h')
    """
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s"
