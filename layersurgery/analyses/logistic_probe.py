"""Logistic regressions that are trained on one half of the windows and judged on the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_CHANCE_LEVEL = 0.001


@dataclass(frozen=True, slots=True)
class ProbeData:
    """What is to be told, and from what.

    Attributes:
        x_WN: numbers to tell it from, (windows, neurons).
        inside: what is to be told of each window.
        held_out: windows that nothing is trained on.
        seed: of whatever is random.
    """

    x_WN: np.ndarray
    inside: np.ndarray
    held_out: np.ndarray
    seed: int

    def shuffled(self, picked: np.random.Generator) -> ProbeData:
        """With labels that mean nothing, in each half as many of each."""
        labels = self.inside.copy()
        for half in (~self.held_out, self.held_out):
            labels[half] = picked.permutation(labels[half])
        return replace(self, inside=labels)

    def fit(self, columns: list[int]) -> tuple[np.ndarray, float]:
        """Whether a probe on some neurons is right, window by window, and its slope for the first: log odds by standard deviation."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        x, train = self.x_WN[:, columns], ~self.held_out
        scaler = StandardScaler().fit(x[train])
        fitted = LogisticRegression(random_state=self.seed, max_iter=1000).fit(
            scaler.transform(x[train]), self.inside[train]
        )
        return fitted.predict(scaler.transform(x)) == self.inside, float(fitted.coef_[0, 0])

    def score(self, right: np.ndarray) -> dict[str, float]:
        """Accuracy, held out and not."""
        held = right[self.held_out]
        return {**interval(int(held.sum()), len(held)), "train_accuracy": float(right[~self.held_out].mean())}

    def row(self, probe: str, right: np.ndarray, k: int | None = None) -> dict[str, Any]:
        """The same of either class as well, and of how many windows."""
        train, held = int((~self.held_out).sum()), int(self.held_out.sum())
        of = {
            name: float(right[self.held_out & (self.inside == value)].mean())
            for name, value in (("class", True), ("rest", False))
        }
        return {
            "probe": probe,
            "k": k,
            **self.score(right),
            "on_class": of["class"],
            "on_rest": of["rest"],
            "training": train,
            "held_out": held,
        }


def interval(right: int, of: int) -> dict[str, float]:
    """A share with its 95 % interval, after Wilson."""
    from scipy.stats import binomtest

    low, high = binomtest(right, of).proportion_ci(method="wilson")
    return {"accuracy": right / of, "low": float(low), "high": float(high)}


def is_chance(accuracy: float, of: int) -> bool:
    """Whether a coin might be right as often, at a level of 0.1 %."""
    from scipy.stats import binomtest

    return bool(binomtest(round(accuracy * of), of).pvalue >= _CHANCE_LEVEL)
