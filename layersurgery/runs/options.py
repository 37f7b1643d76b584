"""Define the options of measurements on text: the text, where the model runs, and how it runs."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..plans.visit import as_int
from .text_request import DEFAULT_SPLIT

if TYPE_CHECKING:
    from ..sweeps.precision import Precision
    from ..sweeps.read_positions import ReadPositions

NOT_FOR_COMPARE = ("until", "confidence", "read", "propagation", "means")
"""Options that only sweeps take."""
SWEEP_ONLY = (*NOT_FOR_COMPARE, "sources", "tails")
"""Options that only sweeps and, some of them, compare take."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Set how a measurement is done: text, devices and order. The command line has the same options.

    Attributes:
        data: the text: "pydoc" (Python's own help), a file, a directory of files, a saved dataset, or a Hub dataset;
            see `runs.text_request.TextRequest`. By default the Pile, and pydoc for the bundled model.
        split: split of a dataset that has several, on the Hub, saved or given.
        column: the column that contains the texts, or conversations as lists of messages, for tables. By default text,
            or else messages, conversations or conversation.
        tokens: number of tokens, such as 4096, "100k" or "1M"; rounded up to whole sequences. By default 1M, and 4096
            for pydoc.
        context: tokens of one sequence. By default 2048 or the model's maximum, and 512 for pydoc.
        pack: join documents and cut them into sequences of one length; otherwise each document is one sequence. By
            default True, but False for a list of strings and with `lines`.
        lines: each line of a text file is one document.
        bos: begin every sequence with the beginning-of-text token: "yes" or True, "no" or False, or "auto" for what the
            tokenizer itself does with plain text (Llama, Gemma: yes; GPT-2, Qwen: no).
        shuffle: take sequences in random order. By default True for Hub datasets only.
        seed: seed for shuffling.
        tokenizer: a tokenizer, or the name of a model to take it from; by default the model's own.
        until: for sweeps: measure each edit until its metrics are known this precisely, such as "agreement=0.5pt,kl=2%"
            (see `sweeps.precision.Precision.parse`); then `tokens` is the most that is used.
        confidence: for `until`: probability that an interval holds the true mean.
        read: read predictions at a random share of each sequence's positions ("1/4"), or at a number of them (64).
        sources: for sweeps and compare: other models, or their names ("MODEL" or "MODEL@REVISION"), by the names that
            edits take blocks from, such as {"base": "org/base"}.
        propagation: for sweeps: also measure how much what later blocks add changes after each edit.
        means: for sweeps with edits that add means: the means of the model's branches (`measure_means`), or their file.
            By default they are measured first, on the same text without the first token of each sequence.
        tails: for sweeps and compare: also measure what quantizations are judged by: quantiles of KL over tokens, the
            change of the true token's probability, the overlap of the five most likely tokens, and the calibration
            error.
        batch_size: sequences in a batch; by default chosen from the free memory.
        dtype: data type of the weights: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own (on a CPU,
            float16 becomes float32).
        quantize: quantize the linear layers while the model is loaded, with bitsandbytes: "nf4" (4 bits) or "int8". The
            unembedding keeps its data type, in which 4-bit weights are multiplied, too.
        device: device to run on: "cpu", "cuda", "cuda:1"; by default CUDA if it is available.
        device_map: spread the model over devices, main memory and disk: "auto", "balanced", "sequential", or a map.
        max_memory: memory limit of each device for `device_map`, such as "0=70GiB,cpu=100GiB".
        offload_folder: directory for offloaded weights; by default a temporary one.
        schedule: order of computation: "depth-first" or "layer-major" (each block's weights are loaded once per batch).
            The results are the same. By default layer-major if weights are offloaded.
        compile: compile the blocks with torch.
        per_token: also write every metric of every token.
        track: log the run to experiment trackers: "tensorboard", "trackio" or "wandb", or several with commas between.
        revision: branch, tag or commit of the model on the Hub.
        blocks: path of the list of decoder blocks, if it cannot be found automatically.
        trust_remote_code: run the code that comes with a model and its tokenizer; without it, it is never run.
    """

    data: str | None = None
    split: str = DEFAULT_SPLIT
    column: str | None = None
    tokens: str | int | None = None
    context: int | None = None
    pack: bool | None = None
    lines: bool = False
    bos: bool | str = "auto"
    shuffle: bool | None = None
    seed: int = 0
    tokenizer: Any = None
    until: Any = None
    confidence: float = 0.95
    read: str | float | None = None
    propagation: bool = False
    sources: Any = None
    means: Any = None
    tails: bool = False
    batch_size: int | None = None
    dtype: str = "auto"
    quantize: str | None = None
    device: str | None = None
    device_map: Any = None
    max_memory: Any = None
    offload_folder: str | os.PathLike[str] | None = None
    schedule: str | None = None
    compile: bool = False
    per_token: bool = False
    track: Any = None
    revision: str | None = None
    blocks: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, values: dict[str, Any]) -> RunOptions:
        """Make the options from keyword arguments.

        Raises:
            PlanError: an option does not exist (the error names the nearest one), or has a wrong value.
        """
        refuse_unknown(values, [field.name for field in fields(cls)])
        values = {name: value if (number := as_int(value)) is None else number for name, value in values.items()}
        for name, least in (("batch_size", 1), ("context", 2), ("seed", 0)):
            number = values.get(name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
                raise PlanError(f"`{name}` is a whole number of at least {least}, not {number!r}")
        return cls(**values)

    @property
    def precision(self) -> Precision | None:
        """Return the precision at which an edit is finished; None to measure all text.

        Raises:
            PlanError: it cannot be understood, or excludes another option.
        """
        if self.until is None:
            self.refuse(["confidence"], "has an effect only with `until`")
            return None
        from ..sweeps.precision import Precision

        self.refuse(["per_token", "propagation"], "needs all text for every edit; leave `until` out")
        return Precision.parse(self.until, self.confidence)

    @property
    def measures_propagation(self) -> bool:
        """Return whether propagation is measured.

        Raises:
            PlanError: it excludes another option.
        """
        if self.propagation:
            self.refuse(["compile"], "hides what the parts of a block add; leave `compile` or `propagation` out")
        return self.propagation

    @property
    def read_positions(self) -> ReadPositions | None:
        """Return the positions at which predictions are read; None for all.

        Raises:
            PlanError: it cannot be understood, or excludes another option.
        """
        if self.read is None:
            return None
        from ..sweeps.read_positions import ReadPositions

        self.refuse(["per_token", "tails"], "needs every position; leave `read` out")
        return ReadPositions.parse(self.read, self.seed)

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Refuse options that have no effect here.

        Raises:
            PlanError: one of them is not its default; `why` ends the sentence.
        """
        for name in self.given():
            if name in names:
                raise PlanError(f"`{name}` {why}")

    def without(self, names: Iterable[str]) -> RunOptions:
        """Return these options with the defaults of some."""
        defaults: dict[str, Any] = {field.name: field.default for field in fields(self) if field.name in names}
        return replace(self, **defaults)

    def given(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value is not default and value != default}


def refuse_unknown(given: Iterable[str], names: Sequence[str]) -> None:
    """Refuse options that do not exist.

    Raises:
        PlanError: an option does not exist; the error names the nearest one.
    """
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(names)}"
            raise PlanError(f"there is no option {name!r}; {hint}")
