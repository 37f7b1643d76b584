"""Read what a checkpoint's files say about it, without its weights: its config, its tensors and its blocks."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SourceError
from ..models.config_fields import DecoderSection, Json, find_section
from ..models.unsupported import refuse_architecture
from .sources import Source
from .tensor_index import BlockPrefix, TensorIndex, find_block_prefix, read_json, read_tensor_index


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as its files describe it.

    Attributes:
        source: the directory of its files and its provenance.
        config: its config.json.
        section: the section of the config that describes the decoder.
        tensors: its tensors.
        block_prefix: the prefix of the decoder blocks in the tensor names.
    """

    source: Source
    config: Json
    section: DecoderSection
    tensors: TensorIndex
    block_prefix: BlockPrefix

    @property
    def depth(self) -> int:
        """Return the number of decoder blocks."""
        return self.section.depth

    @property
    def fields(self) -> Json:
        """Return the section of the config that describes the decoder."""
        return self.section.get_fields(self.config)


def read_checkpoint(source: Source, *, blocks: str | None = None, tensors: TensorIndex | None = None) -> Checkpoint:
    """Read the config and the headers of a checkpoint.

    Args:
        source: the checkpoint.
        blocks: prefix of the decoder blocks' tensors, if it cannot be found automatically ("model.layers").
        tensors: the tensors of the checkpoint, if they have already been read.

    Raises:
        SourceError: files are damaged or missing, or config and tensors belong to different models.
        UnsupportedEditError: several lists of layers could be the decoder.
    """
    config = read_json(source.directory / "config.json")
    section = _find_decoder_section(config)
    tensors = read_tensor_index(source.directory) if tensors is None else tensors
    try:
        prefix = find_block_prefix(tensors.names(), section.depth, section.extra_blocks, blocks)
    except SourceError:
        refuse_architecture(section.get_fields(config))  # a looped model has fewer blocks than its config declares
        raise
    return Checkpoint(source, config, section, tensors, prefix)


def _find_decoder_section(config: Json) -> DecoderSection:
    # The config class of transformers is asked only if the fields do not suffice, because importing it is slow.
    try:
        return find_section(config)
    except SourceError:
        from ..models.meta_model import resolve_section

        return resolve_section(config)
