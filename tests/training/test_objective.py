"""Objective, multipliers, temperature and noise against numbers worked out by hand."""

import math

import pytest
import torch

from fluxcompile.errors import ConfigError
from fluxcompile.training.multipliers import Multipliers
from fluxcompile.training.noise import gumbel_noise
from fluxcompile.training.objective import routed_sparsity, row_means, sparsity_term
from fluxcompile.training.schedule import TemperatureSchedule


def test_sparsity_term_by_hand():
    shares = torch.tensor([[1.0, 0.5], [0.0, 0.0]])  # Ω: 0.25 and 1
    multipliers = Multipliers([0.45, 1.0], 0.5)
    with torch.no_grad():
        multipliers.quadratic.copy_(torch.tensor([2.0, 3.0]))
    term = sparsity_term(shares, *multipliers.of(torch.tensor([0, 1])))
    d = 0.25 - 0.45
    assert term.sparsity.tolist() == [0.25, 1.0]
    torch.testing.assert_close(term.penalty, torch.tensor([0.5 * d + 2 * d * d, 0.0]))


def test_multipliers_ascend_and_stay_at_zero_or_above():
    multipliers = Multipliers([0.45, 1.0], 0.001)
    optimizer = torch.optim.AdamW(multipliers.parameters(), lr=0.1, weight_decay=0, maximize=True)
    shares = torch.full((2, 4), 0.25)  # Ω 0.75: above the first target, below the second
    term = sparsity_term(shares, *multipliers.of(torch.tensor([0, 1])))
    term.penalty.mean().backward()
    torch.testing.assert_close(multipliers.linear.grad, torch.tensor([0.3, -0.25]) / 2)
    torch.testing.assert_close(multipliers.quadratic.grad, torch.tensor([0.09, 0.0625]) / 2)
    optimizer.step()
    assert multipliers.linear[1] < 0
    multipliers.project()
    assert multipliers.linear[0] > 0.05, "too sparse: the price of sparsity rises"
    assert multipliers.linear[1] == 0
    assert (multipliers.quadratic > 0.05).all(), "off target: the price of distance rises"


@pytest.mark.parametrize("targets", [[], [1.5], [-0.1]])
def test_impossible_targets_are_refused(targets):
    with pytest.raises(ConfigError, match="targets"):
        Multipliers(targets)


def test_router_gradient_pulls_towards_the_target():
    logits = torch.zeros(2, 3, requires_grad=True)
    multipliers = Multipliers([0.2, 0.9], 1.0)
    term = sparsity_term(torch.sigmoid(logits), *multipliers.of(torch.tensor([0, 1])))
    term.penalty.sum().backward()
    assert (logits.grad[0] < 0).all(), "Ω 0.5 above 0.2: descent raises the share of full"
    below = -0.4  # d; the derivative by Ω is λ1 + 2·λ2·d
    torch.testing.assert_close(
        logits.grad[1], torch.full((3,), -(1 + 2 * below) * 0.25 / 3), atol=1e-6, rtol=1e-5
    )


def test_rows_count_alike_whatever_their_number_of_targets():
    losses = torch.tensor([1.0, 3.0, 10.0])
    means = row_means(losses, torch.tensor([0, 0, 2]), 3)
    assert means.tolist() == [2.0, 0.0, 10.0]


def test_routed_sparsity_is_the_argmax_of_the_logits_without_noise():
    logits = torch.randn(5, 7, 2) * 3
    noise = gumbel_noise(0, 0, torch.arange(5), 7)
    shares = ((logits + noise) / 1.3).softmax(-1)[..., 1]
    expected = (logits[..., 0] >= logits[..., 1]).float().mean(1)
    torch.testing.assert_close(routed_sparsity(shares, noise, 1.3), expected)
    saturated = torch.tensor([[1.0, 0.0]])
    assert routed_sparsity(saturated, torch.zeros(1, 2, 2), 1.0).item() == 0.5


def test_temperature_of_the_paper():
    temperature = TemperatureSchedule(1.5, 1.0, 0.6, 300)
    assert temperature(0) == 1.5
    assert temperature(90) == pytest.approx(1.25)
    assert temperature(180) == 1.0
    assert temperature(299) == 1.0
    assert TemperatureSchedule(1.5, 1.0, 0.0, 300)(0) == 1.0


@pytest.mark.parametrize("values", [(0, 1, 0.5), (1, -1, 0.5), (1, 1, 1.5)])
def test_impossible_temperatures_are_refused(values):
    with pytest.raises(ConfigError, match="temperature"):
        TemperatureSchedule(*values, 10)


def test_noise_depends_on_nothing_but_seed_step_and_example():
    whole = gumbel_noise(7, 3, torch.tensor([4, 9, 2, 5]), 6)
    parts = [gumbel_noise(7, 3, torch.tensor(index), 6) for index in ([2, 4], [5], [9])]
    torch.testing.assert_close(whole[[2, 0, 3, 1]], torch.cat(parts), atol=0, rtol=0)
    for seed, step, index in ((8, 3, 4), (7, 4, 4), (7, 3, 5), (3, 7, 4), (7, -1, 4)):
        assert not torch.equal(gumbel_noise(seed, step, torch.tensor([index]), 6)[0], whole[0])


def test_noise_is_gumbel():
    noise = gumbel_noise(0, 1, torch.arange(20_000), 4)
    assert noise.shape == (20_000, 4, 2)
    assert noise.dtype == torch.float32
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    flat = noise.flatten(1)
    correlation = torch.corrcoef(flat.T) - torch.eye(8)
    assert correlation.abs().max() < 0.03
