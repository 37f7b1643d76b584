"""Where one stage of inference ends and the next begins: stated rules, applied to the signals and to resamples of them.

The paper draws four stages and calls their limits fuzzy. Here each limit is where stated signals do a stated thing. One that they do not do,
or do in fewer than nine of ten resamples, is not found, and that is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from ..metrics.aggregation import Array

STAGES = ("detokenization", "feature engineering", "prediction ensembling", "residual sharpening")
RULES = (
    "drop KL (in logarithms) and attention to the previous five, each a median of three layers, both fall below halfway between their highest "
    "value in the first quarter and their median in the middle half, and stay there up to half depth; KL begins at least twice, attention 1.1 "
    "times as high as that median",
    "of two straight lines that meet, fitted to the lens KL by least squares, the second begins here; it falls, at least twice as steeply as "
    "the first, they leave at most half of one line's squared error, and no later layer is above where it begins",
    "from here on suppression neurons outnumber prediction neurons in every layer, and in all of them by more than chance (1.96 standard "
    "deviations of a Poisson count), after layers of the second half where they did not; or else the lens entropy has its highest or lowest "
    "point of the second half inside it, and from there falls or rises by at least a tenth of its range",
)
RESAMPLES, SHARE, _LEVEL = 1000, 0.9, 95
Signals = Mapping[str, Array]
"""By name, (layers,): drop_kl_nats, attention_prev5, lens_kl_nats, lens_entropy_bits, prediction, suppression, neurons."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """The end of one stage.

    Attributes:
        ends: the stage that ends here.
        begins: the one that begins.
        layer: the first layer of the next stage; None where the signals do not support it.
        low: lower end of the interval that holds 95 % of resamples in which it is found; None without resamples.
        high: upper end.
        share: of resamples in which it is found.
        by: the signal that tells.
        why: what the signals do, or do not do.
        rule: what is asked of them.
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
class _Found:
    """Where a rule finds a limit, or why not."""

    layer: int | None
    by: str
    why: str


def boundaries(
    signals: Signals, resample: Callable[[np.random.Generator], Signals] | None = None, *, seed: int = 0
) -> list[Boundary]:
    """The three limits between the four stages.

    Args:
        signals: what was measured.
        resample: draws the signals anew, from sequences (and neurons) taken with replacement; None where there is but one sequence.
        seed: of drawing.
    """
    found = _all(signals)
    drawn: list[list[int | None]] = [[], [], []]
    if resample is not None:
        rng = np.random.default_rng(seed)
        for _ in range(RESAMPLES):
            for layers, one in zip(drawn, _all(resample(rng)), strict=True):
                layers.append(one.layer)
    return _ordered(
        [
            _judged(
                Boundary(STAGES[n], STAGES[n + 1], one.layer, None, None, None, one.by, one.why, RULES[n]), drawn[n]
            )
            for n, one in enumerate(found)
        ]
    )


def _judged(boundary: Boundary, drawn: list[int | None]) -> Boundary:
    if not drawn:
        return boundary
    some = [layer for layer in drawn if layer is not None]
    share = len(some) / len(drawn)
    low, high = (
        (int(x) for x in np.percentile(some, [50 - _LEVEL / 2, 50 + _LEVEL / 2], method="nearest"))
        if some
        else (None, None)
    )
    if boundary.layer is None or share >= SHARE:
        return replace(boundary, share=share, low=low, high=high)
    return replace(
        boundary, layer=None, share=share, low=low, high=high,
        why=f"{boundary.why}, but only in {100 * share:.0f} % of resamples",
    )  # fmt: skip


def _all(signals: Signals) -> list[_Found]:
    return [_detokenization(signals), _engineering(signals), _ensembling(signals)]


def _ordered(found: list[Boundary]) -> list[Boundary]:
    """Limits that do not lie behind the one before are not believed."""
    latest, kept = 0, []
    for limit in found:
        if limit.layer is not None and limit.layer <= latest:
            limit = replace(limit, layer=None, why=f"{limit.why}, which is no later than where the stage before ends")
        latest = limit.layer if limit.layer is not None else latest
        kept.append(limit)
    return kept


def _detokenization(signals: Signals) -> _Found:
    kl = _leaves(
        np.log(np.maximum(signals["drop_kl_nats"], 1e-12)), "drop KL", math.log(2), lambda x: f"{math.exp(x):.2g} nats"
    )
    attention = signals["attention_prev5"]
    median = np.median(_middle(attention))
    near = _leaves(attention, "attention to the previous five", 0.1 * float(median), lambda x: f"{x:.2f}")
    by = "drop_kl_nats, attention_prev5"
    layers = [one.layer for one in (kl, near) if one.layer is not None]
    return _Found(max(layers) if len(layers) == 2 else None, by, f"{kl.why}; {near.why}")


def _leaves(values: Array, name: str, least: float, say: Callable[[float], str]) -> _Found:
    """Where a signal leaves the level that it begins with, for good."""
    depth = len(values)
    if not np.isfinite(values).all():
        return _Found(None, name, f"{name} is not known for every layer")
    smooth = np.median(np.stack([values, np.append(values[0], values[:-1]), np.append(values[1:], values[-1])]), 0)
    start = int(smooth[: max(1, depth // 4)].argmax())
    early, middle = float(smooth[start]), float(np.median(_middle(values)))
    if early - middle < least:
        return _Found(None, name, f"{name} begins no higher ({say(early)}) than it goes on ({say(middle)})")
    half = max(start + 2, depth // 2)
    low = smooth < (early + middle) / 2
    layer = next((layer for layer in range(start + 1, half) if low[layer]), None)
    if layer is None:
        return _Found(None, name, f"{name} does not leave its early level before half depth")
    fall = f"{name} falls from {say(early)} towards {say(middle)} by layer {layer}"
    if back := [number for number in range(layer, half) if not low[number]]:
        return _Found(
            None, name, f"{fall}, but is high again at layer{'s'[: len(back) > 1]} {', '.join(map(str, back))}"
        )
    return _Found(layer, name, fall)


def _middle(values: Array) -> Array:
    depth = len(values)
    return values[depth // 4 : max(depth // 4 + 1, 3 * depth // 4)]


def _engineering(signals: Signals) -> _Found:
    values, name = signals["lens_kl_nats"], "lens_kl_nats"
    depth = len(values)
    if depth < 6 or not np.isfinite(values).all():
        return _Found(
            None,
            name,
            "the model has too few layers to fit two lines" if depth < 6 else "lens KL is not a number everywhere",
        )
    x = np.arange(depth, dtype=float)
    one = _residual(np.stack([np.ones(depth), x], 1), values)[1]
    fits = []
    for place in range(1, depth - 2):
        (_, first, bend), error = _residual(np.stack([np.ones(depth), x, np.maximum(0, x - place)], 1), values)
        fits.append((error, place, first, first + bend))
    error, place, first, second = min(fits)
    slopes = f"slopes {first:+.2g} and {second:+.2g} nats a layer"
    if second >= 0 or (first < 0 and second > 2 * first):
        return _Found(None, name, f"lens KL begins no lasting fall: two lines meet at layer {place} with {slopes}")
    if error > 0.5 * one:
        return _Found(
            None,
            name,
            f"lens KL has no clear bend: two lines leave {100 * error / max(one, 1e-30):.0f} % of one line's squared error",
        )
    if values[place + 1 :].max() > values[place]:
        return _Found(None, name, f"lens KL rises again behind layer {place}")
    return _Found(place + 1, name, f"lens KL begins to fall for good behind layer {place} ({slopes})")


def _residual(design: Array, values: Array) -> tuple[Array, float]:
    solution: Array = np.linalg.lstsq(design, values, rcond=None)[0].astype(float)
    return solution, float(((design @ solution - values) ** 2).sum())


def _ensembling(signals: Signals) -> _Found:
    overtaken = _overtaken(signals["prediction"], signals["suppression"])
    if overtaken.layer is not None:
        return overtaken
    turned = _turned(signals["lens_entropy_bits"])
    return _Found(turned.layer, turned.by if turned.layer is not None else "", f"{overtaken.why}; {turned.why}")


def _overtaken(prediction: Array, suppression: Array) -> _Found:
    depth, name = len(prediction), "prediction, suppression"
    if not (np.isfinite(prediction).all() and np.isfinite(suppression).all()):
        return _Found(None, name, "neurons are not known for every layer")
    behind = [layer for layer in range(depth) if suppression[layer] <= prediction[layer]]
    layer = behind[-1] + 1 if behind else 0
    if layer >= depth:
        return _Found(None, name, "suppression neurons do not outnumber prediction neurons at the end")
    if layer <= depth // 2 or not prediction[depth // 2 : layer].any():
        return _Found(None, name, "prediction neurons are nowhere in the second half ahead of suppression neurons")
    ahead, less = suppression[layer:].sum(), prediction[layer:].sum()
    numbers = f"from layer {layer} on, {ahead:.0f} suppression against {less:.0f} prediction neurons"
    if ahead - less <= 1.96 * math.sqrt(ahead + less):
        return _Found(None, name, f"{numbers}, which may be chance")
    return _Found(layer, name, numbers)


def _turned(entropy: Array) -> _Found:
    """Either way: the paper sees it fall at the end in some models (sharpening), and rise in others (confidence that is blunted)."""
    name, depth = "lens_entropy_bits", len(entropy)
    if not np.isfinite(entropy).all() or depth < 4:
        return _Found(None, name, "lens entropy is not known everywhere")
    half = depth // 2
    late = entropy[half:]
    for place in sorted((half + int(late.argmax()), half + int(late.argmin())), reverse=True):
        back = float(entropy[-1] - entropy[place])
        if half < place < depth - 1 and abs(back) >= 0.1 * float(np.ptp(entropy)):
            way = "rises" if back > 0 else "falls"
            return _Found(place + 1, name, f"lens entropy turns behind layer {place} and {way} by {abs(back):.2g} bits")
    return _Found(None, name, "lens entropy does not turn inside the second half")


def stage_of(found: list[Boundary], depth: int) -> list[str]:
    """The stage of each layer; where a limit between two was not found, both names."""
    names = [""] * depth
    first, run = 0, [STAGES[0]]
    for boundary in [*found, None]:
        if boundary is not None and boundary.layer is None:
            run.append(boundary.begins)
            continue
        stop = depth if boundary is None or boundary.layer is None else boundary.layer
        names[first:stop] = [" or ".join(run)] * (stop - first)
        first, run = stop, [] if boundary is None else [boundary.begins]
    return names


def as_records(found: list[Boundary]) -> list[dict[str, object]]:
    """Boundaries as plain values."""
    return [asdict(boundary) for boundary in found]
