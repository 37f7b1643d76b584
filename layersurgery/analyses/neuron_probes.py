"""Fit linear probes on prediction and suppression neurons: does the next token belong to a class?

See figures 10 and 16 of the paper.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ..models.anatomy import Anatomy
from ..models.anatomy import anatomy as find_anatomy
from ..runs.first_token import bos_token_id, uses_bos
from ..runtime.block_runner import BlockRunner
from ..runtime.neuron_activations import projections
from ..sweeps.neuron_scores import PREDICTION, SUPPRESSION, OnLayer, neuron_scores
from .logistic_probe import ProbeData, interval, is_chance
from .logit_effects import RANDOM, select_neurons
from .token_classes import BalancedWindows, TokenClass, find_balanced_windows, token_class
from .window_activations import record_windows
from .windows import OnWindows, prepend_token

NEURONS, SHUFFLES = 32, 20
BOTH, TOP_TOKEN, PROBABILITY, MAJORITY, SHUFFLED = (
    "both",
    "model, top token",
    "model, probability",
    "majority",
    "shuffled labels",
)
KINDS = {
    PREDICTION: "prediction neurons",
    SUPPRESSION: "suppression neurons",
    BOTH: "neurons of both kinds",
    RANDOM: "random neurons of the same blocks",
}


@dataclass(frozen=True, slots=True)
class Probe:
    """How well a few neurons, and the model itself, predict whether the next token is of a class, on held-out windows.

    Attributes:
        probes: one row for each probe: probe ("prediction", "suppression", "both", "random": neurons; "model, top
            token"; "model, probability": log odds of the class, with a threshold from the training half; "majority";
            "shuffled labels": the 32 best neurons, selected, trained and tested on shuffled labels, 20 times), k
            (number of neurons), accuracy (held out, 0..1) with its 95 % interval low to high (Wilson), on_class and
            on_rest (accuracy on the windows of each class), train_accuracy, training and held_out (numbers of windows;
            for shuffled labels, the sums over all repetitions).
        single_neurons: one row for each neuron: layer, weight, neuron, kind, rank (within its kind, by accuracy on the
            training half, then by effect), effect (on the logits of the class minus on those of the rest), slope (of
            the probe's log odds, per standard deviation), accuracy, low, high, train_accuracy.
        top_k: one row for each kind and k, for a probe on the k best-ranked neurons: kind, k, accuracy, low, high,
            train_accuracy.
        effects: histograms of W_U w_out for up to 36 neurons with the largest effects: layer, neuron, kind, rank,
            effect, low, high, class_tokens, rest_tokens.
        windows: the windows that were measured.
        tokens: the class of tokens.
        skipped: neurons that could not be read, with the reasons.
    """

    probes: pd.DataFrame
    single_neurons: pd.DataFrame
    top_k: pd.DataFrame
    effects: pd.DataFrame
    windows: BalancedWindows
    tokens: TokenClass
    skipped: dict[str, str]


def probe(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    *,
    suffix: str | None = None,
    regex: str | None = None,
    tokens: int = 1_000_000,
    samples: int = 1000,
    seed: int = 0,
    bos: bool | str = "auto",
    batch_size: int = 128,
    blocks: str | None = None,
    anatomy: Anatomy | None = None,
    progress: OnWindows | None = None,
) -> Probe:
    """Train logistic regressions on prediction and suppression neurons to predict the class of the next token.

    The neurons are the 32 of each kind with the largest effect on the class, computed from their weights. Their
    activations are taken at the last of 24 tokens. One half of the text is for training, the other half is held out.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokenizer: the model's own tokenizer.
        documents: texts.
        suffix: end of the tokens of the class, ignoring white space and case; "ing" if neither it nor `regex` is given.
        regex: regular expression that is found in the texts of the tokens of the class.
        tokens: maximum number of tokens to search for windows.
        samples: maximum number of windows of each class; half of them are for training.
        seed: random seed for the windows, the random neurons and the shuffled labels.
        bos: put the beginning-of-text token before every window: True, False, or "auto" for what the tokenizer does.
        batch_size: windows per batch.
        blocks: path of the list of blocks, if it cannot be found automatically.
        anatomy: the model's anatomy; found if not given.
        progress: called with the number of windows done and the total.

    Raises:
        PlanError: the class is not valid, or it has no token or every token.
        MeasurementError: too little text (the message says how much is needed), or activations that are NaN or
            infinite.
        UnsupportedEditError: no neurons of either kind can be read.

    Example:
        >>> from pydoc_data.topics import topics
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> found = ls.analyses.probe(model, tokenizer, topics.values(), suffix="ing", samples=200)
        >>> found.probes[["probe", "k", "accuracy"]].shape
        (12, 3)
    """
    chosen = token_class(tokenizer, suffix=suffix, regex=regex)
    windows = find_balanced_windows(documents, tokenizer, chosen, tokens=tokens, samples=samples, seed=seed)
    first = bos_token_id(tokenizer) if uses_bos(bos, tokenizer) else None
    anatomy = anatomy or find_anatomy(model, blocks=blocks)
    return fit_probes(
        model, windows, chosen, first=first, seed=seed, batch_size=batch_size, anatomy=anatomy, progress=progress
    )


def fit_probes(
    model: nn.Module,
    windows: BalancedWindows,
    chosen: TokenClass,
    *,
    first: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    anatomy: Anatomy,
    on_layer: OnLayer | None = None,
    progress: OnWindows | None = None,
) -> Probe:
    """Fit the probes on given windows.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        windows: windows of both classes.
        chosen: the class of tokens.
        first: token to put before each window; none if not given.
        seed: random seed for the random neurons and the shuffled labels.
        batch_size: windows per batch.
        anatomy: the model's anatomy.
        on_layer: called after the neurons of each block are scored, with the number of blocks done and the total.
        progress: called with the number of windows done and the total.

    Raises:
        MeasurementError: activations or logits that are NaN or infinite.
        UnsupportedEditError: no neurons of either kind can be read.
    """
    runner = BlockRunner(model, anatomy)
    readable, skipped = projections(runner)
    scores = neuron_scores(model, anatomy=anatomy, progress=on_layer)
    neurons, effects = select_neurons(runner, scores, readable, chosen, count=NEURONS, seed=seed)
    ids = prepend_token(windows.ids, first)
    x_WN, top_W, odds_W = record_windows(runner, ids, neurons, readable, chosen, batch_size, progress)
    data = ProbeData(x_WN, windows.inside, windows.held_out, seed)
    single_neurons, orders = _probe_single_neurons(data, neurons)
    probes, top_k = _compare_probes(data, neurons, orders, top_W, odds_W)
    single_neurons = _rank_neurons(single_neurons, orders)
    for frame in (probes, single_neurons, top_k, effects):
        frame.insert(0, "model", type(model).__name__)
    return Probe(probes, single_neurons, top_k, effects, windows, chosen, skipped)


def describe_probes(probes: pd.DataFrame) -> str:
    """Describe the held-out accuracies in a few sentences."""
    neurons = probes[probes.probe.isin(KINDS)]
    best = neurons.loc[neurons.groupby("probe", sort=False).k.idxmax()]
    accuracies = [f"{_percent(row)} with {row.k} {KINDS[row.probe]}" for row in best.itertuples()]
    model, probability, shuffled = (probes[probes.probe == name].iloc[0] for name in (TOP_TOKEN, PROBABILITY, SHUFFLED))
    verdict = (
        "consistent with chance"
        if is_chance(shuffled.accuracy, shuffled.held_out)
        else "not chance, so the training half and the held-out half share information"
    )
    return (
        f"Held-out accuracy (95 %): {', '.join(accuracies)}. The model's own predictions: {_percent(model)} by its top "
        f"token, {_percent(probability)} by the probability that it gives to the class. Shuffled labels: "
        f"{_percent(shuffled)}, {verdict}."
    )


def _percent(row: Any) -> str:
    return f"{100 * row.accuracy:.1f} % ({100 * row.low:.0f}-{100 * row.high:.0f})"


def _probe_single_neurons(data: ProbeData, neurons: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, list[int]]]:
    """Fit a probe on each neuron.

    Returns:
        The table of neurons, and the columns of each kind, ordered by accuracy on the training half.
    """
    rows = []
    for column in range(len(neurons)):
        right, slope = data.fit([column])
        rows.append({"slope": slope, **data.score(right)})
    single_neurons = pd.concat([neurons, pd.DataFrame(rows)], axis=1)
    orders = {}
    for kind in KINDS:
        of_kind = single_neurons[single_neurons.kind != RANDOM if kind == BOTH else single_neurons.kind == kind]
        order = of_kind.index[np.lexsort([-of_kind.effect.abs(), -of_kind.train_accuracy])].tolist()
        if order:
            orders[kind] = order
    return single_neurons, orders


def _rank_neurons(single_neurons: pd.DataFrame, orders: dict[str, list[int]]) -> pd.DataFrame:
    """Return the table of neurons, the best of each kind first."""
    kinds = [
        single_neurons.loc[order].assign(rank=range(1, len(order) + 1))
        for kind, order in orders.items()
        if kind != BOTH
    ]
    ranked = pd.concat(kinds, ignore_index=True).astype(dict.fromkeys(("layer", "neuron", "rank"), "Int64"))
    return ranked[
        ["layer", "weight", "neuron", "kind", "rank", "effect", "slope", "accuracy", "low", "high", "train_accuracy"]
    ]


def _compare_probes(
    data: ProbeData, neurons: pd.DataFrame, orders: dict[str, list[int]], top_W: np.ndarray, odds_W: np.ndarray
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Build the table of all probes, and the table of probes on the k best neurons."""
    top_k, rows = [], []
    for kind, order in orders.items():
        for k in range(1, len(order) + 1):
            right, _ = data.fit(order[:k])
            top_k.append({"kind": kind, "k": k, **data.score(right)})
            if k in (1, len(order)):
                rows.append(data.row(kind, right, k))
    rows.append(data.row(TOP_TOKEN, top_W == data.inside))
    rows.append(data.row(PROBABILITY, replace(data, x_WN=odds_W[:, None]).fit([0])[0]))
    majority_label = data.inside[~data.held_out].mean() >= 0.5
    rows.append(data.row(MAJORITY, data.inside == majority_label))
    rows.append(_probe_shuffled_labels(data, neurons))
    integers = dict.fromkeys(("k", "training", "held_out"), "Int64")
    return pd.DataFrame(rows).astype(integers), pd.DataFrame(top_k).astype({"k": "Int64"})


def _probe_shuffled_labels(data: ProbeData, neurons: pd.DataFrame) -> dict[str, Any]:
    """Return the row for shuffled labels, where there is nothing to find.

    The best neurons are selected, trained and tested on shuffled labels.
    """
    rng = np.random.default_rng(data.seed)
    rows = []
    for _ in range(SHUFFLES):
        shuffled = data.shuffled(rng)
        orders = _probe_single_neurons(shuffled, neurons)[1]
        best = orders[BOTH][:NEURONS]
        rows.append(shuffled.row(SHUFFLED, shuffled.fit(best)[0], len(best)))
    held_out, training = (sum(row[name] for row in rows) for name in ("held_out", "training"))
    right = sum(round(row["accuracy"] * row["held_out"]) for row in rows)
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("train_accuracy", "on_class", "on_rest")}
    return {**rows[0], **interval(right, held_out), **means, "training": training, "held_out": held_out}
