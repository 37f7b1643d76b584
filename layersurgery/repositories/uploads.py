"""Choose what of a directory is uploaded: a checkpoint's files, or results with a page and a card."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import OutputError, SourceError
from ..reports.collect import FinishedRun, collect
from ..reports.provenance import provenance
from ..reports.report import NAME, report
from ..runs.per_token import PARTS
from ..runs.run_directory import JOURNAL
from ..runs.tables import RUN, read_run
from .dataset_card import dataset_card

CARD = "README.md"
RESULT_FILES = (".parquet", ".csv", ".png", ".svg", ".safetensors")  # and run.json


@dataclass(frozen=True, slots=True)
class Upload:
    """Hold what is uploaded.

    Attributes:
        kind: the kind of the repository: "model" for a checkpoint, "dataset" for results.
        files: the files' paths on this machine, or their contents, by their names in the repository.
        notes: what the user should know before others can read it.
    """

    kind: str
    files: Mapping[str, Path | bytes]
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Return the size of each file in bytes."""
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in self.files.items()
        }


def read_upload(directory: Path, repo: str) -> Upload:
    """Return what a directory's upload consists of.

    Args:
        directory: a checkpoint or results.
        repo: the repository that it goes to.

    Raises:
        SourceError: the directory is neither, or holds a run that has not finished.
        OutputError: the card's metadata cannot be read.
    """
    if (directory / "config.json").is_file():
        files: dict[str, Path | bytes] = dict(_files_below(directory))
        if not any(name.endswith((".safetensors", ".bin")) for name in files):
            raise SourceError(f"{directory} has a config.json and no weights; give the directory of a checkpoint")
        upload = Upload("model", files)
    else:
        upload = _results(directory, repo)
    _check_card(upload, directory)
    return upload


def _results(directory: Path, repo: str) -> Upload:
    try:
        collected = collect([directory])
    except SourceError as error:
        raise SourceError(
            f"{directory} is neither a checkpoint (it has no config.json) nor results: {error}"
        ) from error
    if collected.others:
        path, reason = collected.others[0]
        raise SourceError(f"{path} is not pushed: {reason}")
    files: dict[str, Path | bytes] = {}
    notes = []
    for run in collected.runs:
        place = run.path.relative_to(directory)
        # The directory around several runs may be anything, such as the home directory.
        found = {**dict(_files_below(run.path)), **dict(_named_files(run))}
        files |= {(place / name).as_posix(): path for name, path in found.items() if path.suffix in RESULT_FILES}
        # The command and the facts name files without their directories, as the page does.
        facts = dict(run.facts) | {"command": " ".join(provenance(run).command)}
        files[(place / RUN).as_posix()] = (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()
        model = ((read_run(run.path) or {}).get("arguments", {}).get("model") or {}).get("name")
        if model != run.fact("arguments", "model", "name", default=None):
            notes.append(f"the tables of {run.path} name the model by its path, {model}, which readers will see")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            files[NAME] = report(directory, temporary).path.read_bytes()
        except OutputError as error:
            files.pop(NAME, None)
            notes.append(f"no {NAME} is uploaded: {error}")
    files[CARD] = dataset_card(repo, directory, collected.runs, sorted(files)).encode()
    return Upload("dataset", files, tuple(notes))


def _named_files(run: FinishedRun) -> Iterator[tuple[str, Path]]:
    """Yield the files that a run's own record names: some are in the directory of a run inside it (of its tasks)."""
    for name in map(PurePosixPath, run.fact("files", default=())):
        path = run.path / name
        if not name.is_absolute() and ".." not in name.parts and path.is_file():
            yield name.as_posix(), path


def _files_below(directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files in a directory and below it, without hidden ones, those of an unfinished run and other runs."""
    for parent, folders, names in os.walk(directory):
        # The run.json of another run names files with their directories.
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in (JOURNAL, PARTS) and not Path(parent, name, RUN).exists()
        )
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(directory).as_posix(), path


def _check_card(upload: Upload, directory: Path) -> None:
    """Read the card as the Hub's client does; the Hub itself checks it once more when it is uploaded.

    Raises:
        OutputError: its metadata is not valid.
    """
    from huggingface_hub import DatasetCard, ModelCard
    from yaml import YAMLError

    if (card := upload.files.get(CARD)) is None:
        return
    text = card.decode() if isinstance(card, bytes) else card.read_text("utf-8")
    try:
        (ModelCard if upload.kind == "model" else DatasetCard)(text)
    except (ValueError, TypeError, YAMLError) as error:
        raise OutputError(f"the metadata at the top of {directory / CARD} is not valid: {error}") from error
