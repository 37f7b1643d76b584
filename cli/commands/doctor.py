"""Run `layersurgery doctor`."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby

import typer
from rich.markup import escape
from rich.table import Table

from layersurgery.quick_imports import quick_imports

from ..terminal.console import Console


def run_doctor(console: Console) -> None:
    """Print the findings by section.

    Raises:
        typer.Exit: code 1 if something does not work.
    """
    with quick_imports():
        from layersurgery.runs.doctor import doctor

    findings = doctor()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section, members in groupby(findings, key=lambda finding: finding.section):
        table.add_row(f"[bold]{section}")
        for finding in members:
            color = "" if finding.works else "[bold red]"
            remedy = f"\n{escape(finding.remedy)}" if finding.remedy else ""
            table.add_row(f"  {finding.name}", f"{color}{escape(finding.value)}{remedy}")
    console.result([asdict(finding) for finding in findings], table)
    if not all(finding.works for finding in findings):
        raise typer.Exit(1)
