"""Find a model, given as Hub ID, local directory, GGUF file or packaged model, and return a directory of its files."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import SourceError
from .cached_models import cached_models
from .gguf_conversion import conversion_directory, convert_once
from .model_packages import PACKAGED, packaged_file
from .safetensors_header import Header, TensorInfo
from .tensor_index import ADAPTER_CONFIG, INDEX, MERGE_ADAPTER, SINGLE, read_json

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# The address of a page of the Hub or of a mirror of it: what kind of page, the Hub ID, the revision.
_HUB_ADDRESS = re.compile(
    r"(?:https?://[^/]+/|(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(models/|datasets/|spaces/|collections/|papers/)?"
    r"([\w.-]+/[\w.-]+|[\w.-]+)(?:/(?:tree|blob|resolve|commit)/([^/?#]+))?"
)
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
        model: local directory, `.gguf` file, Hub ID, or name of a model that packages contain ("smollm2-135m",
            "gemma3-270m"). An existing directory takes precedence.
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
    if revision is not None and (path.exists() or text in PACKAGED):
        raise SourceError(f"{text} is on this machine, and only Hub models have revisions; omit `revision`")
    if _is_gguf(path):
        return Source(convert_once(path), text, path.stem)
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
    if packaged := PACKAGED.get(text):
        directory = convert_once(packaged_file(text), packaged.card, packaged.notice)
        return Source(directory, packaged.origin, text, on_hub=True)
    if (address := _HUB_ADDRESS.match(text)) and address[1] in (None, "models/"):
        at = f", at revision {address[3]!r}" if address[3] and address[3] != "main" else ""
        raise SourceError(f"{text} is the address of a page; give the Hub ID instead: {address[2]}{at}")
    if address:
        raise SourceError(f"{text} is the address of a page, and not that of a model; give the Hub ID of a model")
    if not _HUB_ID.fullmatch(text) or text.startswith((".", "/", "~")):
        raise SourceError(f"{text} does not exist on this machine and is not a Hub ID (organization/name)")
    return _from_hub(text, revision, weights)


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A GGUF file on this machine.

    Attributes:
        path: the file.
        label: its name in records of provenance: the Hub ID, or the path that the user wrote.
        name: a short name for default outputs.
        license: license of the model, if it is known from elsewhere than the file.
        notice: text that must go with every copy of the weights; empty if none must.
    """

    path: Path
    label: str
    name: str
    license: str = ""
    notice: str = ""


def find_gguf(model: str | os.PathLike[str], *, revision: str | None = None) -> GgufSource:
    """Make a model's GGUF file available on this machine, as it is.

    Args:
        model: `.gguf` file, local directory or Hub ID with one such file, or name of a model that packages contain.
        revision: branch, tag or commit on the Hub.

    Raises:
        SourceError: the model is not found, cannot be fetched, or has no GGUF file, or several.
    """
    text = os.fspath(model)
    path = Path(text).expanduser()
    if revision is not None and (path.exists() or text in PACKAGED):
        raise SourceError(f"{text} is on this machine, and only Hub models have revisions; omit `revision`")
    if _is_gguf(path):
        return GgufSource(path, text, path.stem)
    if path.is_dir():
        files = [file.name for file in path.iterdir() if _is_gguf(file)]
        return GgufSource(path / _only_gguf(text, files), text, path.resolve().name)
    if packaged := PACKAGED.get(text):
        return GgufSource(packaged_file(text), packaged.origin, text, packaged.license, packaged.notice)
    if path.exists() or not _HUB_ID.fullmatch(text) or text.startswith((".", "/", "~")):
        raise SourceError(f"{text} is not a .gguf file, a directory with one, or a Hub ID (organization/name)")
    from huggingface_hub import HfApi, hf_hub_download

    with _hub_errors(text, revision):
        name = _only_gguf(text, HfApi().list_repo_files(text, revision=revision))
        return GgufSource(Path(hf_hub_download(text, name, revision=revision)), text, text.rpartition("/")[2])


def _only_gguf(model: str, names: Iterable[str]) -> str:
    """Return the name of the only GGUF file among these."""
    files = sorted(name for name in names if name.lower().endswith(".gguf"))
    if not files:
        raise SourceError(
            f"{model} has no .gguf file, and a GGUF file is only made of another; write a checkpoint (an output whose "
            "name does not end in .gguf), and convert that with llama.cpp"
        )
    if len(files) > 1:
        raise SourceError(f"{model} has {len(files)} GGUF files ({', '.join(files[:4])}); give the path of one of them")
    return files[0]


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def _adapter_text(directory: Path, label: str) -> str:
    """Return the text of the error for an adapter without its base model."""
    base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    of = f" of {base}" if base else ""
    return f"{label} is a PEFT adapter{of} and not a whole model. {MERGE_ADAPTER}"


def needs_conversion(model: str) -> bool:
    """Return whether `find_source` must first convert a GGUF file, which takes some time."""
    path = Path(model)
    if _is_gguf(path):
        return not (conversion_directory(path) / "config.json").exists()
    if model not in PACKAGED or path.exists():
        return False
    return not (conversion_directory(packaged_file(model)) / "config.json").exists()


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
                f"{_go_online()} to fetch it, or give a local directory"
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
            f"the Hub has no model {model!r} that you can read{_did_you_mean(model)}. Check the spelling "
            "(organization/name); for a private model, run: hf auth login; for a local one, give an existing directory"
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
            f"reached{_did_you_mean(model)}. {_go_online()} to fetch it, or give a local directory"
        ) from error
    except Exception as error:  # the Hub client also raises errors of its HTTP library
        raise SourceError(f"cannot fetch {model}: {_first_line(error)}") from error


def _did_you_mean(model: str) -> str:
    """Name the model at hand with the most similar name, in any case; empty if none is similar."""
    known = {name.lower(): name for name in (*PACKAGED, *cached_models())}
    near = difflib.get_close_matches(model.lower(), known, n=1)
    return f"; did you mean {known[near[0]]}?" if near else ""


def _go_online() -> str:
    from huggingface_hub import constants

    return f"Go online{' (and unset HF_HUB_OFFLINE)' if constants.HF_HUB_OFFLINE else ''}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
