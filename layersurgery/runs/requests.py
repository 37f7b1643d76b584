"""Turn what the caller gives into what a run needs: the model's files and size, the edits, and the text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checkpoints.model_card import is_of_package
from ..checkpoints.sources import Source, find_source, needs_conversion
from ..errors import PlanError, SourceError, UnsupportedEditError
from ..models.block_list import refuse_encoder_decoder
from ..models.config_fields import depth_field
from ..models.other_wrappers import refuse_wrapper
from ..runtime.inputs import as_tokens
from ..tasks.task_request import TaskRequest
from .chat import as_messages
from .data_files import find_column, missing_column
from .documents import choose_split
from .first_token import parse_bos
from .options import RunOptions
from .reporter import Reporter
from .text import TokenizedText, fingerprint_of
from .text_request import ALL, PILE, PYDOC, TextRequest, parse_count

if TYPE_CHECKING:
    import pandas as pd

_TOKENS, _CONTEXT = "1M", 2048
_EMBEDDED_TOKENS, _EMBEDDED_CONTEXT = "4096", 512
_GIVEN_TEXTS, _GIVEN_TOKENS = "the given texts", "the given tokens"


@dataclass(frozen=True, slots=True)
class Padding:
    """Tokens that may be padding.

    Attributes:
        tokens: padding tokens.
        ends: tokens that end a text; many pad with them.
    """

    tokens: frozenset[int]
    ends: frozenset[int]

    @classmethod
    def of(cls, *sources: Any) -> Padding:
        """Read the tokens from configs and tokenizers."""

        def found(name: str) -> frozenset[int]:
            values = [getattr(source, name, None) for source in sources]
            listed = [token for value in values for token in (value if isinstance(value, list) else [value])]
            return frozenset(token for token in listed if isinstance(token, int))

        return cls(found("pad_token_id"), found("eos_token_id"))

    def __or__(self, other: Padding) -> Padding:
        return Padding(self.tokens | other.tokens, self.ends | other.ends)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts from a model's config.

    Attributes:
        source: the model's files.
        depth: number of blocks.
        positions: largest number of positions; None if the config does not say it.
        vocabulary: number of tokens in the vocabulary; None if the config does not say it.
        padding: tokens that may be padding, as the config says.
        heads: number of attention heads of each block, as the config says; None if it does not say it.
    """

    source: Source
    depth: int
    positions: int | None
    vocabulary: int | None
    padding: Padding
    heads: tuple[int, ...] | None = None

    def count_heads(self, block: int) -> int:
        """Return the number of attention heads of a block, as the config says.

        Raises:
            PlanError: it does not say it.
        """
        if self.heads is None:
            raise PlanError(
                f"heads: the config of {self.source.label} does not say how many attention heads its blocks have, so "
                "the cost cannot be estimated without weights; measure some blocks (`layers`) instead"
            )
        return self.heads[block]

    def pick_neurons(self, _block: int, _kind: str, _count: int | None, _random: bool) -> tuple[int, ...]:
        """Return a neuron that stands for those of a kind: each block is taken to have some, which costs most."""
        return (0,)


def read_model_info(
    model: str | os.PathLike[str], revision: str | None, reporter: Reporter, *, trust_remote_code: bool = False
) -> ModelInfo:
    """Find a model without fetching its weights.

    Raises:
        SourceError: there is no such model, or transformers cannot read its config.
        UnsupportedEditError: it is an encoder-decoder.
    """
    from transformers import AutoConfig

    from ..checkpoints.loading import reason_of

    if not isinstance(model, str | os.PathLike):
        refuse_wrapper(model)
        hint = "; give its attribute .model" if hasattr(model, "model") else ""
        raise PlanError(f"a model is given as a transformers model or as its name, not as {type(model).__name__}{hint}")
    with reporter.status(
        f"Converting {model} to safetensors (once)"
        if needs_conversion(str(model))
        else f"Reading the config of {model}"
    ):
        source = find_source(model, revision=revision, weights=False)
        source = replace(source, trust_remote_code=trust_remote_code)
        try:
            loaded = AutoConfig.from_pretrained(source.directory, trust_remote_code=trust_remote_code)
            refuse_encoder_decoder(loaded, source.label)
            config = loaded.get_text_config(decoder=True)
            depth = int(getattr(config, depth_field(config)))
        except UnsupportedEditError:
            raise
        except Exception as error:  # a config class may raise any exception
            raise SourceError(f"transformers cannot read the config of {source.label}: {reason_of(error)}") from error
    return ModelInfo(source, depth, *config_limits(config), Padding.of(config), _heads(config, depth))


def _heads(config: Any, depth: int) -> tuple[int, ...] | None:
    """Return the number of attention heads of each block, as a config says; None if it does not say it."""
    heads = getattr(config, "num_attention_heads", None)
    of_blocks = [heads] * depth if isinstance(heads, int) else list(heads or ())
    return tuple(of_blocks) if len(of_blocks) == depth and all(isinstance(count, int) for count in of_blocks) else None


def config_limits(config: Any) -> tuple[int | None, int | None]:
    """Return the numbers of positions and of tokens in the vocabulary that a config gives; None if it does not."""
    positions, vocabulary = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    return positions if isinstance(positions, int) else None, vocabulary if isinstance(vocabulary, int) else None


@dataclass(frozen=True, slots=True)
class GivenText:
    """Text that the caller gave from Python, as tokens or as documents; at most one of both is set.

    Attributes:
        tokens: the tokens and their mask.
        masked: whether the caller gave the mask.
        documents: texts or conversations to tokenize, or a dataset whose rows hold them.
        pack: whether documents are joined if the caller does not say it.
        is_finite: whether all documents are measured if the caller does not say how many tokens.
        tasks: tasks whose requests are measured instead of a text.
    """

    tokens: tuple[torch.Tensor, torch.Tensor] | None = None
    masked: bool = False
    documents: Iterable[Any] | None = None
    pack: bool = False
    is_finite: bool = True
    tasks: TaskRequest | None = None


def read_given_text(text: Any, options: RunOptions, attention_mask: Any = None) -> tuple[RunOptions, GivenText | None]:
    """Understand any form of text that the Python functions take.

    Args:
        text: token ids, (sequences, length); a tokenizer's output, with its attention mask, also of sequences that were
            not padded; a list of strings or of conversations (lists of messages); a Hugging Face dataset or a pandas
            table, of which `options.column` is read, or the columns of a tokenizer; a path; "pydoc"; the id of a Hub
            dataset; or None for what `options.data` names.
        options: the options; `data` is replaced if the text is a path or the id of a dataset.
        attention_mask: 1 for a token and 0 for padding, for token ids.

    Returns:
        The options, and the text; None if `options.data` names it.

    Raises:
        PlanError: it is nothing of these.
        SourceError: a dataset of several splits does not have `options.split`.
    """
    has_splits = isinstance(text, Mapping) and _is_dataset(text)
    if has_splits:
        text = choose_split(text, options.split, "the dataset")
    if (isinstance(text, np.ndarray) or _is_pandas(text, "Series")) and text.dtype.kind not in "iub":
        text = list(text)
    if _is_pandas(text, "DataFrame"):
        text = _rows_of_table(text, options.column)
    elif _is_dataset(text) and _holds_tokens(text, options.column):
        text = {name: text[name] for name in ("input_ids", "attention_mask") if name in text.column_names}
    if isinstance(text, Mapping) and "input_ids" in text:
        text, attention_mask = _padded(text["input_ids"], text.get("attention_mask"), attention_mask)
    has_tokens = isinstance(text, Mapping) or not _is_text(text)
    if text is not None:
        options.refuse(["data"], "names a text, and another text is given; give one of them")
    if has_tokens:
        options.refuse(TEXT_OPTIONS, "is for texts, and token ids are given; cut or shuffle them before")
    elif attention_mask is not None:
        raise PlanError("attention_mask is for token ids, and a text is given")
    if text is None:
        return options, None
    if not isinstance(text, str | os.PathLike):
        options.refuse(["lines"], "is for text files")
        options.refuse(["split"] if not has_splits else [], "is for a dataset of several splits")
    if isinstance(text, str | os.PathLike):
        if isinstance(text, str) and ("\n" in text or (" " in text.strip() and not Path(text).expanduser().exists())):
            raise PlanError(
                f"a string names a file, a directory, a dataset or {PYDOC!r}, and {text[:40]!r} is none of them; "
                "give texts as a list of strings"
            )
        return replace(options, data=str(text)), None
    if _is_dataset(text):
        return options, GivenText(documents=text, pack=True, is_finite=hasattr(text, "__len__"))
    if as_messages(text) is not None:
        return options, GivenText(documents=[text])
    if isinstance(text, Sequence) and any(map(_is_document, text)):
        if wrong := next((item for item in text if not _is_document(item)), None):
            raise PlanError(f"a list of texts holds {wrong!r}, which is no text")
        return options, GivenText(documents=list(text))
    if isinstance(text, torch.Tensor) or hasattr(text, "__array__") or _is_list(text):
        return options, GivenText(as_tokens(text, attention_mask), masked=attention_mask is not None)
    raise PlanError(
        "text is given as token ids, a tokenizer's output, a list of strings, a dataset, a path or the id of a "
        f"dataset, not as {type(text).__name__}"
    )


TEXT_OPTIONS = ("split", "column", "tokens", "context", "pack", "lines", "bos", "shuffle", "seed")
NOT_FOR_TASKS = ("data", *TEXT_OPTIONS, "until", "confidence", "read", "per_token", "propagation", "tails")
"""Options that say which text is measured, or how much of it."""


def _is_text(text: Any) -> bool:
    """Return whether this is a text or names one, and is not token ids."""
    if text is None or isinstance(text, str | os.PathLike) or _is_dataset(text):
        return True
    return _is_list(text) and (as_messages(text) is not None or any(map(_is_document, text)))


def _is_document(item: Any) -> bool:
    """Return whether this is a text or a conversation."""
    return isinstance(item, str) or as_messages(item) is not None


def _is_list(text: Any) -> bool:
    return isinstance(text, Sequence) and not isinstance(text, bytes | bytearray | memoryview)


def _is_pandas(text: Any, kind: str) -> bool:
    """Return whether this is an object of a class of pandas; if nobody has imported pandas, it is not."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(text, getattr(pandas, kind))


def _is_dataset(text: Any) -> bool:
    """Return whether this is a dataset, in memory or streamed."""
    return hasattr(text, "column_names")


def _holds_tokens(dataset: Any, column: str | None) -> bool:
    """Return whether a dataset in memory has a tokenizer's columns and not the column of text."""
    names = dataset.column_names or ()
    return hasattr(dataset, "__len__") and "input_ids" in names and find_column(names, column) is None


def _rows_of_table(table: pd.DataFrame, column: str | None) -> Any:
    """Return the texts or conversations of a pandas table, or a tokenizer's columns."""
    if chosen := find_column(table, column):
        return [item.tolist() if isinstance(item, np.ndarray) else item for item in table[chosen]]
    if "input_ids" in table:
        return {name: table[name].tolist() for name in ("input_ids", "attention_mask") if name in table}
    raise PlanError(missing_column("the table", table, column))


def _padded(ids: Any, own_mask: Any, mask: Any) -> tuple[Any, Any]:
    """Return a tokenizer's token ids and their mask, (sequences, length); pad sequences that have several lengths.

    Args:
        ids: token ids, of one sequence or of several.
        own_mask: the tokenizer's mask; None if it gave none.
        mask: the caller's mask, which is used instead; None if there is none.
    """
    own_mask = own_mask if mask is None else mask
    if hasattr(ids, "tolist"):  # a tensor or an array
        is_single = len(ids.shape) == 1
    else:
        ids = [row.tolist() if hasattr(row, "tolist") else row for row in ids]
        is_single = all(isinstance(item, int) for item in ids)
    if is_single:
        return [ids], None if own_mask is None else [own_mask]
    if hasattr(ids, "tolist") or len(lengths := {len(row) for row in ids}) < 2:
        return ids, own_mask
    masks = [[1] * len(row) for row in ids] if own_mask is None else [list(row) for row in own_mask]
    longest = max(lengths)
    return [[*row, *[0] * (longest - len(row))] for row in ids], [[*row, *[0] * (longest - len(row))] for row in masks]


def text_request(model: Any, options: RunOptions, positions: int | None, given: GivenText | None = None) -> TextRequest:
    """Return the text to read, with defaults for the options that are not set.

    Args:
        model: the model's name; the models that packages contain, and edited copies of them, have a text of their own.
        options: the options.
        positions: the model's largest number of positions; None if it is not known.
        given: text that was given from Python.

    Raises:
        PlanError: the data's name is empty, or the context is larger than the model's number of positions.
    """
    if options.data == "":
        raise PlanError(f"`data` is empty: name a file, a directory, a Hub dataset or {PYDOC}")
    documents = None if given is None else given.documents
    data = options.data or (PYDOC if isinstance(model, str) and is_of_package(model) else PILE)
    if given is not None:
        data = _GIVEN_TOKENS if given.tokens is not None else _GIVEN_TEXTS if given.tasks is None else str(given.tasks)
    is_small = data == PYDOC
    context = options.context
    if context is None:
        context = min(_EMBEDDED_CONTEXT if is_small else _CONTEXT, positions or _CONTEXT)
    elif positions is not None and context > positions:
        raise PlanError(f"`context` {context} is more than the model's {positions} positions; give at most {positions}")
    default = _EMBEDDED_TOKENS if is_small else _TOKENS
    if documents is not None and given is not None and given.is_finite:
        default = str(ALL)
    tokens = parse_count(str(default if options.tokens is None else options.tokens))
    pack = options.pack
    if pack is None:
        pack = not options.lines if given is None else given.pack
    sampling = {name: getattr(options, name) for name in ("split", "column", "shuffle", "seed", "lines")}
    bos = False if given is not None and given.documents is None else parse_bos(options.bos)
    return TextRequest(data, tokens, context, pack=pack, bos=bos, documents=documents, **sampling)


def given_tokens(given: GivenText, padding: Padding) -> TokenizedText:
    """Return tokens that were given from Python as a text.

    Args:
        given: the tokens.
        padding: the model's and the tokenizer's padding.

    Raises:
        PlanError: sequences are padded, and there is no mask.
    """
    assert given.tokens is not None
    ids, mask = given.tokens
    notes = []
    if not given.masked:
        counts = {token: _count_padded(ids, token) for token in (*padding.tokens, *padding.ends)}
        for token, (once, twice) in counts.items():
            # One such token at an end may be text. Two of them are padding; two end-of-text tokens in every sequence
            # may be how the text was made.
            if twice and (token not in padding.ends or twice < len(ids)):
                raise PlanError(
                    f"{twice} of {len(ids)} sequences begin or end with the padding token ({token}), which "
                    "would be counted as text; give `attention_mask` (or the tokenizer's whole output); all ones count "
                    "them"
                )
            if once and token in padding.tokens and token not in padding.ends:
                notes.append(
                    f"{once} of {len(ids)} sequences begin or end with one padding token ({token}), which is counted "
                    "as text; if it is padding, give `attention_mask`"
                )
    return TokenizedText(ids, mask, fingerprint_of(ids, mask), tuple(notes))


def _count_padded(ids: torch.Tensor, token: int) -> tuple[int, int]:
    """Return how many sequences begin or end with a token, and how many with two of it, being longer than that."""
    is_token = ids == token
    once = is_token[:, 0] | is_token[:, -1]
    twice = is_token[:, :2].all(-1) | is_token[:, -2:].all(-1)
    return int(once.sum()), int(twice.sum()) if ids.shape[1] > 2 else 0
