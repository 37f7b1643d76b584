"""Push a checkpoint or results to a repository on the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import OutputError, PlanError, warn
from ..reports.report import NAME
from ..runs.tables import RUN
from ..version import __version__
from .hub_errors import check_push, check_repo_name, hub_errors
from .uploads import RESULT_FILES, Upload, read_upload

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf")


@dataclass(frozen=True, slots=True)
class Pushed:
    """Say what was pushed, or would be.

    Attributes:
        repo: the repository, USER/NAME.
        kind: "model" or "dataset".
        files: the size of each file in bytes, by its name in the repository.
        private: whether the repository is private.
        url: the address of the repository; empty if nothing was uploaded.
        commit: the commit; None if nothing was uploaded.
    """

    repo: str
    kind: str
    files: Mapping[str, int]
    private: bool
    url: str = ""
    commit: str | None = None


def push(
    directory: str | os.PathLike[str],
    repo: str,
    *,
    public: bool = False,
    message: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Push a checkpoint to a model repository on the Hub, or results to a dataset repository.

    A new repository is private unless `public` is set. In an existing one, the upload is one new commit: files of the
    same names are replaced, and no others are deleted. All files appear in this commit or none. After an interruption,
    files of weights and tables that the Hub has received are not sent again.

    Args:
        directory: a checkpoint, or results of `layersurgery sweep`, `analyze`, `prune` and others. Results get a card
            that names the tables for `datasets.load_dataset`, and the page of `layersurgery report`.
        repo: the repository, USER/NAME.
        public: everybody can read a new repository.
        message: the commit's message.
        dry_run: upload nothing and do not use the network; return what would be uploaded.

    Returns:
        What was pushed.

    Raises:
        PlanError: the name is not of the form USER/NAME.
        SourceError: the directory is neither a checkpoint nor finished results.
        OutputError: there is no token, the Hub refuses it or cannot be reached, the repository is public and `public`
            is not set, or it has other weights or results, which programs could load instead.

    Example:
        >>> import tempfile
        >>> import layersurgery as ls
        >>> written = ls.edit_checkpoint("smollm2-135m", "drop 20", f"{tempfile.mkdtemp()}/pruned")
        >>> pushed = ls.push(written.path, "me/pruned", dry_run=True)
        >>> pushed.kind, pushed.private, "model.safetensors" in pushed.files
        ('model', True, True)
    """
    return push_directory(Path(directory), repo, public=public, message=message, dry_run=dry_run, note=warn)


def push_directory(
    directory: Path,
    repo: str,
    *,
    public: bool,
    message: str | None = None,
    dry_run: bool = False,
    note: Callable[[str], None],
) -> Pushed:
    """Push a directory, as `push` does, and pass what the user should know to `note`."""
    if directory.is_file():
        raise PlanError(f"{directory} is a file; give the directory of a checkpoint or of results")
    check_repo_name(repo)
    upload = read_upload(directory, repo)
    for text in upload.notes:
        note(text)
    if dry_run:
        return Pushed(repo, upload.kind, upload.sizes, not public)
    check_push(repo)
    text = message or f"{directory.resolve().name}, by layersurgery {__version__}"
    with hub_errors(repo, "push to", OutputError):
        return _send(upload, repo, public, text, note)


def _send(upload: Upload, repo: str, public: bool, message: str, note: Callable[[str], None]) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(library_name="layersurgery", library_version=__version__)
    private = not public
    try:
        existing = api.repo_info(repo, repo_type=upload.kind)
    except RepositoryNotFoundError:
        api.create_repo(repo, repo_type=upload.kind, private=private)
    else:
        private = bool(existing.private)
        _check_existing(existing, upload, repo, public)
        note(f"{repo} exists; this is a new commit in it, and files of other names stay as they are")
        if private and public:
            note(f"{repo} is private, and stays private")
    # One commit (and not upload_large_folder, which makes many, and writes its state into the directory), so that
    # readers never see half of an upload; and not upload_folder, which takes all files that a directory holds.
    operations = [
        CommitOperationAdd(name, file if isinstance(file, bytes) else str(file)) for name, file in upload.files.items()
    ]
    commit = api.create_commit(repo, operations, commit_message=message, repo_type=upload.kind)
    prefix = "" if upload.kind == "model" else f"{upload.kind}s/"
    return Pushed(repo, upload.kind, upload.sizes, private, f"{api.endpoint}/{prefix}{repo}", commit.oid)


def _check_existing(existing: Any, upload: Upload, repo: str, public: bool) -> None:
    """Refuse an existing repository that does not fit.

    Raises:
        OutputError: others can read it, and this was not asked for; or it has other weights or results.
    """
    if not existing.private and not public:
        raise OutputError(
            f"the {upload.kind} repository {repo} exists and is public, so everybody could read what is pushed; allow "
            "it (`public`), or choose another repository"
        )
    names = [file.rfilename for file in existing.siblings or ()]
    if upload.kind == "model" and (
        others := sorted(name for name in names if name.endswith(_WEIGHTS) and name not in upload.files)
    ):
        raise OutputError(
            f"{repo} has weights that this checkpoint does not replace ({', '.join(others[:3])}), and a program could "
            "load them instead of these. Remove them on the Hub, or choose another repository"
        )
    # A run in a directory hides those below it, so that `fetch_results` and `report` would read the old one only, and
    # a table beside a run would be read as the run's.
    runs = {PurePosixPath(name).parent for name in upload.files if PurePosixPath(name).name == RUN}
    if upload.kind == "dataset" and (
        others := [
            path.as_posix()
            for path in map(PurePosixPath, sorted(names))
            if path.as_posix() not in upload.files
            and (path.name in (RUN, NAME) or (path.suffix in RESULT_FILES and runs & {*path.parents}))
        ]
    ):
        raise OutputError(
            f"{repo} has results that these do not replace ({', '.join(others[:3])}), and readers would take them for "
            "these. Remove them on the Hub, or choose another repository"
        )
