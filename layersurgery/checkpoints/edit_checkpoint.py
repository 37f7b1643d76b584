"""Edit the files of a checkpoint: rename tensors in the headers and copy their bytes, without loading the weights.

>>> import layersurgery as ls
>>> result = ls.edit_checkpoint("smollm2-135m", ls.swap(12), "swapped")
>>> ls.load("swapped").model.config.num_hidden_layers
30
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_io import atomic_directory, check_output, check_room
from ..errors import PlanError, warn
from ..plans.plan import Plan
from ..plans.route import Route
from .block_sources import Sources
from .checkpoint import read_checkpoint
from .model_card import model_card
from .output_layout import Shard
from .prepared_edit import PlannedEdit, PreparedEdit, check_edit, plan_edit
from .shard_writer import Progress, can_link, shard_writer
from .sources import GgufSource, Source, find_gguf, find_source
from .tensor_index import INDEX

if TYPE_CHECKING:
    from ..models.means import Means
    from ..models.output_maps import OutputMaps


@dataclass(frozen=True, slots=True)
class EditResult:
    """Describe an edited checkpoint that was written, or would be.

    Attributes:
        path: directory of the new checkpoint.
        plan: the edits.
        route: the source's blocks in the order in which the new model runs them.
        depth: number of blocks of the source.
        bytes_written: size of the safetensors files that were copied (or shared by the file system).
        bytes_linked: size of the safetensors files that were hard-linked.
        seconds: time from the first byte to the finished directory, with the reload check, which runs meanwhile.
        verified: whether the reload check was run.
        notes: what users of the source or of the result should know, such as programs that would run another model.
        sources: the other checkpoints of which blocks are taken, by their name in the plan.
        dry_run: whether nothing was written; the sizes are then those that would be.
    """

    path: Path
    plan: Plan
    route: Route
    depth: int
    bytes_written: int
    bytes_linked: int
    seconds: float
    verified: bool
    notes: tuple[str, ...] = ()
    sources: Mapping[str, Source] = field(default_factory=dict)
    dry_run: bool = False


def read_means(means: Any) -> Means | None:
    """Return means, or those of a file; None for None. Without means, torch is not imported."""
    if means is None:
        return None
    from ..models.means import as_means

    return as_means(means)


def edit_checkpoint(
    model: str | os.PathLike[str],
    plan: Plan | str,
    out: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    link: bool = False,
    verify: bool = True,
    blocks: str | None = None,
    progress: Progress | None = None,
    maps: OutputMaps | None = None,
    sources: Sources | None = None,
    means: Means | str | os.PathLike[str] | None = None,
    gguf: bool = False,
    measured: Mapping[str, str] | None = None,
    dry_run: bool = False,
) -> EditResult:
    """Write the edited checkpoint of a model, as plain safetensors that any Hugging Face pipeline loads.

    If the name of the output ends in `.gguf`, the model's GGUF file is edited to a GGUF file; its quantised weights are
    copied as they are, and nothing is converted.

    After an error, the output is unchanged: no partial files remain, and an existing checkpoint at `out` is kept.

    Args:
        model: Hub ID, local directory, `.gguf` file, or "smollm2-135m".
        plan: the edits, or their text.
        out: the new directory; by default `<name>-<plan>` in the current directory.
        revision: branch, tag or commit on the Hub.
        overwrite: replace an existing checkpoint at `out`, once the new one is complete.
        link: hard-link files that do not change. They are then the same files as the source's: a change to one changes
            both.
        verify: run the reload check, while the bytes are copied. It needs torch and transformers; without it, a swap
            needs neither.
        blocks: prefix of the decoder blocks' tensors, if it cannot be found automatically.
        progress: called repeatedly with the number of bytes written since the last call, by one thread at a time.
        maps: linear maps of what branches add, by the position in the route, as in `LinearHealing.maps`.
        sources: names of models that the plan takes blocks of ("MODEL" or "MODEL@REVISION"), by the names in the plan:
            {"base": "org/base"}. The embeddings and all else outside the blocks stay the model's.
        means: the means of the model's branches (`measure_means`), or their file, for edits that add them. They are
            written as the biases of output projections, so a model without such biases is refused.
        gguf: write a GGUF file also if `out` is not given: `<name>-<plan>.gguf`. There is no reload check.
        measured: rows of the model card: what the measurement that chose the edit says of the result.
        dry_run: run all checks, and write nothing.

    Returns:
        The directory (or the GGUF file), and how it was made.

    Raises:
        PlanError: the plan does not fit the model, or changes nothing.
        SourceError: the source cannot be found or read.
        UnsupportedEditError: no checkpoint of this architecture can represent the edited model.
        OutputError: `out` exists or cannot be written.

    Example:
        >>> import layersurgery as ls
        >>> result = ls.edit_checkpoint("smollm2-135m", "drop 20; drop 24", "dropped")
        >>> print(result.path, result.route)
        dropped 0:20 21:24 25:30
    """
    if isinstance(plan, str):
        plan = Plan.parse(plan)
    if not isinstance(plan, Plan):
        raise PlanError(f'expected a plan or its text ("swap 1 2; drop 3"), not {plan!r}')
    if gguf or (out is not None and is_gguf_output(out)):
        options = {"blocks": blocks, "maps": maps, "link": link, "sources": sources, "means": means}
        if given := [name for name, value in options.items() if value]:
            raise PlanError(f"a GGUF file is edited without `{given[0]}`; omit it, or write a safetensors checkpoint")
        return _edit_gguf(model, plan, out, revision, overwrite=overwrite, progress=progress, dry_run=dry_run)
    source = find_source(model, revision=revision)
    target = Path(out) if out is not None else default_output(source, plan)
    check_output(target, source.directory, overwrite=overwrite)
    planned = plan_edit(
        read_checkpoint(source, blocks=blocks),
        plan,
        verify=verify,
        maps=maps,
        sources=sources,
        means=read_means(means),
    )

    def check() -> PreparedEdit:
        prepared = check_edit(planned)
        for note in prepared.notes:
            warn(note)
        return prepared

    return write_edit(
        planned,
        target,
        check=check,
        overwrite=overwrite,
        link=link,
        progress=progress,
        measured=measured,
        dry_run=dry_run,
    )


def default_output(source: Source | GgufSource, plan: Plan) -> Path:
    """Return the default output, `./<name>-<plan slug>`, with `.gguf` for a GGUF file."""
    return Path(f"{source.name}-{plan.slug}{'.gguf' * isinstance(source, GgufSource)}")


def is_gguf_output(out: str | os.PathLike[str]) -> bool:
    """Return whether an output is a GGUF file, by its name."""
    return Path(out).suffix.lower() == ".gguf"


def _edit_gguf(
    model: str | os.PathLike[str],
    plan: Plan,
    out: str | os.PathLike[str] | None,
    revision: str | None,
    *,
    overwrite: bool,
    progress: Progress | None,
    dry_run: bool,
) -> EditResult:
    from .gguf_edit import check_gguf_output, plan_gguf_edit, write_gguf_edit

    source = find_gguf(model, revision=revision)
    target = Path(out) if out is not None else default_output(source, plan)
    check_gguf_output(target, source.path, overwrite=overwrite)
    planned = plan_gguf_edit(source, plan)
    for note in planned.notes:
        warn(note)
    return write_gguf_edit(planned, target, overwrite=overwrite, progress=progress, dry_run=dry_run)


def write_edit(
    planned: PlannedEdit,
    out: Path,
    *,
    check: Callable[[], PreparedEdit] | None = None,
    overwrite: bool = False,
    link: bool = False,
    progress: Progress | None = None,
    measured: Mapping[str, str] | None = None,
    dry_run: bool = False,
) -> EditResult:
    """Check an edit and write it to `out`, completely or not at all.

    Bytes are copied by other threads while the check runs in this one, since nothing is visible before the end.

    Args:
        planned: the edit.
        out: the new directory.
        check: called once, in this thread, instead of `check_edit(planned)`.
        overwrite: replace an existing checkpoint at `out`, once the new one is complete.
        link: hard-link files that do not change.
        progress: called with the number of bytes written since the last call, by one thread at a time.
        measured: rows of the model card: what the measurement that chose the edit says of the result.
        dry_run: check only, and write nothing.

    Raises:
        SourceError: a source file cannot be read, or was changed after its header was read.
        UnsupportedEditError: the check refuses the edit.
        OutputError: `out` exists or cannot be written; no partial output remains.
    """
    started = time.perf_counter()
    for other in planned.others:
        check_output(out, other.checkpoint.source.directory, overwrite=overwrite)
    sources = {other.name: other.checkpoint.source for other in planned.others}

    def result(prepared: PreparedEdit, written: Iterable[Shard], linked: Iterable[Shard]) -> EditResult:
        return EditResult(
            path=out,
            plan=planned.plan,
            route=planned.route,
            depth=planned.checkpoint.depth,
            bytes_written=sum(shard.nbytes for shard in written),
            bytes_linked=sum(shard.nbytes for shard in linked),
            seconds=time.perf_counter() - started,
            verified=planned.verify,
            notes=prepared.notes,
            sources=sources,
            dry_run=dry_run,
        )

    if dry_run:
        prepared = check_edit(planned) if check is None else check()
        linked = [shard for shard in prepared.layout.shards if link and shard.unchanged and can_link(shard, out)]
        written = [shard for shard in prepared.layout.shards if shard not in linked]
        check_room(out, sum(shard.nbytes for shard in written))
        return result(prepared, written, linked)
    settled = planned.settled_shards
    needed = sum(shard.nbytes for shard in planned.layout.shards if not (link and shard.unchanged and shard in settled))
    with atomic_directory(out, bytes_needed=needed, overwrite=overwrite) as directory:
        with shard_writer(directory, progress or _no_progress, link=link) as writer:
            writer.start(settled)
            prepared = check_edit(planned) if check is None else check()
            writer.start(shard for shard in prepared.layout.shards if shard not in settled)
            writer.finish()
        # config.json comes after the shards, so that no partial directory passes for a checkpoint.
        _write_text(directory / "config.json", _format_json(prepared.config))
        if prepared.layout.index is not None:
            _write_text(directory / INDEX, prepared.layout.index)
        _copy_other_files(planned, directory)
        card = model_card(
            planned.checkpoint.source,
            planned.plan,
            planned.route,
            planned.checkpoint.depth,
            verified=planned.verify,
            healed=[planned.route[position].block for position in planned.maps],
            notes=prepared.notes,
            sources=sources,
            measured=measured,
        )
        _write_text(directory / "README.md", card)
    return result(prepared, writer.written, writer.linked)


def _no_progress(count: int) -> None:
    pass


def _format_json(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can escape it, but UTF-8 cannot encode it
        text = json.dumps(value, indent=2)
    return text + "\n"


def _write_text(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _copy_other_files(planned: PlannedEdit, directory: Path) -> None:
    """Copy the other files of the model, or write their new content."""
    for path, value in planned.other_files.items():
        target = directory / path
        target.parent.mkdir(exist_ok=True)
        if value is not None:
            _write_text(target, _format_json(value))
        else:
            shutil.copyfile(planned.checkpoint.source.directory / path, target)
            with target.open("r+b") as copied:  # Windows syncs only what may be written
                os.fsync(copied.fileno())
