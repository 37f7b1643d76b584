"""Convert a GGUF file to a float32 safetensors checkpoint in the cache, once."""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..atomic_io import atomic_directory, remove_leftovers
from ..errors import OutputError, SourceError
from ..library_logs import quiet_libraries
from ..units import format_list
from .dialects import write_both_dialects
from .safetensors_header import refuse_pointer

_CONVERSION = 3  # the version of what a conversion writes
_HUB_REPOSITORY = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)/?")
# One conversion at a time, since each replaces functions of gguf.
_converting = threading.Lock()


def cache_directory() -> Path:
    """Return the directory of converted models: $LAYERSURGERY_CACHE, or layersurgery in the user's cache directory."""
    chosen = os.environ.get("LAYERSURGERY_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "layersurgery"


def conversion_directory(gguf: Path) -> Path:
    """Return the directory into which a GGUF file is converted."""
    stat = gguf.stat()
    # The versions are included, so that an error of one version does not persist in the next.
    identity = (gguf.resolve(), stat.st_size, stat.st_mtime_ns, version("transformers"), _CONVERSION)
    key = hashlib.sha256(":".join(map(str, identity)).encode()).hexdigest()[:12]
    return cache_directory() / f"{gguf.stem}-{key}"


def convert_once(gguf: Path, card: Mapping[str, Any] | None = None, notice: str = "") -> Path:
    """Convert a GGUF file to a float32 safetensors checkpoint with transformers, unless it has already been converted.

    Float32 represents every value of the GGUF formats exactly, so nothing is lost. What killed conversions left in the
    cache is removed.

    Args:
        gguf: the file.
        card: license and origin of the model, if they are known; else what the file states is recorded.
        notice: text of a file NOTICE, which is copied with every checkpoint made from this one; empty for none.

    Raises:
        SourceError: the file is damaged or cannot be read, or the cache cannot be written.
    """
    refuse_pointer(gguf)
    target = conversion_directory(gguf)
    remove_leftovers(target.parent)
    if (target / "config.json").exists():
        return target
    try:
        import gguf as _  # noqa: F401 - transformers notices only later that it is missing
    except ImportError as error:
        raise SourceError(f"reading {gguf.name} needs the package gguf ({error}); run: pip install gguf") from None
    from huggingface_hub import ModelCardData

    try:
        with _converting, _read_once() as read:
            if (target / "config.json").exists():  # another thread has converted it
                return target
            needed = 4 * sum(int(tensor.n_elements) for tensor in read(gguf).tensors)
            with atomic_directory(target, bytes_needed=needed, overwrite=False) as partial:
                # The progress bars and advice of the conversion would describe an internal step. Some bars ignore all
                # settings.
                with quiet_libraries(), redirect_stderr(io.StringIO()):
                    _convert(gguf, partial)
                if notice:
                    (partial / "NOTICE").write_text(notice, "utf-8")
                if card := card or _read_card(read(gguf)):
                    (partial / "README.md").write_text(f"---\n{ModelCardData(**card).to_yaml()}\n---\n", "utf-8")
    except SourceError:
        raise
    except OutputError as error:
        if not (target / "config.json").exists():  # else another process has written the same conversion first
            raise SourceError(
                f"the converted model cannot be written: {error}. LAYERSURGERY_CACHE sets another directory"
            ) from error
    except Exception as error:  # the loaders raise any exception for a damaged file
        raise SourceError(f"transformers cannot read {gguf}: {type(error).__name__}: {error}") from error
    return target


@contextmanager
def _read_once() -> Iterator[Any]:
    """Have gguf read each file, and make each table of names, once during the `with` block.

    transformers reads the file three times, for the config, the weights and the tokenizer, and makes the table again
    for each module of the model. This took half of the time of a conversion, and more with a large vocabulary.

    Yields:
        A function that returns the reader of a file.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            # Each slice of a memmap is a memmap, which takes three times as long to make as an array.
            self._data = np.asarray(mapped)

    @cache
    def read_path(path: str) -> Any:
        return Reader(path)

    def read(path: str | os.PathLike[str]) -> Any:
        return read_path(os.path.realpath(path))

    package: Any = gguf
    own = package.GGUFReader, package.get_tensor_name_map
    package.GGUFReader, package.get_tensor_name_map = read, cache(package.get_tensor_name_map)
    try:
        yield read
    finally:
        package.GGUFReader, package.get_tensor_name_map = own


def _read_card(reader: Any) -> dict[str, Any]:
    """Return the license, the languages and the origin that a GGUF file states, under the names of a model card."""
    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("general.")}
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
