"""Static counterparts of routers: fixed patterns with as many sparse layers, found in many ways."""

import math
from collections.abc import Mapping, Sequence

import torch

from fluxcompile.evaluation import Results
from fluxcompile.evaluation.compare import kind_weights, omega
from fluxcompile.training.baselines import random_routes
from fluxcompile.training.route_search import Routes, with_sparse
from quality_contenders import RouterRun

METHODS = (
    "greedy", "greedy-retrieval", "exchanged", "exchanged-retrieval", "entropy", "random",
    "majority",
)  # fmt: skip
#: greedy search, and the prompts that it goes by: of one kind, or all
SEARCHED = {"greedy": None, "greedy-retrieval": "retrieval"}
#: exchanges of layers, for each number of sparse ones, and the greedy search they come after
EXCHANGED = {"exchanged": "greedy", "exchanged-retrieval": "greedy-retrieval"}
ORDERED = (*SEARCHED, "entropy")  # those that put the layers in an order, see quality_search
_SLACK = 1e-6  # of a number of layers that rounding may have taken away


def sparse_layers(results: Results) -> int:
    """As many as the routes have on average over the mixture, rounded down: more is not fair."""
    layers = next(iter(results.values())).full.shape[1]
    return math.floor(omega(results) * layers + _SLACK)


def counts_of(layers: int, routers: Sequence[RouterRun], also: Sequence[int] = ()) -> list[int]:
    """Numbers of sparse layers to match, most first, but for none and all.

    Args:
        layers: of the model.
        routers: whose numbers of sparse layers.
        also: further ones.
    """
    counts = {*(sparse_layers(run.results) for run in routers), *also}
    return sorted((count for count in counts if 0 < count < layers), reverse=True)


def counterparts(
    layers: int,
    routers: Sequence[RouterRun],
    methods: Sequence[str],
    orders: Mapping[str, Sequence[int]],
    exchanged: Mapping[tuple[str, int], Sequence[int]],
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
        exchanged: of methods that are `EXCHANGED`, and numbers of sparse layers, which they are;
            patterns that are not among them are left out.
        also: further numbers of sparse layers.
        seed: of random patterns.
    """
    patterns: dict[str, Routes] = {}
    for count in counts_of(layers, routers, also):
        of = f"{count}/{layers}"
        for method in methods:
            if method == "random":
                patterns[f"random {of}"] = random_routes(layers, count, seed)
            elif method in ORDERED:
                patterns[f"{method} {of}"] = with_sparse(orders[method][:count], layers)
            elif (method, count) in exchanged:
                patterns[f"{method} {of}"] = with_sparse(exchanged[method, count], layers)
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
    return with_sparse(often_full.argsort(stable=True)[:count].tolist(), len(often_full))
