"""Fixed routes of a given number of sparse layers that cost little: searched layer by layer."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

Routes = tuple[int, ...]
#: of routes, one 0 or 1 (full attention) a layer
Cost = Callable[[Routes], float]
#: of routes, what they cost on each of some examples: fp64 ``[N]``
Sample = Callable[[Routes], torch.Tensor]

_SURE = 2.0  # standard errors
# Examples that show which layers are not worth much. Twice as many begin a race: with fewer, a
# layer that these happen not to need would never be tried on more.
_FEWEST = 48


def search_routes(cost: Cost, layers: int, sparse_layers: int, **settings: Any) -> Routes:
    """Routes of ``sparse_layers`` sparse layers that greedy search finds.

    Args:
        cost, layers, sparse_layers, settings: as :func:`greedy_order` takes them.
    """
    if sparse_layers == layers:  # nothing to choose
        return with_sparse(range(layers), layers)
    return with_sparse(greedy_order(cost, layers, sparse_layers, **settings), layers)


def greedy_order(
    cost: Cost,
    layers: int,
    sparse_layers: int,
    found: Callable[[int], None] | None = None,
    lazy: bool = False,
) -> list[int]:
    """Layers in the order in which greedy search makes them sparse.

    The first ``k`` of them are what it finds for ``k`` sparse layers.

    Args:
        cost: of a pattern.
        layers: how many there are.
        sparse_layers: how many to choose.
        found: takes each further layer as soon as it is found.
        lazy: Minoux's search (1978), several times as fast: a layer is tried again only where what
            it added to the cost when it was last tried is less than the best adds now. It finds
            what trying all finds, if no layer adds the less the more others are sparse.
    """
    order: list[int] = []
    added = dict.fromkeys(range(layers), -math.inf)  # when last tried
    before = cost(with_sparse(order, layers)) if lazy and sparse_layers else 0.0
    while len(order) < sparse_layers:
        costs: dict[int, float] = {}
        for layer in sorted(added, key=added.__getitem__) if lazy else added:
            if lazy and costs and min(costs.values()) - before <= added[layer]:
                break
            costs[layer] = cost(with_sparse([*order, layer], layers))
        added.update({layer: value - before for layer, value in costs.items()})
        best = min(costs, key=costs.__getitem__)
        before = costs[best]
        del added[best]
        order.append(best)
        if found is not None:
            found(best)
    return order


def searched(
    samples: Sequence[Sample],
    layers: int,
    sparse_layers: int,
    found: Callable[[int], None] | None = None,
) -> tuple[Routes, Routes]:
    """What greedy search finds on the first of ``samples``, and exchanges after it on the others.

    Args:
        samples: of what a pattern costs, ever larger ones.
        layers, sparse_layers: as :func:`greedy_order` takes them.
        found: takes each layer that greedy search makes sparse.
    """
    greedy = search_routes(mean_of(samples[0]), layers, sparse_layers, found=found, lazy=True)
    return greedy, after_greedy(samples, greedy)


def after_greedy(samples: Sequence[Sample], routes: Routes) -> Routes:
    """:func:`exchanged` of what greedy search found on the first of ``samples``, on the others."""
    return exchanged(samples[1:] or samples, routes)


def exchanged(samples: Sequence[Sample], routes: Routes) -> Routes:
    """``routes``, with one full layer changed for a sparse one as long as that costs less.

    Greedy search never takes back a layer that it has made sparse, whatever it makes sparse after.
    Here the sparse layer that helps the most is made full again, then the full one that costs the
    least sparse, as in floating search (Pudil et al. 1994).

    Args:
        samples: of what a pattern costs, ever larger ones; the last one decides, the others say
            which patterns it need not be asked about (see :func:`cheapest`).
        routes: 1 for full attention; as many of them are full afterwards.
    """
    cost = mean_of(samples[-1])
    while 0 < sum(routes) < len(routes):
        wider = cheapest(_switched(routes, 0), samples)
        found = cheapest(_switched(wider, 1), samples)
        if found == routes or cost(found) >= cost(routes):
            break
        routes = found
    return routes


def cheapest(candidates: Sequence[Routes], samples: Sequence[Sample]) -> Routes:
    """The candidate that costs the least, by a race on ever more examples.

    After each sample but the last, the better half goes on (successive halving, Karnin et al.
    2013), and of it those alone that are not surely worse than the best: by more than twice the
    standard error of the mean of the differences, example by example (as in racing, Maron and
    Moore 1994).

    Args:
        candidates: at least one.
        samples: ever larger ones.
    """
    left = list(candidates)
    for sample in samples[:-1]:
        if len(left) == 1:
            break
        values = torch.stack([sample(routes) for routes in left])
        order = values.mean(dim=1).argsort(stable=True)[: math.ceil(len(left) / 2)].tolist()
        apart = values - values[order[0]]
        error = apart.std(dim=1, correction=0) / math.sqrt(values.shape[1])
        left = [left[i] for i in order if apart[i].mean() <= _SURE * error[i]]
    return left[0] if len(left) == 1 else min(left, key=mean_of(samples[-1]))


def one_in(examples: int) -> tuple[int, ...]:
    """Of ``examples``, ever larger parts, as one in so many; the last is all of them."""
    parts, size = [], _FEWEST
    while 2 * size <= examples:
        parts.append(examples // size)
        size *= 2
    return (*parts, 1)


def samples_of(
    run: Callable[[Routes, int], torch.Tensor], batches: int, parts: Sequence[int]
) -> list[Sample]:
    """A sample for each of ``parts``, one in so many batches; no batch is run twice for routes.

    Args:
        run: what routes cost on each example of a batch, given by its position.
        batches: how many there are.
        parts: as :func:`one_in` gives them.
    """
    kept = functools.cache(run)

    def on(which: range) -> Sample:
        return lambda routes: torch.cat([kept(routes, i_batch) for i_batch in which])

    return [on(range(0, batches, part)) for part in parts]


def mean_of(sample: Sample) -> Cost:
    """The cost of routes that a sample gives."""
    return lambda routes: float(sample(routes).mean())


def with_sparse(sparse: Sequence[int], layers: int) -> Routes:
    """Routes that are full in all of ``layers`` layers but ``sparse``."""
    return tuple(int(layer not in sparse) for layer in range(layers))


def _switched(routes: Routes, which: int) -> list[Routes]:
    """With each layer that is ``which`` switched to the other, one at a time."""
    return [
        (*routes[:layer], 1 - which, *routes[layer + 1 :])
        for layer, route in enumerate(routes)
        if route == which
    ]
