"""Fit logistic regressions on one half of the windows and score them on the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_CHANCE_LEVEL = 0.001


@dataclass(frozen=True, slots=True)
class ProbeData:
    """Data of a probe.

    Attributes:
        x_WN: activations, (windows, neurons).
        inside: label of each window, (windows,).
        held_out: True for windows that are not used for training, (windows,).
        seed: random seed.
        weakness: inverse of the strength of the L2 penalty, as scikit-learn's C.
    """

    x_WN: np.ndarray
    inside: np.ndarray
    held_out: np.ndarray
    seed: int
    weakness: float = 1.0

    def shuffled(self, rng: np.random.Generator) -> ProbeData:
        """Return the data with labels shuffled within each half."""
        labels = self.inside.copy()
        for half in (~self.held_out, self.held_out):
            labels[half] = rng.permutation(labels[half])
        return replace(self, inside=labels)

    def fit(self, columns: list[int] | slice) -> tuple[np.ndarray, float]:
        """Fit a probe on some neurons.

        Returns:
            Whether it is right for each window, and its slope for the first neuron (log odds per standard deviation).
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        x, train = self.x_WN[:, columns], ~self.held_out
        scaler = StandardScaler().fit(x[train])
        regression = LogisticRegression(C=self.weakness, random_state=self.seed, max_iter=1000).fit(
            scaler.transform(x[train]), self.inside[train]
        )
        return regression.predict(scaler.transform(x)) == self.inside, float(regression.coef_[0, 0])

    def score(self, right: np.ndarray) -> dict[str, float]:
        """Return held-out accuracy with its interval, and training accuracy."""
        held_out = right[self.held_out]
        return {**interval(int(held_out.sum()), len(held_out)), "train_accuracy": float(right[~self.held_out].mean())}

    def row(self, probe: str, right: np.ndarray, k: int | None = None) -> dict[str, Any]:
        """Return a table row: the scores, accuracy by class, and numbers of windows."""
        train, held_out = int((~self.held_out).sum()), int(self.held_out.sum())
        by_class = {
            name: float(right[self.held_out & (self.inside == value)].mean())
            for name, value in (("class", True), ("rest", False))
        }
        return {
            "probe": probe,
            "k": k,
            **self.score(right),
            "on_class": by_class["class"],
            "on_rest": by_class["rest"],
            "training": train,
            "held_out": held_out,
        }


def interval(right: int, total: int) -> dict[str, float]:
    """Return a share with its 95 % Wilson interval."""
    from scipy.stats import binomtest

    low, high = binomtest(right, total).proportion_ci(method="wilson")
    return {"accuracy": right / total, "low": float(low), "high": float(high)}


def is_chance(accuracy: float, total: int) -> bool:
    """Tell whether an accuracy is consistent with guessing, at a level of 0.1 %."""
    from scipy.stats import binomtest

    return bool(binomtest(round(accuracy * total), total).pvalue >= _CHANCE_LEVEL)
