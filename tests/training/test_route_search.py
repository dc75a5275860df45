"""Fixed routes that cost little: greedy search, exchanges after it, and on how many examples."""

from itertools import product

import pytest
import torch

from fluxcompile.training.route_search import (
    cheapest,
    exchanged,
    greedy_order,
    one_in,
    search_routes,
)


def test_a_lazy_search_finds_what_trying_all_would():
    """Where a layer adds the more, the more others are sparse: here by pairs of layers."""
    layers = 12
    generator = torch.Generator().manual_seed(0)
    alone = torch.rand(layers, generator=generator, dtype=torch.float64)
    pairs = torch.rand(layers, layers, generator=generator, dtype=torch.float64).triu(1) ** 4
    tried = []

    def cost(routes):
        sparse = 1 - torch.tensor(routes, dtype=torch.float64)
        tried.append(routes)
        return float(alone @ sparse + sparse @ pairs @ sparse)

    order = greedy_order(cost, layers, 9, lazy=True)
    count = len(tried)
    chosen = []
    while len(chosen) < 9:
        others = [layer for layer in range(layers) if layer not in chosen]
        chosen.append(
            min(others, key=lambda x: cost([int(i not in (*chosen, x)) for i in range(layers)]))
        )
    assert order == chosen
    assert count < (len(tried) - count) / 2


def test_exchanges_find_what_greedy_search_cannot_take_back():
    """Layer 0 is the cheapest alone, and each of the others adds to what it costs."""
    tried, layers, alone = [], 6, (1.0, 1.1, 1.2, 1.3, 9.0, 9.0)

    def cost(routes):
        tried.append(routes)
        sparse = [i for i, route in enumerate(routes) if not route]
        return sum(alone[i] for i in sparse) + 0.4 * (0 in sparse) * len(sparse[1:])

    greedy = search_routes(cost, layers, 3)
    assert greedy == (0, 0, 0, 1, 1, 1)
    found = exchanged(single_sample(cost), greedy)
    assert found == (1, 0, 0, 0, 1, 1)
    assert found == min((r for r in product((0, 1), repeat=layers) if sum(r) == 3), key=cost)
    tried.clear()
    assert exchanged(single_sample(cost), found) == found
    assert len(tried) <= layers + 3


@pytest.mark.parametrize("routes", [(0, 0), (1, 1)])
def test_there_is_nothing_to_exchange_where_all_layers_are_alike(routes):
    assert exchanged([pytest.fail], routes) == routes


def test_the_better_half_goes_on_and_the_last_sample_decides():
    candidates = [tuple(int(i == j) for j in range(16)) for i in range(16)]
    asked = {4: [], 8: [], 16: []}

    def on(examples):
        def sample(routes):
            asked[examples].append(routes)
            layer = routes.index(1)
            # Only the last examples tell 1 from 0. On some a layer is worth much: nobody is sure.
            noise = 100.0 * torch.randn(examples, dtype=torch.float64, generator=seeded(layer))
            cost = layer - 1.5 * (layer == 1) * (examples == 16)
            return noise - noise.mean() + cost

        return sample

    found = cheapest(candidates, [on(4), on(8), on(16)])
    assert found == candidates[1]
    assert [asked[4], asked[8]] == [candidates, candidates[:8]]
    assert set(asked[16]) == set(candidates[:4])


def test_what_is_surely_worse_is_left_out_at_once():
    """By the differences, example by example: that some examples cost more raises no doubt."""
    candidates = [(0, 1, 1), (1, 0, 1), (1, 1, 0)]
    of_examples = torch.tensor([0.0, 10.0, 20.0, 30.0])
    worse = {candidates[0]: 0.0, candidates[1]: 0.1, candidates[2]: 5.0}
    few = lambda routes: of_examples + worse[routes]  # noqa: E731
    assert cheapest(candidates, [few, pytest.fail]) == candidates[0]


def test_one_candidate_is_not_run():
    assert cheapest([(0, 1)], [pytest.fail, pytest.fail]) == (0, 1)


def test_few_examples_are_not_divided():
    assert one_in(576) == (12, 6, 3, 1)
    assert one_in(384) == (8, 4, 2, 1)
    assert one_in(96) == (2, 1)
    assert one_in(95) == (1,)
    assert one_in(16) == (1,)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def single_sample(cost):
    """A single one, of a single example."""
    return [lambda routes: torch.tensor([cost(routes)], dtype=torch.float64)]
