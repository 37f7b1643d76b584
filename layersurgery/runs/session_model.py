"""Hold the model of a session: where it comes from and where it is put; load it when first needed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..checkpoints.gguf_conversion import cache_directory
from ..checkpoints.sources import Source, find_source
from ..checkpoints.tensor_index import fingerprint
from ..errors import PlanError
from ..models.block_list import find_decoder_blocks, text_config, unwrap_transformers
from ..runtime.offload import device_of
from .model_fingerprint import model_fingerprint
from .options import RunOptions
from .placement import Placement, choose_placement, load_model
from .reporter import Reporter
from .requests import Padding, config_limits, read_model_info

if TYPE_CHECKING:
    from .distributed import ProcessGroup


class SessionModel:
    """Hold the model of a session; it is loaded once, when the first run needs it.

    Args:
        model: the model's name, or a loaded model.
        options: options of the measurements.
        reporter: receives what is said.
        group: the processes that measure together.
        exit_stack: closed when the session ends; it then frees the model.

    Attributes:
        given: the model, as it was given.
        label: the model's name in tables.
        name: the model's name in names of directories.
        source: the model's files; they include the weights once a run has needed them. None for a loaded model.
        depth: number of blocks of the model.
        positions: largest number of positions; None if it is not known.
        vocabulary: number of tokens in the vocabulary; None if it is not known.
        padding: tokens that may be padding.
    """

    def __init__(
        self, model: Any, options: RunOptions, reporter: Reporter, group: ProcessGroup, exit_stack: ExitStack
    ) -> None:
        self.given, self.options, self.reporter, self.group = model, options, reporter, group
        self._exit_stack = exit_stack
        self._loaded: nn.Module | None = None
        self._has_weights = False
        self._fingerprint: str | None = None
        self.source: Source | None = None
        if isinstance(model, nn.Module):
            self._loaded = model
            self.label = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
            if Path(self.label).parent == cache_directory():  # a converted GGUF file: its name and a hash
                self.label = Path(self.label).name.rpartition("-")[0]
            self.name = Path(self.label).name
            self.depth = len(find_decoder_blocks(model, options.blocks).blocks)
            self.positions, vocabulary = config_limits(text_config(model))
            rows = getattr(unwrap_transformers(model).get_input_embeddings(), "num_embeddings", None)
            self.vocabulary = min(filter(None, (vocabulary, rows)), default=None)  # tokens may have been removed
            self.padding = Padding.of(text_config(model), getattr(model, "generation_config", None))
            self._placement: Placement | None = _placement_of(model, options)
        else:
            info = read_model_info(model, options.revision, reporter, trust_remote_code=options.trust_remote_code)
            self.source, self.depth = info.source, info.depth
            self.label, self.name = info.source.label, info.source.name
            self.positions, self.vocabulary, self.padding = info.positions, info.vocabulary, info.padding
            self._placement = None

    @property
    def placement(self) -> Placement:
        """Return the model's devices and data type; choose them at the first use.

        Raises:
            PlanError: the options are invalid or exclude each other.
            SourceError: the device is not available.
        """
        if self._placement is None:
            assert self.source is not None
            self._placement = choose_placement(self.options, self.source, self.reporter)
        return self._placement

    @placement.setter
    def placement(self, placement: Placement) -> None:
        self._placement = placement

    def arguments(self) -> dict[str, Any]:
        """Return the name, the revision and the fingerprint of the weights."""
        if self.source is None:
            assert self._loaded is not None
            if self._fingerprint is None:
                self._fingerprint = model_fingerprint(self._loaded)
            return {"name": self.label, "revision": None, "weights": self._fingerprint}
        source = self._with_weights()
        return {"name": source.label, "revision": source.revision, "weights": fingerprint(source.directory)}

    def config(self) -> Any:
        """Return the model's config."""
        if self.source is None:
            assert self._loaded is not None
            return unwrap_transformers(self._loaded).config
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.source.directory, trust_remote_code=self.source.trust_remote_code)

    def _with_weights(self) -> Source:
        assert self.source is not None
        if not self._has_weights:
            found = find_source(self.given, revision=self.options.revision)
            self.source = replace(found, trust_remote_code=self.options.trust_remote_code)
            self._has_weights = True
        return self.source

    def load(self) -> Any:
        """Return the model on its devices; load it at the first use."""
        if self._loaded is None:
            source = self._with_weights()
            with self.reporter.status(f"Loading {self.given}"):
                self._loaded = self._exit_stack.enter_context(load_model(source, self.placement, self.group))
        return self._loaded


def _placement_of(model: nn.Module, options: RunOptions) -> Placement:
    """Return where a loaded model is.

    Raises:
        PlanError: an option would move it.
    """
    for name in ("quantize", "device", "device_map", "max_memory", "offload_folder", "revision"):
        if getattr(options, name) is not None:
            raise PlanError(f"`{name}` is for a model that is loaded by its name; this one is loaded already")
    if options.dtype != "auto":
        raise PlanError("`dtype` is for a model that is loaded by its name; this one is loaded already")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Placement(str(device_of(model)), dtype)
