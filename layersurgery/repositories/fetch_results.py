"""Fetch results from a dataset repository on the Hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath

from ..atomic_io import atomic_directory, check_output, check_room
from ..errors import SourceError
from ..reports.collect import collect
from ..runs.tables import RUN
from .hub_errors import check_repo_name, hub_errors


def find_results(
    repo: str, output: str | os.PathLike[str] | None = None, *, revision: str | None = None
) -> tuple[Path, dict[str, int]]:
    """Return where results would be written, and the sizes of the files in bytes by their names; download nothing.

    The arguments and errors are those of `fetch_results`.
    """
    check_repo_name(repo)
    out = Path(output) if output is not None else Path(repo.partition("/")[2])
    check_output(out, None, overwrite=False)
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(repo, "fetch", SourceError):
        # Any dataset can be named, and some are terabytes.
        entries = list(HfApi().list_repo_tree(repo, recursive=True, repo_type="dataset", revision=revision))
    paths = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    files = {path: size for path, size in paths.items() if not PurePosixPath(path).name.startswith(".")}
    if not any(PurePosixPath(path).name == RUN for path in files):
        raise SourceError(f"{repo} is not a repository of results: it has no {RUN}; nothing was downloaded")
    check_room(out, sum(files.values()))
    return out, files


def fetch_results(repo: str, output: str | os.PathLike[str] | None = None, *, revision: str | None = None) -> Path:
    """Download results that `push` has uploaded.

    Args:
        repo: the dataset repository, USER/NAME.
        output: the directory to write to; by default NAME in the current directory.
        revision: branch, tag or commit.

    Returns:
        The directory, which `read_results`, `plot` and `report` read like any directory of results.

    Raises:
        PlanError: the name is not of the form USER/NAME.
        SourceError: the repository cannot be read, or holds no results.
        OutputError: the output exists, or cannot be written.

    Example:
        >>> import layersurgery as ls
        >>> ls.fetch_results("me/my-results/sweep")
        Traceback (most recent call last):
        ...
        layersurgery.errors.PlanError: 'me/my-results/sweep' is not the name of a repository (USER/NAME): ...
    """
    out, _ = find_results(repo, output, revision=revision)
    from huggingface_hub import snapshot_download

    with hub_errors(repo, "fetch", SourceError):
        fetched = Path(snapshot_download(repo, repo_type="dataset", revision=revision))
    try:
        collect([fetched])
    except SourceError as error:
        reason = str(error).replace(str(fetched), repo)
        raise SourceError(f"{repo} is not a repository of results: {reason}") from error
    files = [path for path in sorted(fetched.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    with atomic_directory(out, bytes_needed=sum(path.stat().st_size for path in files), overwrite=False) as partial:
        for path in files:
            target = partial / path.relative_to(fetched)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return out
