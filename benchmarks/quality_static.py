"""Static counterparts of routers: fixed patterns with as many sparse layers, found in many ways."""

import math
from collections.abc import Mapping, Sequence

import torch

from fluxcompile.evaluation import Results
from fluxcompile.evaluation.compare import kind_weights, omega
from fluxcompile.training.baselines import random_routes
from quality_contenders import RouterRun

METHODS = ("greedy", "greedy-retrieval", "entropy", "random", "majority")
#: greedy search, and the prompts that it goes by: of one kind, or all
SEARCHED = {"greedy": None, "greedy-retrieval": "retrieval"}
ORDERED = (*SEARCHED, "entropy")  # those that put the layers in an order, see quality_search
_SLACK = 1e-6  # of a number of layers that rounding may have taken away

Routes = tuple[int, ...]


def sparse_layers(results: Results) -> int:
    """As many as the routes have on average over the mixture, rounded down: more is not fair."""
    layers = next(iter(results.values())).full.shape[1]
    return math.floor(omega(results) * layers + _SLACK)


def counterparts(
    layers: int,
    routers: Sequence[RouterRun],
    methods: Sequence[str],
    orders: Mapping[str, Sequence[int]],
    *,
    also: Sequence[int] = (),
    seed: int = 0,
) -> dict[str, Routes]:
    """Patterns by name, without those that are the same for all methods: none and all sparse.

    Args:
        layers: of the model.
        routers: whose numbers of sparse layers to match.
        methods: some of `METHODS`.
        orders: of every method that is `ORDERED`, the layers to make sparse, first to last.
        also: further numbers of sparse layers.
        seed: of random patterns.
    """
    counts = sorted({*(sparse_layers(run.results) for run in routers), *also}, reverse=True)
    patterns: dict[str, Routes] = {}
    for count in counts:
        if not 0 < count < layers:
            continue
        of = f"{count}/{layers}"
        for method in methods:
            if method == "random":
                patterns[f"random {of}"] = random_routes(layers, count, seed)
            elif method in ORDERED:
                patterns[f"{method} {of}"] = _sparse_in(orders[method][:count], layers)
    if "majority" in methods:
        for run in routers:
            count = sparse_layers(run.results)
            if 0 < count < layers:
                patterns[f"majority of {run.name}"] = majority(run.results, count)
    return patterns


def majority(results: Results, count: int) -> Routes:
    """Sparse where the router most often is, in ``count`` layers; cells weigh as in the mixture."""
    shares = torch.stack([result.full.double().mean(dim=0) for result in results.values()])
    often_full = kind_weights(list(results)) @ shares
    return _sparse_in(often_full.argsort(stable=True)[:count].tolist(), len(often_full))


def _sparse_in(chosen: Sequence[int], layers: int) -> Routes:
    return tuple(int(layer not in chosen) for layer in range(layers))
