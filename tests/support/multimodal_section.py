"""Say for every type of model that also reads images or sound whether it is measured on text alone, or why not.

The section is a part of ARCHITECTURES.md, which `python -m tests.support.generate_architectures` writes.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import layersurgery as ls
from tests.support.multimodal import MULTIMODAL, NOT_BUILT, measurable_model, multimodal_checkpoint

HEADING = "## Models that also read images or sound"
INTRO = f"""{HEADING}

A tiny checkpoint of each of {{count}} types that AutoModelForMultimodalLM of transformers knows is loaded with
`ls.load`, and swaps and drops of the blocks of its text decoder are measured on text alone.
`tests/sweeps/test_multimodal.py` compares every number with `operate` and metrics in float64, and
`tests/checkpoints/test_multimodal.py` compares edits on disk with those in memory.
"""


def outcome(name: str) -> str:
    """Return the class that is measured, in backquotes, or why the type is refused."""
    with TemporaryDirectory() as directory:
        path = multimodal_checkpoint(Path(directory) / "model", name)
        try:
            model = measurable_model(path)
        except ls.LayerSurgeryError as error:
            return shorten(str(error), str(path))
    return f"`{type(model).__name__}`"


def shorten(message: str, path: str) -> str:
    """Reduce an error message to its reason."""
    message = re.sub(r"^(the config of )?[\w-]+:? ", "", message.replace(path, "it"))
    return re.split(r"; |, so |, and an edit", message)[0].replace("`", "'")


def line(name: str) -> str:
    """Return the line of one type."""
    return f"- {name}: {outcome(name)}"


def section() -> str:
    """Return the section."""
    lines = [line(name) for name in MULTIMODAL if name not in NOT_BUILT]
    reasons = [f"- {name}: not tried, because {reason}" for name, reason in NOT_BUILT.items()]
    measured = [text for text in lines if "`" in text]
    refused = [text for text in lines if "`" not in text]
    return "\n".join(
        [
            INTRO.format(count=len(MULTIMODAL)),
            f"{len(measured)} types are measured, each as the class that is named:",
            "",
            *measured,
            "",
            f"{len(refused)} types are refused:",
            "",
            *refused,
            *reasons,
            "",
        ]
    )
