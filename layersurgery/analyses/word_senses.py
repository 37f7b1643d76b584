"""Probe each layer for the sense of a word: does a word mean the same in two sentences (Word in Context)?

The later version of the paper has such a probe, but does not publish its protocol. This one is the project's own.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..errors import MeasurementError
from ..models.anatomy import Anatomy
from ..models.anatomy import anatomy as find_anatomy
from ..models.block_list import text_config
from ..runs.first_token import bos_token_id, uses_bos
from ..runs.frames import ResultFrame, as_result
from ..runs.requests import config_limits
from ..runs.run_directory import Run
from ..runs.single_step import TablesAndFacts, run_once
from ..runs.text_request import DEFAULT_SPLIT
from ..runtime.block_runner import BlockRunner
from ..runtime.inputs import model_inputs
from ..sweeps.neuron_scores import OnLayer
from .logistic_probe import ProbeData
from .windows import OnWindows
from .word_pairs import EncodedPairs, WordPair, encode_pairs, read_pairs

if TYPE_CHECKING:
    from ..runs.session import ModelSession

FOLDS = 5
EMBEDDINGS = -1
"""Number in the column `layer` for the stream before the first block."""
_BATCH = 32
Pairs = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


def wic(
    model: nn.Module,
    tokenizer: Any,
    pairs: Pairs,
    *,
    split: str = DEFAULT_SPLIT,
    samples: int | None = None,
    seed: int = 0,
    bos: bool | str = "auto",
    batch_size: int = _BATCH,
    blocks: str | None = None,
    anatomy: Anatomy | None = None,
    on_layer: OnLayer | None = None,
    progress: OnWindows | None = None,
) -> ResultFrame:
    """Predict by layer whether a word has the same meaning in two sentences, from the residual stream at the word.

    The stream is read after each block at the last token of the word in each sentence. Features are the absolute
    difference and the product of both streams, number by number; they do not depend on the order of the sentences. They
    are standardized, and a logistic regression with a fixed penalty is cross-validated in five folds. All pairs of a
    word are in one fold, so no word that a probe is tested on was in its training.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokenizer: the model's own fast tokenizer.
        pairs: a file of the public WiC data (`train.data.txt`, with `train.gold.txt` next to it), a table or rows with
            the columns of SuperGLUE's WiC, or the id of a Hub dataset; see `analyses.word_pairs.read_pairs`.
        split: split of the Hub dataset.
        samples: number of pairs to use, chosen at random; by default all.
        seed: random seed of the choice, of the folds and of the shuffled labels.
        bos: put the beginning-of-text token before every sentence: True, False, or "auto" for what the tokenizer does.
        batch_size: sentences per batch.
        blocks: path of the list of blocks, if it cannot be found automatically.
        anatomy: the model's anatomy; found if not given.
        on_layer: called with the number of streams that probes were fitted on, and the total.
        progress: called with the number of sentences done and the total.

    Returns:
        One row for each layer: layer (-1 for the embeddings, before the first block), relative_depth, accuracy (on the
        pairs of the held-out folds, 0..1) with its standard error (clustered by word) and 95 % interval
        (accuracy_low, accuracy_high), shuffled (the same with shuffled labels), its standard error and interval, and
        majority (share of the more frequent label).

    Raises:
        SourceError: the pairs cannot be read, or the tokenizer cannot give positions.
        MeasurementError: too few pairs or words, or streams that are NaN or infinite.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> rows = [
        ...     {"word": word, "idx": "1-1", "sentence1": f"my {word}", "sentence2": f"{other} {word}", "label": same}
        ...     for word in ("bank", "note", "bar", "bat", "ring")
        ...     for other, same in (("his", True), ("to", False))
        ... ]
        >>> ls.analyses.wic(model, tokenizer, rows)[["layer", "accuracy"]].shape
        (31, 2)
    """
    encoded = encode_pairs(
        _choose(read_pairs(pairs, split), samples, seed),
        tokenizer,
        bos_token_id(tokenizer) if uses_bos(bos, tokenizer) else None,
        config_limits(text_config(model))[0],
    )
    runner = BlockRunner(model, anatomy or find_anatomy(model, blocks=blocks))
    frame = probe_pairs(runner, encoded, seed, batch_size, on_layer, progress)
    frame.insert(0, "model", type(model).__name__)
    return as_result(frame, "wic", _caption(encoded, pairs))


def run_wic(
    session: ModelSession,
    directory: Path,
    *,
    pairs: Pairs,
    analysis: str = "wic",
    overwrite: bool = False,
    samples: int | None = None,
) -> Run:
    """Probe each layer for the sense of a word, or use the finished run in the directory.

    Args:
        session: the model; its text is not read.
        directory: where to write.
        pairs: the pairs of sentences, as `wic` takes them.
        analysis: the analysis's name.
        overwrite: replace what another run has left in the directory.
        samples: number of pairs to use, chosen at random; by default all.
    """
    options, texts, reporter = session.options, session.texts, session.reporter
    _ = session.model.placement  # refuses a device that cannot be had before anything is read
    name = str(pairs) if isinstance(pairs, str | os.PathLike) else "the given pairs"
    with reporter.status(f"Reading pairs of sentences: {name}"):
        first = bos_token_id(texts.tokenizer) if texts.request.bos else None
        found = _choose(read_pairs(pairs, options.split), samples, options.seed)
        encoded = encode_pairs(found, texts.tokenizer, first, session.model.positions)
    texts.check_vocabulary(max(map(max, encoded.ids)))
    make_folds(encoded, options.seed)  # refuses too few pairs before the model is loaded
    facts = encoded.facts
    begin = f"; each sentence begins with {texts.tokenizer.bos_token}" if texts.request.bos else ""
    reporter.log(
        f"{facts['pairs']:,} pairs of sentences for {facts['words']:,} words from {name}, {facts['same']:,} with the "
        f"same meaning{begin}"
    )

    def make() -> TablesAndFacts:
        model = session.model.load()
        runner = BlockRunner(model, find_anatomy(model, blocks=options.blocks))
        with reporter.count("sentences") as on_sentences, reporter.count("layers' probes") as on_layer:
            frame = probe_pairs(runner, encoded, options.seed, options.batch_size or _BATCH, on_layer, on_sentences)
        frame.insert(0, "model", session.model.label)
        return {analysis: frame}, {
            "pairs": facts, "summary": describe_wic(frame), "caption": _caption(encoded, pairs),
        }  # fmt: skip

    data = {"data": name, "split": options.split, "samples": samples, "seed": options.seed, "bos": texts.request.bos}
    arguments = session.arguments(
        {
            "analysis": analysis,
            "pairs": {**data, "tokenizer": texts.tokenizer_name, "fingerprint": encoded.fingerprint},
        }
    )
    return run_once(directory, arguments, reporter, make, overwrite=overwrite, caption=_caption(encoded, pairs))


def _choose(pairs: list[WordPair], samples: int | None, seed: int) -> list[WordPair]:
    if samples is None or samples >= len(pairs):
        return pairs
    return [pairs[index] for index in sorted(random.Random(seed).sample(range(len(pairs)), samples))]


def _caption(encoded: EncodedPairs, pairs: Pairs) -> str:
    facts, name = encoded.facts, "the given pairs"
    if isinstance(pairs, str | os.PathLike):
        name = Path(pairs).name if Path(pairs).exists() else str(pairs)
    return f"{facts['pairs']:,} pairs of sentences for {facts['words']:,} words, from {name}"


def probe_pairs(
    runner: BlockRunner,
    encoded: EncodedPairs,
    seed: int,
    batch_size: int,
    on_layer: OnLayer | None,
    progress: OnWindows | None,
) -> pd.DataFrame:
    """Make the table of `wic`, without the model's name.

    Raises:
        MeasurementError: too few pairs or words, or streams that are NaN or infinite.
    """
    held_out = make_folds(encoded, seed)
    streams = record_words(runner, encoded, batch_size, progress)
    shuffled = np.random.default_rng(seed).permutation(encoded.same)
    share, last = float(encoded.same.mean()), max(1, runner.depth - 1)
    rows = []
    for number, stream in enumerate(streams):
        layer = number + EMBEDDINGS
        features = pair_features(stream)
        scores = {
            name: score_by_word(cross_validate(features, labels, held_out, seed), encoded.words, name)
            for name, labels in (("accuracy", encoded.same), ("shuffled", shuffled))
        }
        rows.append(
            {
                "layer": layer,
                "relative_depth": layer / last,
                **scores["accuracy"],
                **scores["shuffled"],
                "majority": max(share, 1 - share),
            }
        )
        if on_layer is not None:
            on_layer(number + 1, len(streams))
    return pd.DataFrame(rows)


def make_folds(encoded: EncodedPairs, seed: int) -> list[np.ndarray]:
    """Return which pairs are held out in each fold; all pairs of a word are in the same fold.

    Raises:
        MeasurementError: too few pairs or words, or a fold without pairs of both kinds to train on.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    facts = encoded.facts
    folds = []
    least = min(facts["words"], facts["same"], facts["pairs"] - facts["same"])
    if least >= FOLDS:
        splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        for _, test in splitter.split(encoded.same, encoded.same, encoded.words):
            folds.append(np.isin(np.arange(len(encoded.same)), test))
    if not folds or any(not held.any() or len(set(encoded.same[~held])) < 2 for held in folds):
        raise MeasurementError(
            f"{facts['pairs']} pairs for {facts['words']} words, {facts['same']} of them with the same meaning, are "
            f"too few for {FOLDS} folds, which need words of their own and pairs of both kinds to train on; give more"
        )
    return folds


def record_words(runner: BlockRunner, encoded: EncodedPairs, batch_size: int, progress: OnWindows | None) -> np.ndarray:
    """Return the streams at the words: before the first block and after each, (depth + 1, pairs, 2, width), float32.

    Raises:
        MeasurementError: streams that are NaN or infinite.
    """
    depth, count = runner.depth, len(encoded.ids)
    streams = np.empty((depth + 1, count, runner.width), np.float32)
    lengths = np.array([len(sentence) for sentence in encoded.ids])
    done = 0
    # Sentences of one length need no padding, which some models would notice.
    for length in np.unique(lengths):
        of_length = np.flatnonzero(lengths == length)
        for start in range(0, len(of_length), batch_size):
            batch = of_length[start : start + batch_size]
            ids = torch.tensor([encoded.ids[index] for index in batch])
            with runner.inference_mode():
                record = runner.record(model_inputs(runner.model, ids, torch.ones_like(ids)), range(depth + 1))
            positions = torch.tensor([encoded.positions[index] for index in batch])
            for number in range(depth + 1):
                state = record.states[number]
                rows = torch.arange(len(batch), device=state.device)
                streams[number, batch] = state[rows, positions.to(state.device)].float().cpu().numpy()
            done += len(batch)
            if progress is not None:
                progress(done, count)
    if not np.isfinite(streams).all():
        raise MeasurementError("residual streams are NaN or infinite; in half precision, try bfloat16 or float32")
    return streams.reshape(depth + 1, count // 2, 2, runner.width)


def pair_features(stream_P2C: np.ndarray) -> np.ndarray:
    """Return the absolute difference and the product of both streams of each pair, (pairs, 2 * width), float64.

    Example:
        >>> import numpy as np
        >>> from layersurgery.analyses.word_senses import pair_features
        >>> pair_features(np.array([[[1.0, 2.0], [3.0, -1.0]]])).tolist()
        [[2.0, 3.0, 3.0, -2.0]]
    """
    first, second = stream_P2C.astype(np.float64).transpose(1, 0, 2)
    return np.concatenate([np.abs(first - second), first * second], 1)


def cross_validate(features: np.ndarray, labels: np.ndarray, held_out: list[np.ndarray], seed: int) -> np.ndarray:
    """Tell for each pair whether the probe that was not trained on its fold predicts its label.

    The penalty makes the log odds of a standard normal feature vector have a prior variance of one, whatever the width:
    each weight has a prior variance of one divided by the number of features.
    """
    right = np.zeros(len(labels), bool)
    for held in held_out:
        right[held] = ProbeData(features, labels, held, seed, 1 / features.shape[1]).fit(slice(None))[0][held]
    return right


def score_by_word(right: np.ndarray, words: list[str], name: str = "accuracy") -> dict[str, float]:
    """Return the share of right answers, its standard error clustered by word, and its 95 % interval.

    Example:
        >>> import numpy as np
        >>> from layersurgery.analyses.word_senses import score_by_word
        >>> score_by_word(np.array([True, True, False, False]), ["a", "a", "b", "b"])["accuracy_sem"]
        0.5
    """
    from scipy.stats import t

    share = float(right.mean())
    sums = pd.Series(right - share).groupby(np.array(words)).sum().to_numpy(float)
    count = len(sums)
    error = math.sqrt(count / (count - 1) * float((sums**2).sum())) / len(right)
    half = float(t.ppf(0.975, count - 1)) * error
    ends = {f"{name}_low": max(0.0, share - half), f"{name}_high": min(1.0, share + half)}
    return {name: share, f"{name}_sem": error, **ends}


def describe_wic(frame: pd.DataFrame) -> str:
    """Describe where the sense of a word is known best, and what chance gives.

    Example:
        >>> import pandas as pd
        >>> from layersurgery.analyses.word_senses import describe_wic
        >>> scores = {"accuracy": [0.5, 0.7], "accuracy_low": [0.4, 0.6], "accuracy_high": [0.6, 0.8]}
        >>> describe_wic(
        ...     pd.DataFrame({"layer": [-1, 0], **scores, "shuffled": 0.5, "majority": 0.5})
        ... ).partition(". ")[0]
        'Whether a word means the same in both sentences is predicted best after block 0: 70.0 % of pairs (60-80)'
    """
    best = frame.loc[frame.accuracy.astype(float).idxmax()]
    embeddings = frame[frame.layer == EMBEDDINGS].iloc[0]
    where = "from the embeddings" if best.layer == EMBEDDINGS else f"after block {int(best.layer)}"
    return (
        f"Whether a word means the same in both sentences is predicted best {where}: {_percent(best)}. From the "
        f"embeddings: {_percent(embeddings)}. Always the more frequent answer: {100 * best.majority:.1f} %. Shuffled "
        f"labels: {100 * frame.shuffled.mean():.1f} % on average over all layers."
    )


def _percent(row: Any) -> str:
    return f"{100 * row.accuracy:.1f} % of pairs ({100 * row.accuracy_low:.0f}-{100 * row.accuracy_high:.0f})"
