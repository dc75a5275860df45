"""Intervals against values worked out by hand."""

import pytest
import torch

from fluxcompile.errors import DataError
from fluxcompile.evaluation.intervals import bootstrap, mean, wilson


def test_wilson_by_hand():
    # Newcombe (1998), table I: 81 of 263, and 0 of 20 where z² / (n + z²) is the upper end.
    share, low, high = wilson(81, 263)
    assert share == pytest.approx(0.3080, abs=5e-5)
    assert low == pytest.approx(0.2553, abs=5e-5)
    assert high == pytest.approx(0.3662, abs=5e-5)
    share, low, high = wilson(0, 20)
    assert (share, low) == (0, 0)
    assert high == pytest.approx(3.8415 / 23.8415, abs=1e-4)
    assert wilson(20, 20).low == pytest.approx(20 / 23.8415, abs=1e-4)
    assert wilson(20, 20).high == 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(successes, trials):
    with pytest.raises(DataError, match=f"{successes} of {trials}"):
        wilson(successes, trials)


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = torch.arange(400, dtype=torch.float64)
    found = mean(values, resamples=4000)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(199.5)
    assert found.low == pytest.approx(199.5 - half, abs=1)
    assert found.high == pytest.approx(199.5 + half, abs=1)
    assert found == mean(values, resamples=4000), "the same seed"
    assert found != mean(values, resamples=4000, seed=1)


def test_bootstrap_keeps_pairs_together():
    """A ratio of two columns that rise and fall together has no spread at all."""
    base = torch.rand(50, dtype=torch.float64) + 1
    found = bootstrap([torch.stack([0.9 * base, base], dim=1)], over)
    assert found == pytest.approx((0.9, 0.9, 0.9))


def over(means):
    top, bottom = torch.stack(means).mean(dim=0).unbind(dim=-1)
    return top / bottom


def test_strata_weigh_alike_whatever_their_size():
    strata = [torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 2.0]]).expand(9, 2)]
    assert bootstrap(strata, over).value == pytest.approx(5 / 4)


def test_bootstrap_refuses_nothing():
    for strata in ([], [torch.zeros(0, 2)], [torch.zeros(3)]):
        with pytest.raises(DataError, match="strata"):
            bootstrap(strata, lambda means: means[0][:, 0])
