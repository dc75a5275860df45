"""Trained routers moved to other shares of sparse attention by thresholds alone."""

from dataclasses import replace

import pytest
import torch

from fluxcompile import FluxRouter, train_router
from fluxcompile.attachment import attachment_of
from fluxcompile.errors import ConfigError, DataError, RouterError
from fluxcompile.training import retarget_router
from fluxcompile.training.thresholds import choose_thresholds
from tests.router_models import tiny_llama
from tests.training.tiny import CONFIG, QUICK, routes_on, tiny_data, tiny_model

READING = replace(CONFIG, prefix_size=0, suffix_size=32, standardize=True)


def full_share(margins, thresholds):
    return (margins > thresholds).double().mean(dim=1)


@pytest.mark.parametrize("wanted", [(0.25, 0.75), (0.5, 0.5), (0.1, 0.5), (0.75, 0.25)])
def test_thresholds_give_each_task_its_share(wanted):
    """Even against what the margins say: in half of the layers they prefer the other task."""
    torch.manual_seed(0)
    tasks = torch.arange(200) % 2
    side = torch.where(torch.arange(16) % 2 == 0, 1.0, -1.0)
    margins = torch.randn(200, 16) + 4 * side * (2 * tasks[:, None] - 1) + torch.randn(16)
    shares = full_share(margins, choose_thresholds(margins, tasks, torch.tensor(wanted)))
    for task, share in enumerate(wanted):
        # A layer's prompts lie close: nearly all of them cross its threshold at once.
        assert shares[tasks == task].mean() == pytest.approx(share, abs=0.04)


def test_thresholds_keep_the_largest_margins():
    """One task: of all thresholds with its share, no other keeps more."""
    torch.manual_seed(0)
    margins = torch.randn(64, 8) + torch.randn(8)
    thresholds = choose_thresholds(margins, torch.zeros(64, dtype=torch.int64), torch.tensor([0.4]))
    chosen = margins > thresholds
    count = int(chosen.sum())
    assert count == pytest.approx(0.4 * margins.numel(), abs=1)
    best = margins.flatten().sort(descending=True).values[:count].sum()
    assert margins[chosen].sum() == pytest.approx(float(best), rel=1e-6)


def test_layers_that_are_sure_stay_as_sure():
    """Their thresholds are what they were, 0, where all of their prompts go the same way."""
    margins = torch.tensor([[-16.0, 16.0, 1.0], [-15.0, 15.0, 3.0]])
    thresholds = choose_thresholds(margins, torch.zeros(2, dtype=torch.int64), torch.tensor([0.5]))
    assert thresholds.tolist() == [0, 0, 2]


def test_equal_margins_are_not_torn_apart():
    margins = torch.zeros(10, 3)
    thresholds = choose_thresholds(margins, torch.arange(10) % 2, torch.tensor([0.5, 0.5]))
    assert set(full_share(margins, thresholds).tolist()) <= {0.0, 1 / 3, 2 / 3, 1.0}


@pytest.fixture(scope="module")
def taught():
    """A model, and a router with its first layer full for retrieval, its second for holistic."""
    model, data = tiny_model(), tiny_data(32, tokens_tell_tasks=True)
    start = {"retrieval": [1, 0], "holistic": [0, 1]}
    still = QUICK | {"config": READING, "max_steps": 1, "learning_rate": 0.0}
    return model, train_router(model, data, start=start, **still)


@pytest.mark.parametrize("regional", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_router_reaches_other_shares_and_says_which(taught, regional):
    """More of one task's layers full; the other's stay what they were."""
    model, router = taught
    data = tiny_data(32, tokens_tell_tasks=True)
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    wanted = {"retrieval": 0.0, "holistic": 0.5}
    how = {"lowering": "eager", "regional": regional}
    moved, reached = retarget_router(model, router, data, tasks=wanted, **how)
    assert attachment_of(model) is None
    full = routes_on(model, moved, data)
    for name, share in wanted.items():
        of_task = torch.tensor([row["task"] == name for row in data])
        assert 1 - full[of_task].double().mean() == pytest.approx(reached[name], abs=1e-6)
        assert reached[name] == pytest.approx(share, abs=0.1)
    # The router given is as it was; the new one has other thresholds and nothing else.
    after = router.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    changed = [n for n, tensor in moved.state_dict().items() if not torch.equal(tensor, after[n])]
    assert changed
    assert {name.partition(".head.")[2] for name in changed} == {"4.bias"}


def test_what_is_wrong_is_said(taught):
    model, router = taught
    data, both = tiny_data(4), {"retrieval": 0.5, "holistic": 1.0}
    with pytest.raises(DataError, match="examples of every task"):
        retarget_router(model, router, data[::2], tasks=both)
    with pytest.raises(DataError, match="task"):
        retarget_router(model, router, data, tasks={"retrieval": 0.5})
    with pytest.raises(DataError, match=r"tasks\['retrieval'\]"):
        retarget_router(model, router, data, tasks={"retrieval": 1.5})
    untrained = FluxRouter.from_model(model, replace(CONFIG, sparse="xattention"))
    with pytest.raises(ConfigError, match="sparse attention of"):
        retarget_router(model, untrained, data, tasks=both)
    with pytest.raises(RouterError):
        retarget_router(tiny_llama(num_hidden_layers=3), router, data, tasks=both)
