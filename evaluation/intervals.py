""" """

from collections.abc import Callable

import numpy as np

RESAMPLES = 2000  # of a bootstrap


def bootstrap(
    statistic: Callable[[np.ndarray], object], n: int, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """statistic(weight_N) of n units that count once each, and its 95% limits: the 2.5% and 97.5% quantiles over
    RESAMPLES resamplings of the units, with replacement; a NaN, where nothing counts, is left out."""
    rng = np.random.default_rng(seed)
    drawn = [statistic(np.bincount(rng.integers(n, size=n), minlength=n)) for _ in range(RESAMPLES)]
    return np.asarray(statistic(np.ones(n))), *np.nanquantile(drawn, [0.025, 0.975], axis=0)
