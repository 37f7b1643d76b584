"""Find the layers where one stage of inference ends and the next begins, by fixed rules on the signals.

The paper draws four stages and calls their boundaries fuzzy. Here each boundary has a rule on the signals. A boundary
counts as found only if the signals follow its rule, and if they do so in at least nine of ten resamples. No single
layer decides: each rule asks for two layers or more on both sides of a boundary, and one that differs from its
neighbors changes nothing, unless it is next to the boundary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from ..metrics.aggregation import Array
from ..registry import STAGES
from .outlying_layers import MIN_LAYERS, fit_bend, smooth

_SMOOTHED = "smoothed by a median of three layers (Tukey's rule at the ends)"
RULES = (
    f"drop KL (in logarithms) and attention to the previous five tokens, each {_SMOOTHED}, both fall below the "
    "midpoint between their highest value in the first quarter and their median in the middle half, and stay below it "
    "up to half depth; before the fall, KL is at least 2 times and attention at least 1.1 times that median; in a "
    "model with layers of several kinds, only those of the most common kind count, for attention the most common one "
    "that has softmax attention; six layers or more",
    "two straight lines that meet are fitted to the lens KL by least squares, without the one layer that fits worst, "
    "and the second begins here; it falls, at least twice as steeply as the first, the two lines leave at most half of "
    "the squared error of one line without the one layer that fits worst, and no later layer, except the one left out, "
    "is above the point where they meet; two layers or more before that point, and three or more after it",
    "from here on, suppression neurons outnumber prediction neurons in at least two layers and in every layer but at "
    "most one, which follows two such layers, and without this one in total by more than chance (1.96 standard "
    "deviations of a Poisson count), after layers of the second half where they did not; otherwise, the lens entropy, "
    f"{_SMOOTHED}, has its highest or lowest value of the second half inside it, and then falls or rises by at least a "
    "tenth of its range",
)
RESAMPLES, SHARE, _LEVEL = 1000, 0.9, 95
Signals = Mapping[str, Array]
"""Values by name, each of shape (layers,).

The names are drop_kl_nats, attention_prev5, lens_kl_nats, lens_entropy_bits, prediction, suppression and neurons.
"""


@dataclass(frozen=True, slots=True)
class Boundary:
    """Boundary between two stages.

    Attributes:
        ends: the stage that ends here.
        begins: the stage that begins here.
        layer: the first layer of the next stage; None if the signals do not support a boundary.
        low: lower end of the interval that holds 95 % of the resamples that find the boundary; None without resamples.
        high: upper end of the interval.
        share: share of the resamples that find it.
        by: the signals that decide.
        why: what the signals do, or fail to do.
        rule: what the signals must do.
    """

    ends: str
    begins: str
    layer: int | None
    low: int | None
    high: int | None
    share: float | None
    by: str
    why: str
    rule: str


@dataclass(frozen=True, slots=True)
class _RuleResult:
    """The layer where a rule finds a boundary, or the reason why it finds none."""

    layer: int | None
    by: str
    why: str


def boundaries(
    signals: Signals,
    resample: Callable[[np.random.Generator], Signals] | None = None,
    *,
    kinds: Sequence[str] = (),
    seed: int = 0,
) -> list[Boundary]:
    """Find the three boundaries between the four stages.

    Args:
        signals: the measured signals.
        resample: draws the signals again from sequences (and neurons) sampled with replacement; None if there is only
            one sequence.
        kinds: the kind of each layer in words; empty if all layers are of one kind.
        seed: random seed of the resamples.
    """
    results = _apply_rules(signals, kinds)
    resampled: list[list[int | None]] = [[], [], []]
    if resample is not None:
        rng = np.random.default_rng(seed)
        for _ in range(RESAMPLES):
            for layers, result in zip(resampled, _apply_rules(resample(rng), kinds), strict=True):
                layers.append(result.layer)
    return _in_order(
        [
            _with_interval(
                Boundary(
                    STAGES[index],
                    STAGES[index + 1],
                    result.layer,
                    None,
                    None,
                    None,
                    result.by,
                    result.why,
                    RULES[index],
                ),
                resampled[index],
            )
            for index, result in enumerate(results)
        ]
    )


def _with_interval(boundary: Boundary, resampled: list[int | None]) -> Boundary:
    if not resampled:
        return boundary
    found = [layer for layer in resampled if layer is not None]
    share = len(found) / len(resampled)
    low, high = (
        (int(value) for value in np.percentile(found, [50 - _LEVEL / 2, 50 + _LEVEL / 2], method="nearest"))
        if found
        else (None, None)
    )
    if boundary.layer is None or share >= SHARE:
        return replace(boundary, share=share, low=low, high=high)
    return replace(
        boundary, layer=None, share=share, low=low, high=high,
        why=f"{boundary.why}, but only in {100 * share:.0f} % of resamples",
    )  # fmt: skip


def _apply_rules(signals: Signals, kinds: Sequence[str]) -> list[_RuleResult]:
    return [_find_detokenization_end(signals, kinds), _find_engineering_end(signals), _find_ensembling_end(signals)]


def _in_order(stage_boundaries: list[Boundary]) -> list[Boundary]:
    """Mark a boundary as not found if it is not after the previous one."""
    previous, result = 0, []
    for boundary in stage_boundaries:
        if boundary.layer is not None and boundary.layer <= previous:
            boundary = replace(
                boundary, layer=None, why=f"{boundary.why}, which is not after the end of the previous stage"
            )
        previous = boundary.layer if boundary.layer is not None else previous
        result.append(boundary)
    return result


def _find_detokenization_end(signals: Signals, kinds: Sequence[str]) -> _RuleResult:
    kl = _find_lasting_fall(
        np.log(np.maximum(signals["drop_kl_nats"], 1e-12)),
        kinds,
        "drop KL",
        lambda _: math.log(2),
        lambda value: f"{math.exp(value):.2g} nats",
    )
    previous_five = _find_lasting_fall(
        signals["attention_prev5"],
        kinds,
        "attention to the previous five tokens",
        lambda median: 0.1 * median,
        lambda value: f"{value:.2f}",
    )
    by = "drop_kl_nats, attention_prev5"
    layers = [result.layer for result in (kl, previous_five) if result.layer is not None]
    return _RuleResult(max(layers) if len(layers) == 2 else None, by, f"{kl.why}; {previous_five.why}")


def _find_lasting_fall(
    values: Array,
    kinds: Sequence[str],
    name: str,
    min_drop: Callable[[float], float],
    format_value: Callable[[float], str],
) -> _RuleResult:
    """Find the layer where a signal falls from its early level and stays low up to half depth.

    Args:
        values: the signal, (layers,).
        kinds: the kind of each layer; only layers of the most common kind that has the signal are compared.
        name: the signal's name.
        min_drop: returns the smallest fall, given the median in the middle half.
        format_value: writes a value with its unit.
    """
    depth = len(values)
    layers = np.arange(depth)
    if common := Counter(kind for kind, value in zip(kinds, values, strict=False) if np.isfinite(value)).most_common(1):
        layers = np.array([layer for layer in range(depth) if kinds[layer] == common[0][0]])
        name = f"{name} ({len(layers)} of {depth} layers: {common[0][0]})"
    values = values[layers]
    if not np.isfinite(values).all():
        return _RuleResult(None, name, f"{name} is not available for every layer")
    if len(values) < MIN_LAYERS:
        return _RuleResult(None, name, f"{name} has too few layers to tell an early level from an outlying layer")
    smoothed, median = smooth(values), float(np.median(_middle(values)))
    start = int(smoothed[: max(1, len(values) // 4)].argmax())
    early = float(smoothed[start])
    if early - median < min_drop(median):
        return _RuleResult(
            None,
            name,
            f"{name} is not clearly higher at the start ({format_value(early)}) than in the middle "
            f"({format_value(median)})",
        )
    low = smoothed < (early + median) / 2
    until = [place for place in range(start + 1, len(values)) if place < start + 2 or layers[place] < depth // 2]
    fallen = next((place for place in until if low[place]), None)
    if fallen is None:
        return _RuleResult(None, name, f"{name} stays at its early level up to half depth")
    layer = int(layers[fallen])
    fall = f"{name} falls from {format_value(early)} towards {format_value(median)} by layer {layer}"
    if high_again := [int(layers[place]) for place in until if place > fallen and not low[place]]:
        return _RuleResult(
            None,
            name,
            f"{fall}, but is high again at layer{'s'[: len(high_again) > 1]} {', '.join(map(str, high_again))}",
        )
    return _RuleResult(layer, name, fall)


def _middle(values: Array) -> Array:
    depth = len(values)
    return values[depth // 4 : max(depth // 4 + 1, 3 * depth // 4)]


def _find_engineering_end(signals: Signals) -> _RuleResult:
    values, name = signals["lens_kl_nats"], "lens_kl_nats"
    if len(values) < MIN_LAYERS:
        return _RuleResult(None, name, "the model has too few layers to fit two lines")
    if not np.isfinite(values).all():
        return _RuleResult(None, name, "lens KL is not available for every layer")
    bend = fit_bend(values)
    slopes = (
        f"slopes {bend.first_slope:+.2g} and {bend.second_slope:+.2g} nats per layer, without layer {bend.left_out}"
    )
    if bend.second_slope >= 0 or (bend.first_slope < 0 and bend.second_slope > 2 * bend.first_slope):
        return _RuleResult(
            None, name, f"lens KL has no lasting fall: the two fitted lines meet at layer {bend.layer} with {slopes}"
        )
    if bend.share > 0.5:
        return _RuleResult(
            None,
            name,
            f"lens KL has no clear bend: two lines leave {100 * bend.share:.0f} % of one line's squared error",
        )
    later = [layer for layer in range(bend.layer + 1, len(values)) if layer != bend.left_out]
    if values[later].max() > bend.height:
        return _RuleResult(None, name, f"lens KL rises again after layer {bend.layer}")
    return _RuleResult(bend.layer + 1, name, f"lens KL begins its lasting fall after layer {bend.layer} ({slopes})")


def _find_ensembling_end(signals: Signals) -> _RuleResult:
    overtaking = _find_overtaking(signals["prediction"], signals["suppression"])
    if overtaking.layer is not None:
        return overtaking
    entropy_turn = _find_entropy_turn(signals["lens_entropy_bits"])
    return _RuleResult(
        entropy_turn.layer,
        entropy_turn.by if entropy_turn.layer is not None else "",
        f"{overtaking.why}; {entropy_turn.why}",
    )


def _find_overtaking(prediction: Array, suppression: Array) -> _RuleResult:
    depth, name = len(prediction), "prediction, suppression"
    if not (np.isfinite(prediction).all() and np.isfinite(suppression).all()):
        return _RuleResult(None, name, "neuron counts are not available for every layer")
    behind = [layer for layer in range(depth) if suppression[layer] <= prediction[layer]]
    exception = behind[-1] if behind and not {behind[-1] - 1, behind[-1] - 2} & {-1, -2, *behind} else None
    first = max((layer for layer in behind if layer != exception), default=-1) + 1
    layers = [layer for layer in range(first, depth) if layer != exception]
    if len(layers) < 2:
        return _RuleResult(None, name, "suppression neurons do not outnumber prediction neurons in the last two layers")
    if first <= depth // 2 or not prediction[depth // 2 : first].any():
        return _RuleResult(
            None, name, "prediction neurons do not outnumber suppression neurons anywhere in the second half"
        )
    suppressing, predicting = suppression[layers].sum(), prediction[layers].sum()
    where = f"from layer {first} on" if exception is None else f"from layer {first} on, without layer {exception}"
    numbers = f"{where}, there are {suppressing:.0f} suppression and {predicting:.0f} prediction neurons"
    if suppressing - predicting <= 1.96 * math.sqrt(suppressing + predicting):
        return _RuleResult(None, name, f"{numbers}, which may be chance")
    return _RuleResult(first, name, numbers)


def _find_entropy_turn(entropy: Array) -> _RuleResult:
    """Find the layer after which the lens entropy turns, in either direction.

    The paper sees the entropy fall at the end in some models (sharpening), and rise in others.
    """
    name, depth = "lens_entropy_bits", len(entropy)
    if not np.isfinite(entropy).all():
        return _RuleResult(None, name, "lens entropy is not available for every layer")
    if depth < MIN_LAYERS:
        return _RuleResult(None, name, "the model has too few layers for lens entropy to turn inside the second half")
    smoothed, half = smooth(entropy), depth // 2
    for layer in sorted((_highest(smoothed, entropy, half), _highest(-smoothed, -entropy, half)), reverse=True):
        change = float(smoothed[-1] - smoothed[layer])
        if half < layer < depth - 1 and abs(change) >= 0.1 * float(np.ptp(smoothed)) > 0:
            direction = "rises" if change > 0 else "falls"
            return _RuleResult(
                layer + 1, name, f"lens entropy turns after layer {layer} and {direction} by {abs(change):.2g} bits"
            )
    return _RuleResult(None, name, "lens entropy has no turning point inside the second half")


def _highest(smoothed: Array, values: Array, start: int) -> int:
    """Return the layer from `start` on with the highest smoothed value; of several, the one with the highest value."""
    tied = [layer for layer in range(start, len(values)) if smoothed[layer] == smoothed[start:].max()]
    return max(tied, key=lambda layer: float(values[layer]))


def stage_of(stage_boundaries: list[Boundary], depth: int) -> list[str]:
    """Return the stage of each layer.

    Where the boundary between two stages was not found, the name holds both, joined by "or".
    """
    names = [""] * depth
    first, candidates = 0, [STAGES[0]]
    for boundary in [*stage_boundaries, None]:
        if boundary is not None and boundary.layer is None:
            candidates.append(boundary.begins)
            continue
        stop = depth if boundary is None or boundary.layer is None else boundary.layer
        names[first:stop] = [" or ".join(candidates)] * (stop - first)
        first, candidates = stop, [] if boundary is None else [boundary.begins]
    return names


def as_records(stage_boundaries: list[Boundary]) -> list[dict[str, object]]:
    """Return boundaries as dictionaries."""
    return [asdict(boundary) for boundary in stage_boundaries]
