"""Name files without the directories of this machine, in all that others may read."""

from __future__ import annotations

import re
from pathlib import PureWindowsPath

# Not after a letter, a colon or "<": "tokens/s", addresses and tags are not paths. A full stop ends a sentence.
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/\\~<-])(?:~?/|[A-Za-z]:[\\/])[^\s'\":;,()<>|]*[^\s'\":;,()<>|.]")


def without_directories(text: str) -> str:
    """Replace each absolute path in a text by the name of its file, so that others read nothing of a machine's folders.

    Example:
        >>> from layersurgery.path_names import without_directories
        >>> without_directories("cannot read /home/me/text.txt: no such file"), without_directories("org/name")
        ('cannot read text.txt: no such file', 'org/name')
    """
    if text.startswith(("/", "~")) or PureWindowsPath(text).is_absolute():
        return PureWindowsPath(text).name or text  # it reads both kinds of paths
    return _ABSOLUTE_PATH.sub(lambda match: PureWindowsPath(match[0]).name, text)
