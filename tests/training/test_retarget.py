"""Trained routers moved to other shares of sparse attention by thresholds alone."""

from dataclasses import replace

import pytest
import torch

from fluxcompile import FluxRouter, train_router
from fluxcompile.attachment import attachment_of
from fluxcompile.errors import ConfigError, DataError, RouterError
from fluxcompile.training import retarget_router
from fluxcompile.training.retarget import worth_most
from fluxcompile.training.thresholds import separating_thresholds
from tests.router_models import tiny_llama
from tests.training.tiny import CONFIG, QUICK, routes_on, tiny_data, tiny_model

READING = replace(CONFIG, prefix_size=0, suffix_size=32, standardize=True)
FIRST_FULL = torch.tensor([[True], [False]])  # of two tasks, in one layer


def test_thresholds_part_tasks_that_are_to_be_routed_differently():
    """Prompts of one task lie above, those of the other below, wherever the two meet."""
    torch.manual_seed(0)
    tasks = torch.arange(60) % 2
    where = 10 * torch.randn(8)
    margins = where + torch.rand(60, 8) + 1.5 * (1 - tasks[:, None])
    full = torch.tensor([[True] * 8, [False] * 8])
    chosen = margins > separating_thresholds(margins, tasks, full)
    assert torch.equal(chosen, full[tasks])


def test_thresholds_err_least_and_tasks_weigh_alike():
    """Half of task 1's two prompts is worth more than a fifth of task 0's five."""
    margins = torch.tensor([5.0, 4.0, 3.0, 2.0, -1.0, 2.5, -2.0])[:, None]
    tasks = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    threshold = separating_thresholds(margins, tasks, FIRST_FULL)
    assert threshold.tolist() == [2.75]


def test_a_layer_that_cannot_tell_tasks_apart_is_full():
    margins, tasks = torch.zeros(10, 1), torch.arange(10) % 2
    assert bool((margins > separating_thresholds(margins, tasks, FIRST_FULL)).all())


def test_all_prompts_cross_a_threshold_together_where_all_are_to_be_alike():
    torch.manual_seed(0)
    margins, tasks = torch.randn(20, 2), torch.arange(20) % 2
    full = torch.tensor([[True, False], [True, False]])
    chosen = margins > separating_thresholds(margins, tasks, full)
    assert chosen[:, 0].all()
    assert not chosen[:, 1].any()


def test_layers_that_are_sure_stay_as_sure():
    """Their thresholds are what they were, 0, where all of their prompts go the way they should."""
    margins = torch.tensor([[-16.0, 16.0, 1.0], [-15.0, 15.0, 3.0]])
    full = torch.tensor([[False, True, False], [False, True, True]])
    thresholds = separating_thresholds(margins, torch.tensor([0, 1]), full)
    assert thresholds.tolist() == [0, 0, 2]


def samples_of_sparse(worth):
    """Of a cost of routes: what their sparse layers are worth, together."""

    def cost(routes):
        sparse = (value for value, route in zip(worth, routes, strict=True) if not route)
        return torch.tensor([sum(sparse)], dtype=torch.float64)

    return [cost]


def test_layers_kept_full_are_those_that_cost_most_without():
    """Of those considered: layer 4 is worth most, but hardly any prompt makes it full."""
    samples = samples_of_sparse([3, 1, 2, 5, 9])
    shares = torch.tensor([1.0, 1.0, 0.5, 0.05])
    found = []
    assert worth_most(samples, 5, [0, 1, 2, 4], shares, 2, found.append) == [0, 2]
    assert found == [1]
    assert worth_most(samples, 5, [0, 1, 2, 4], shares, 4) == [0, 1, 2, 4]
    assert worth_most(samples, 5, [0, 1, 2, 4], shares, 0) == []
    # None is considered: all are.
    assert worth_most(samples, 5, [0, 1, 2, 4], torch.zeros(4), 2) == [0, 4]


def test_a_layer_kept_full_is_exchanged_where_that_costs_less():
    """Layer 1 is the cheapest alone, and adds to what others cost, but not on the first sample."""
    alone = {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3, 5: 9.0}

    def costs(routes, together):
        assert (routes[0], routes[6]) == (1, 0)  # not routed; not considered
        sparse = [layer for layer in alone if not routes[layer]]
        cost = sum(alone[layer] for layer in sparse) + together * (1 in sparse) * len(sparse[1:])
        return torch.tensor([cost], dtype=torch.float64)

    samples = [lambda routes: costs(routes, 0.0), lambda routes: costs(routes, 0.4)]
    shares = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    found = []
    assert worth_most(samples, 7, [1, 2, 3, 4, 5, 6], shares, 2, found.append) == [1, 5]
    assert found == [1, 2, 3]
    assert worth_most(samples[:1], 7, [1, 2, 3, 4, 5, 6], shares, 2) == [4, 5]


def test_layers_considered_by_themselves_cost_nothing_to_find():
    def cost(routes):
        raise AssertionError("nothing is left to choose")

    assert worth_most([cost], 3, [0, 1, 2], torch.tensor([1.0, 0.0, 0.2]), 2) == [0, 2]


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
    lines = []
    how = {"lowering": "eager", "regional": regional, "report": lines.append}
    moved, reached = retarget_router(model, router, data, tasks=wanted, **how)
    assert lines == ["retrieval: layers [0, 1] stay full", "holistic: layers [1] stay full"]
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
