"""Write the card of a repository of results: what was measured, what each table holds, and how to read it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..registry import column
from ..reports.collect import FinishedRun
from ..reports.provenance import provenance
from ..reports.report import NAME
from ..runs.tables import RESULTS, SEQUENCES
from ..version import __version__

_TAGS = ["layersurgery", "model surgery", "interpretability"]
_NAMES_ALONE = (Path(SEQUENCES).stem, "tokens", "requests")


def dataset_card(repo: str, directory: Path, runs: Sequence[FinishedRun], files: Sequence[str]) -> str:
    """Return the text of the README.md of a repository of results, with the metadata that the Hub's viewer reads.

    Args:
        repo: the repository.
        directory: the results.
        runs: the finished runs in it.
        files: the names of the files in the repository.
    """
    from huggingface_hub import DatasetCardData

    tables = _main_first(runs, directory, [name for name in files if name.endswith(".parquet")])
    names = _config_names(tables)
    configs: list[dict[str, Any]] = [
        {"config_name": config, "data_files": _pattern(name)} | ({"default": True} if name == tables[0] else {})
        for name, config in names.items()
    ]
    # A dictionary and not keyword arguments: the client would name `configs` differently in other versions.
    metadata: dict[str, Any] = {"pretty_name": repo.partition("/")[2], "tags": _TAGS, "configs": configs}
    return f"""---
{DatasetCardData(**metadata).to_yaml(original_order=list(metadata))}
---

# {repo.partition("/")[2]}

Measured by layersurgery {__version__}.{f" `{NAME}` shows all of it on one page." if NAME in files else ""}

{"".join(_about(run, directory) for run in runs)}## Tables

| table | file | columns |
|---|---|---|
{chr(10).join(_row(name, config, directory) for name, config in names.items())}

## Read it

```python
import datasets, layersurgery as ls

frame = datasets.load_dataset("{repo}", "{names[tables[0]]}", split="train").to_pandas()
directory = ls.fetch_results("{repo}")  # the same files; ls.read_results and ls.report read them
```
"""


def _main_first(runs: Sequence[FinishedRun], directory: Path, tables: list[str]) -> list[str]:
    """Return the tables with a run's main one first: of its results, if it has some."""
    first = {
        f"{run.path.relative_to(directory).as_posix()}/{name}.parquet".removeprefix("./"): None
        for run in runs
        for name in run.tables
    }
    order = [*sorted(first, key=lambda name: not name.endswith(RESULTS)), *tables]
    return [name for name in dict.fromkeys(order) if name in tables]


def _config_names(tables: Sequence[str]) -> dict[str, str]:
    """Return the name of each table's configuration: of its file, with the directories that it is in.

    Two names that would become one get a number.
    """
    names: dict[str, str] = {}
    for table in tables:
        name = numbered = re.sub(r"[^\w.-]", "_", table.removesuffix(".parquet").replace("/", "-"))
        number = 1
        while numbered in names.values():
            number += 1
            numbered = f"{name}-{number}"
        names[table] = numbered
    return names


def _pattern(name: str) -> str:
    """Return a pattern that finds one file: special characters of patterns in its name stand for any character."""
    return re.sub(r"[\[\]*{}]", "?", name)


def _about(run: FinishedRun, directory: Path) -> str:
    origin = provenance(run)
    place = run.path.relative_to(directory).as_posix()
    command = f"\n```console\n$ {' '.join(origin.command)}\n```\n" if origin.command else ""
    facts = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in origin.facts)
    words = f"{run.words}.\n".replace("..", ".") if run.words else ""
    return f"## {run.word}{'' if place == '.' else f' ({place})'}\n\n{words}\n| | |\n|---|---|\n{facts}\n{command}\n"


def _row(name: str, config: str, directory: Path) -> str:
    import pyarrow.parquet as pq

    names = pq.read_schema(directory / name).names
    meant = "; ".join(_meaning(names, PurePosixPath(name).stem))
    return f"| `{config}` | `{name}` | {_cell(meant)} |"


def _meaning(names: Sequence[str], table: str) -> Iterator[str]:
    """Yield each column's name with its label and unit, where they say more than the name."""
    for name in names:
        entry = column(name, table)
        # Shares are in the table as they are, and only shown in percent.
        meaning = entry.axis if entry.factor == 1 else entry.label
        is_plain = table in _NAMES_ALONE or meaning.replace(" ", "_") == name
        yield f"`{name}`" if is_plain else f"`{name}`: {meaning}"


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
