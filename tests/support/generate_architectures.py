"""`python -m tests.support.generate_architectures` tries every kind of edit on every architecture of the zoo and writes ARCHITECTURES.md.

What the table says is what was seen: nothing in it is written by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import layersurgery as ls
from layersurgery.models.anatomy import Anatomy
from tests.support.unsupported import SKIPS, WHOLE
from tests.support.zoo import ZOO, tiny_model

PAGE = Path(__file__).parents[2] / "ARCHITECTURES.md"
HEAD = """# Architectures

Made by `python -m tests.support.generate_architectures`, which builds a tiny model with random weights of each and tries the edits
{edits}. `tests/project/test_architectures.py` keeps it true; `tests/checkpoints/test_zoo.py` and `tests/surgery/test_zoo.py` show that what is not
refused is right. A name with a dash is a variant of the type before it.

*Operate*: in memory, for a while. *Keep*: `operate_`, `save` and `edit_checkpoint`, whose result must reload anywhere. Blocks
that a refused edit does not touch can be edited. Other types of transformers that are built alike need no support of their own:
`layersurgery.anatomy(model)` says what it finds in any model.

| type | mixes tokens | MLP | order | refused |
|---|---|---|---|---|
"""


def row(name: str) -> str:
    """The line of one architecture."""
    model = tiny_model(name)
    anatomy = ls.anatomy(model)
    layouts = {parts.parallel for _, parts in anatomy.kinds} - {None}
    order = " / ".join(sorted("parallel" if layout else "in turn" for layout in layouts))
    return f"| {name} | {_modules(anatomy, 'attention')} | {_modules(anatomy, 'mlp')} | {order} | {_refusals(name) or 'nothing'} |"


def _modules(anatomy: Anatomy, part: str) -> str:
    found = sorted({", ".join(getattr(parts, part)) for _, parts in anatomy.kinds} - {""})
    return " / ".join(f"`{modules}`" for modules in found) or "none"


def _refusals(name: str) -> str:
    """What was refused, by reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for plan in [*WHOLE, *SKIPS]:
        model = tiny_model(name)
        for way, edit in (("operate", _operated), ("keep", ls.operate_)):
            try:
                edit(model, plan)
            except ls.UnsupportedEditError as error:
                reasons.setdefault((way, _reason(str(error))), []).append(plan)
                break
    return "; ".join(
        f"{'operate and keep' if way == 'operate' else 'keep'} *{', '.join(plans)}*: {reason}"
        for (way, reason), plans in reasons.items()
    )


def _operated(model: Any, plan: str) -> None:
    with ls.operate(model, plan):
        pass


def _reason(text: str) -> str:
    """The heart of a refusal."""
    if found := re.search(r"\(block \d+\): (\S+) is .* in the source and would be ", text):
        return f"`{found[1]}` depends on the position"
    text = re.sub(r"^.*(can be skipped|config\.json): |^(rwkv: |block \d+ \(\w+\) )", "", text)
    return re.split(r"[;.] |, so |, and works", text)[0].replace("|", "\\|")


def page() -> str:
    """The whole page."""
    edits = ", ".join(f"`{plan}`" for plan in [*WHOLE, *SKIPS])
    return HEAD.format(edits=edits) + "\n".join(map(row, ZOO)) + "\n"


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()
    PAGE.write_text(page(), "utf-8")
    print(f"wrote {PAGE.name}: {len(ZOO)} architectures", file=sys.stderr)
