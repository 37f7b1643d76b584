"""Linear probes on prediction and suppression neurons: does the next token belong to a class? Figures 10 and 16 of the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..errors import MeasurementError
from ..models.anatomy import Anatomy
from ..models.anatomy import anatomy as find_anatomy
from ..runs.text import bos_of
from ..runtime.block_runner import BlockRunner
from ..runtime.inputs import model_inputs
from ..runtime.neuron_activations import Projection, capture_neurons, projections
from ..runtime.unembedding import Readout, find_readout
from .logistic_probe import ProbeData, interval, is_chance
from .logit_effects import RANDOM, pad_to_vocabulary, select_neurons
from .prediction_neurons import PREDICTION, SUPPRESSION, neuron_scores
from .token_classes import BalancedWindows, TokenClass, find_balanced_windows, token_class

NEURONS, SHUFFLES = 32, 20
BOTH, TOP_TOKEN, PROBABILITY, MAJORITY, SHUFFLED = (
    "both",
    "model, top token",
    "model, probability",
    "majority",
    "shuffled labels",
)
KINDS = {
    PREDICTION: "prediction neurons", SUPPRESSION: "suppression neurons", BOTH: "of both kinds", RANDOM: "random ones of the same blocks",
}  # fmt: skip
_ROWS = 256
OnDone = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Probe:
    """How well a few neurons, and the model itself, tell whether the next token is of a class: on windows that nothing was trained on.

    Attributes:
        probes: one row for each way of telling: probe ("prediction", "suppression", "both", "random": neurons; "model, top token"; "model, probability":
            its logarithmic odds of the class, with a threshold from the training half; "majority"; "shuffled labels": the 32 best neurons,
            ordered, trained and judged on labels that are shuffled, 20 times), k (how many neurons), accuracy (held out; 0..1) with its 95 %
            interval low to high (Wilson), on_class and on_rest (the same of the windows of either class), train_accuracy, training and
            held_out (numbers of windows; of shuffled labels, those of all times together).
        single_neurons: one row for each neuron: layer, weight, neuron, kind, rank (within its kind, by accuracy on the training half, then by effect), effect
            (on the logits of the class, less on those of the rest), slope (of the probe's log odds, for one standard deviation), accuracy, low,
            high, train_accuracy.
        together: one row for each kind and k, the k neurons of the lowest rank together: kind, k, accuracy, low, high, train_accuracy.
        effects: histograms of W_U w_out for the up to 36 neurons of greatest effect: layer, neuron, kind, rank, effect, low, high, class_tokens,
            rest_tokens.
        windows: what was measured on.
        tokens: the class.
        skipped: neurons that could not be read, and why.
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
    bos: bool = False,
    batch_size: int = 128,
    blocks: str | None = None,
    anatomy: Anatomy | None = None,
    progress: OnDone | None = None,
) -> Probe:
    """Train logistic regressions on activations of prediction and suppression neurons to tell whether the next token is of a class.

    The neurons are the 32 of either kind with the greatest effect on the class, by their weights; their activations are those at the last of 24
    tokens. Half of the text is for training, the other half for judging.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokenizer: its own.
        documents: texts.
        suffix: of the tokens of the class, white space and capitals aside; "ing" if neither it nor `regex` is given.
        regex: that is found in the texts of the tokens of the class.
        tokens: how many to look through, at most.
        samples: windows of each class, at most, half of them to train on.
        seed: of their choice, of the random neurons and of the shuffled labels.
        bos: put the beginning-of-text token before every window.
        batch_size: windows at once.
        blocks: path of the list of blocks, where it cannot be found.
        anatomy: the model's, found if not given.
        progress: is called with the number of windows done and of all.

    Raises:
        PlanError: a class that cannot be meant, or that has no token or every one.
        MeasurementError: too little text, and how much it would take; or activations that are no numbers.
        UnsupportedEditError: no neurons of either kind that can be read.

    Example:
        >>> probe(model, tokenizer, documents).probes  # doctest: +SKIP
        >>> probe(model, tokenizer, documents, regex=r"^ [A-Z]").singles.head()  # doctest: +SKIP
    """
    chosen = token_class(tokenizer, suffix=suffix, regex=regex)
    windows = find_balanced_windows(documents, tokenizer, chosen, tokens=tokens, samples=samples, seed=seed)
    first = bos_of(tokenizer) if bos else None
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
    on_layer: OnDone | None = None,
    progress: OnDone | None = None,
) -> Probe:
    """The same on given windows; `first` is a token to put before each, `on_layer` is told of blocks whose neurons were looked at."""
    runner = BlockRunner(model, anatomy)
    readable, skipped = projections(runner)
    scores = neuron_scores(model, anatomy=anatomy, progress=on_layer)
    neurons, effects = select_neurons(runner, scores, readable, chosen, count=NEURONS, seed=seed)
    ids = windows.ids if first is None else torch.cat([torch.full((len(windows.ids), 1), first), windows.ids], 1)
    x_WN, top_W, odds_W = _watched(runner, ids, neurons, readable, chosen, batch_size, progress)
    task = ProbeData(x_WN, windows.inside, windows.held_out, seed)
    single_neurons, orders = _of_neurons(task, neurons)
    probes, together = _compared(task, neurons, orders, top_W, odds_W)
    single_neurons = _ranked(single_neurons, orders)
    for frame in (probes, single_neurons, together, effects):
        frame.insert(0, "model", type(model).__name__)
    return Probe(probes, single_neurons, together, effects, windows, chosen, skipped)


def describe_probes(probes: pd.DataFrame) -> str:
    """What was found, in a few sentences."""
    neurons = probes[probes.probe.isin(KINDS)]
    best = neurons.loc[neurons.groupby("probe", sort=False).k.idxmax()]
    parts = [f"{_percent(row)} with {row.k} {KINDS[row.probe]}" for row in best.itertuples()]
    model, odds, shuffled = (probes[probes.probe == name].iloc[0] for name in (TOP_TOKEN, PROBABILITY, SHUFFLED))
    verdict = (
        "chance" if is_chance(shuffled.accuracy, shuffled.held_out) else "not chance, so a half knows of the other"
    )
    return (
        f"Held-out accuracy (95 %): {', '.join(parts)}. The model itself: {_percent(model)} by its top token, {_percent(odds)} by the probability "
        f"that it gives to the class. Shuffled labels: {_percent(shuffled)}, {verdict}."
    )


def _percent(row: Any) -> str:
    return f"{100 * row.accuracy:.1f} % ({100 * row.low:.0f}-{100 * row.high:.0f})"


def _watched(
    runner: BlockRunner,
    ids: torch.Tensor,
    neurons: pd.DataFrame,
    readable: Iterable[Projection],
    chosen: TokenClass,
    batch_size: int,
    progress: OnDone | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each window's last token the neurons' activations, whether the model's top token is of the class, and its log odds of the class."""
    readout = find_readout(runner)
    inside = torch.from_numpy(pad_to_vocabulary(chosen.inside, readout.vocabulary))
    where = {one: neurons[(neurons.layer == one.layer) & (neurons.weight == one.weight)] for one in readable}
    x_WN = np.full((len(ids), len(neurons)), np.nan)
    top, odds = [], []

    def keep(x_BN: np.ndarray, shape: torch.Size, mine: pd.DataFrame, value: torch.Tensor) -> None:
        last = value.reshape(*shape, -1)[:, -1]
        x_BN[:, mine.index] = (
            last[:, torch.tensor(mine.neuron.to_numpy(int), device=last.device)].double().cpu().numpy()
        )

    for start in range(0, len(ids), batch_size):
        batch = ids[start : start + batch_size]
        told = partial(keep, x_WN[start : start + batch_size], batch.shape)
        with runner.inference_mode():
            with capture_neurons(runner, {one: partial(told, mine) for one, mine in where.items() if len(mine)}):
                record = runner.record(model_inputs(runner.model, batch, torch.ones_like(batch)), {runner.depth})
            for logits in _logits(readout, record.states[runner.depth]):
                mine = inside.to(logits.device)
                top.append(mine[logits.argmax(-1)].cpu())
                yes, no = (logits.double().masked_fill(mask, -torch.inf).logsumexp(-1) for mask in (~mine, mine))
                odds.append((yes - no).cpu())
        if progress is not None:
            progress(start + len(batch), len(ids))
    odds_W = torch.cat(odds).numpy()
    if not np.isfinite(x_WN).all() or not np.isfinite(odds_W).all():
        raise MeasurementError(
            "activations or logits are no numbers (NaN or infinite); in half precision, try bfloat16 or float32"
        )
    return x_WN, torch.cat(top).numpy(), odds_W


def _logits(readout: Readout, stream: torch.Tensor) -> Iterator[torch.Tensor]:
    """What the model predicts behind the last tokens: some (windows, vocabulary) after another, float32."""
    last = torch.arange(1, len(stream) + 1) * stream.shape[1] - 1
    for x_TD in torch.split(readout.normalize(stream, last), readout.rows or _ROWS):
        yield readout.logits_tile(x_TD, 0, readout.vocabulary)


def _of_neurons(task: ProbeData, neurons: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, list[int]]]:
    """Neurons one by one; and the columns of each kind, those first that do best on the half that is for training."""
    rows = []
    for column in range(len(neurons)):
        right, slope = task.fit([column])
        rows.append({"slope": slope, **task.score(right)})
    single_neurons = pd.concat([neurons, pd.DataFrame(rows)], axis=1)
    orders = {}
    for kind in KINDS:
        mine = single_neurons[single_neurons.kind != RANDOM if kind == BOTH else single_neurons.kind == kind]
        order = mine.index[np.lexsort([-mine.effect.abs(), -mine.train_accuracy])].tolist()
        if order:
            orders[kind] = order
    return single_neurons, orders


def _ranked(single_neurons: pd.DataFrame, orders: dict[str, list[int]]) -> pd.DataFrame:
    """Neurons, the best of each kind first."""
    kinds = [
        single_neurons.loc[order].assign(rank=range(1, len(order) + 1))
        for kind, order in orders.items()
        if kind != BOTH
    ]
    found = pd.concat(kinds, ignore_index=True).astype(dict.fromkeys(("layer", "neuron", "rank"), "Int64"))
    return found[
        ["layer", "weight", "neuron", "kind", "rank", "effect", "slope", "accuracy", "low", "high", "train_accuracy"]
    ]


def _compared(
    task: ProbeData, neurons: pd.DataFrame, orders: dict[str, list[int]], top_W: np.ndarray, odds_W: np.ndarray
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All ways of telling side by side, and all numbers of neurons together."""
    together, rows = [], []
    for kind, order in orders.items():
        for k in range(1, len(order) + 1):
            right, _ = task.fit(order[:k])
            together.append({"kind": kind, "k": k, **task.score(right)})
            if k in (1, len(order)):
                rows.append(task.row(kind, right, k))
    rows.append(task.row(TOP_TOKEN, top_W == task.inside))
    rows.append(task.row(PROBABILITY, replace(task, x_WN=odds_W[:, None]).fit([0])[0]))
    often = task.inside[~task.held_out].mean() >= 0.5
    rows.append(task.row(MAJORITY, task.inside == often))
    rows.append(_by_shuffling(task, neurons))
    whole = dict.fromkeys(("k", "training", "held_out"), "Int64")
    return pd.DataFrame(rows).astype(whole), pd.DataFrame(together).astype({"k": "Int64"})


def _by_shuffling(task: ProbeData, neurons: pd.DataFrame) -> dict[str, Any]:
    """What comes out where there is nothing to find: the best neurons, chosen, trained and judged on shuffled labels."""
    picked = np.random.default_rng(task.seed)
    rows = []
    for _ in range(SHUFFLES):
        none = task.shuffled(picked)
        orders = _of_neurons(none, neurons)[1]
        best = orders[BOTH][:NEURONS]
        rows.append(none.row(SHUFFLED, none.fit(best)[0], len(best)))
    held, train = (sum(row[name] for row in rows) for name in ("held_out", "training"))
    right = sum(round(row["accuracy"] * row["held_out"]) for row in rows)
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("train_accuracy", "on_class", "on_rest")}
    return {**rows[0], **interval(right, held), **means, "training": train, "held_out": held}
