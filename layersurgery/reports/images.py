"""Embed the figures of runs in a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..plans.families import FAMILIES
from ..registry import ANALYSES
from .collect import FinishedRun, labels

_KINDS = {".svg": "image/svg+xml", ".png": "image/png"}
_MAGIC = {".svg": (b"<?xml", b"<svg"), ".png": (b"\x89PNG\r\n\x1a\n",)}
_ABOUT = {
    "robustness": "KL from the unedited model, top-1 agreement and change in entropy over depth, a row of panels for "
    "each kind of edit",
    **{
        family.name: f"{family.title}: KL from the unedited model, top-1 agreement and change in loss, a cell for each "
        "edit" + "; rings mark the lowest KL" * family.of_blocks
        for family in FAMILIES.values()
        if family.axes
    },
    "tasks": "metrics of tasks over depth, a row of panels for each kind of edit; the band of a curve is the 95 % "
    "interval of its change on the same documents, the dashed line the unedited model",
    **{
        f"tasks-{family.name}": f"{family.title}: change of the metrics of tasks, a cell for each edit"
        for family in FAMILIES.values()
        if family.axes
    },
    "tails": "mean, quantiles and maximum of KL over positions, and shares of predictions, over depth, a row of panels "
    "for each kind of edit",
    "plans": "KL from the unedited model and top-1 agreement, a bar for each plan",
    "copies": "entropy of the prediction when each block of a range is passed several times, over its last block",
    "cka": "CKA of the residual streams, a cell for each pair of depths",
    "cosine": "mean cosine of each token's residual streams, a cell for each pair of depths",
    "heads": "KL, change in entropy and change in loss with each attention head off, a cell for each head",
    "ablate-neurons": "KL, change in entropy and change in loss without neurons of one kind, and without random ones, "
    "over the block whose neurons are off",
    "stages": "the signals of the stages of inference over depth, the stages shaded",
    "rank": "KL when each block or branch is removed, block influence and angular distance over depth",
    "propagation": "mean change of what later layers add after each edit, a map for attention and one for the MLP",
    "costs": "KL, perplexity and top-1 agreement over the number of removed layers or branches, a line for each "
    "criterion",
    "search": "KL or change in loss of every candidate over the number of its blocks, with lines of the best routes",
    "subjoiners": "how much more each head attends to the beginning of its own word than to other text there, a cell "
    "for each head",
    "probe": "held-out accuracy of single neurons and of the best neurons together, and what two neurons add to logits",
    "wic": "how well a word's sense is predicted from the stream after each block, with shuffled labels and the more "
    "frequent label for comparison",
    "examples": "what the best head attends to, a window of text a row",
    "effects": "what the neurons with the largest effects add to the logits, a panel for each neuron",
}
"""What figures show, except those that draw an analysis's columns over depth."""
_FIRST = ("stages", "robustness", "tasks")
_AROUND = 2000  # bytes: markup, caption, alternative text


@dataclass(frozen=True, slots=True)
class Picture:
    """Figure of a run.

    Attributes:
        label: label of the run that drew it.
        name: file name without its extension.
        about: what it shows.
        path: the smallest file of the figure, or the missing one.
        source: data URI; empty if the figure is left out.
        reason: why the figure is left out; empty if it is shown.
    """

    label: str
    name: str
    about: str
    path: Path
    source: str = ""
    reason: str = ""

    @property
    def alt(self) -> str:
        """Return the alternative text."""
        return f"{self.label}: {self.about}. The numbers are in the tables below."


def pictures(runs: Sequence[FinishedRun], max_bytes: int) -> list[Picture]:
    """Read the figures of all runs, the stages first.

    If they need too much space, the largest of the other figures are left out first.

    Args:
        runs: the runs that drew them.
        max_bytes: bytes that they may take in the page.
    """
    entries = [(*entry, _smaller(*entry)) for entry in _named(runs)]
    read = {index: _read(paths) for index, (*_, paths) in enumerate(entries)}
    costs = sorted(
        (entries[index][2] not in _FIRST, 4 * len(data) // 3 + _AROUND, index)
        for index, (data, _) in read.items()
        if data
    )
    fits = set()
    for _, cost, index in costs:
        if cost <= max_bytes:
            max_bytes -= cost
            fits.add(index)
    shown = []
    for index, (run, label, name, paths) in enumerate(entries):
        about = _about(name.rstrip("-0123456789"))
        path = paths[0] if paths else run.path / f"{name}.svg"
        data, reason = read[index]
        if data and index not in fits:
            reason = f"it would have made this page too large; it is {path}"
        uri = f"data:{_KINDS[path.suffix]};base64,{base64.b64encode(data).decode()}" if index in fits else ""
        shown.append(Picture(label, name, about, path, uri, "" if uri else reason))
    return shown


def _about(name: str) -> str:
    analysis = next((analysis for analysis in ANALYSES.values() if name in analysis.figures), None)
    if name in _ABOUT or analysis is None:
        return _ABOUT.get(name, f"figure “{name}”")
    curves = [column.label for column in analysis.columns if column.curve] if name == analysis.name else []
    return f"{analysis.title}, over depth: {'; '.join(curves)}" if curves else analysis.title


def _named(runs: Sequence[FinishedRun]) -> list[tuple[FinishedRun, str, str]]:
    entries = []
    for run, label in zip(runs, labels(runs), strict=True):
        files = [str(file) for file in run.fact("figures", default=[])]
        names = [file.rpartition(".")[0] for file in files if Path(file).suffix in _KINDS and Path(file).name == file]
        entries += [(run, label, name) for name in dict.fromkeys(names)]
    return sorted(entries, key=lambda entry: _FIRST.index(entry[2]) if entry[2] in _FIRST else len(_FIRST))


def _smaller(run: FinishedRun, _label: str, name: str) -> list[Path]:
    """Return the files of a figure, the smallest first."""
    paths = [path for path in (run.path / f"{name}{kind}" for kind in _KINDS) if path.is_file()]
    return sorted(paths, key=lambda path: path.stat().st_size)


def _read(paths: Sequence[Path]) -> tuple[bytes, str]:
    """Read the smallest file whose content matches its extension; else return the reason."""
    reason = "its file no longer exists"
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            reason = f"{path} cannot be read: {error.strerror or error}"
            continue
        if data.lstrip().startswith(_MAGIC[path.suffix]):
            return data, ""
        reason = f"{path} is not a valid {path.suffix[1:].upper()} file"
    return b"", reason
