"""Intervals: Wilson's for shares of successes, the bootstrap's for everything else."""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from fluxcompile.errors import DataError

LEVEL = 0.95
RESAMPLES = 2000

#: means of the columns of each stratum, ``[R, columns]`` each -> the statistic, ``[R]``
Statistic = Callable[[list[Tensor]], Tensor]


class Estimate(NamedTuple):
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, trials: int, level: float = LEVEL) -> Estimate:
    """A share of successes with Wilson's score interval, good for shares near 0 and 1 too.

    Raises:
        DataError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise DataError.mismatch(
            "successes of trials", "0 to at least 1 trials", f"{successes} of {trials}"
        )
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    share = successes / trials
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    variance = share * (1 - share) / trials + z2 / (4 * trials**2)
    half = (z2 * variance) ** 0.5 / (1 + z2 / trials)
    return Estimate(share, max(centre - half, 0.0), min(centre + half, 1.0))


def bootstrap(
    strata: Sequence[Tensor],
    statistic: Statistic,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Estimate:
    """A statistic of column means with its percentile interval.

    Each resample draws every stratum's rows again, with replacement; a row stays whole, so columns
    that belong to one prompt (two routers' losses, say) stay paired. Resamples for which there is
    no value (0 over 0) do not count.

    Args:
        strata: ``[n, columns]`` each, one row a prompt.
        statistic: of the strata's means.
        seed: of the draws.
        resamples: how many.
        level: share of the resamples that the interval holds.

    Raises:
        DataError: no strata, or an empty one.
    """
    if not strata or any(stratum.dim() != 2 or not len(stratum) for stratum in strata):
        shapes = [tuple(stratum.shape) for stratum in strata]
        raise DataError.mismatch("strata", "at least one, [n, columns] with n >= 1", shapes)
    generator = torch.Generator().manual_seed(seed)
    strata = [stratum.double() for stratum in strata]
    value = statistic([stratum.mean(dim=0, keepdim=True) for stratum in strata])
    drawn = []
    for stratum in strata:
        rows = torch.randint(len(stratum), (resamples, len(stratum)), generator=generator)
        drawn.append(stratum[rows].mean(dim=1))
    found = statistic(drawn)
    found = found.where(found.isfinite(), torch.nan)
    tail = (1 - level) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=found.dtype)
    low, high = torch.nanquantile(found, ends).tolist()
    return Estimate(float(value), low, high)


def mean(values: Tensor, **settings) -> Estimate:
    """Mean of ``[n]`` values."""
    return bootstrap([values[:, None]], lambda means: means[0][:, 0], **settings)
