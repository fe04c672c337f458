"""The bootstrap: 95% intervals by drawing the units again."""

from collections.abc import Callable

import numpy as np

RESAMPLES = 2000


def bootstrap(
    statistic: Callable[[np.ndarray], object], n: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(value, low, high) of a statistic of n units. statistic(weight_N) counts unit i weight_N[i]
    times, and may return an array.

    low and high are the 2.5% and 97.5% quantiles over RESAMPLES draws of n units with replacement;
    a resample whose statistic is NaN (it drew nothing that counts) is left out.
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(np.bincount(rng.integers(n, size=n), minlength=n)) for _ in range(RESAMPLES)]
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    return np.asarray(statistic(np.ones(n))), low, high
