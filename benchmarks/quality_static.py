"""Static counterparts of routers: fixed patterns with as many sparse layers, found in many ways."""

import argparse
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fluxcompile.evaluation import OneGraph, Results, builtin_prompts
from fluxcompile.evaluation.compare import kind_weights, omega
from fluxcompile.model_layers import attention_layers
from fluxcompile.training.baselines import greedy_order, matrix_entropies, random_routes
from quality_contenders import RouterRun

METHODS = ("greedy", "entropy", "random", "majority")
_SLACK = 1e-6  # of a number of layers that rounding may have taken away

Routes = tuple[int, ...]


class Search:
    """Orders of layers, from the first to be made sparse to the last, on training prompts.

    Greedy search needs a ``graph``, which serves every pattern.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, graph: OneGraph | None, args: argparse.Namespace
    ) -> None:
        self.model, self.graph, self.args = model, graph, args
        self.layers = len(attention_layers(model))
        self._tokenizer = tokenizer
        self._greedy: list[int] = []

    def greedy(self, count: int) -> Routes:
        """Again and again the layer that costs the least loss. Goes on where it last stopped."""
        if len(self._greedy) < count:
            print(f"greedy search for {count} sparse layers of {self.layers}")
            self._greedy = greedy_order(self._cost, self.layers, count)
        return self._sparse(self._greedy[:count])

    def entropy(self, count: int) -> Routes:
        """Least matrix entropy of the layer's input first (arXiv 2604.07394, App. C)."""
        return self._sparse(self._entropies[:count])

    def _sparse(self, chosen: Sequence[int]) -> Routes:
        return tuple(int(layer not in chosen) for layer in range(self.layers))

    @cached_property
    def _prompts(self) -> list:
        cells = builtin_prompts(
            self._tokenizer,
            tasks=self.args.tasks,
            lengths=[self.args.search_length],
            examples=self.args.search_examples,
            seed=self.args.seed,
            style=self.args.style,
            split="train",
        )
        return [prompt for prompts in cells.values() for prompt in prompts]

    @cached_property
    def _entropies(self) -> list[int]:
        prompts = [torch.tensor(p.prompt + p.target) for p in self._prompts]
        with torch.no_grad():
            found = matrix_entropies(self.model, prompts)
        return sorted(range(self.layers), key=found.__getitem__)

    def _cost(self, routes: Routes) -> float:
        """Mean loss over the prompts."""
        prompts, batch = self._prompts, self.args.batch
        padded = prompts + prompts[-1:] * (-len(prompts) % batch)
        engine = self.graph.pattern(routes)
        losses = [engine(padded[i : i + batch]).loss for i in range(0, len(padded), batch)]
        return float(torch.cat(losses)[: len(prompts)].mean())


def sparse_layers(results: Results) -> int:
    """As many as the routes have on average over the mixture, rounded down: more is not fair."""
    layers = next(iter(results.values())).full.shape[1]
    return math.floor(omega(results) * layers + _SLACK)


def counterparts(
    search: Search, routers: Sequence[RouterRun], methods: Sequence[str], also: Sequence[int]
) -> dict[str, Routes]:
    """Patterns by name, without those that are the same for all methods: none and all sparse."""
    counts = sorted({*(sparse_layers(run.results) for run in routers), *also}, reverse=True)
    patterns: dict[str, Routes] = {}
    for count in counts:
        if not 0 < count < search.layers:
            continue
        of = f"{count}/{search.layers}"
        for method in methods:
            if method == "random":
                routes = random_routes(search.layers, count, search.args.seed)
                patterns[f"random {of}"] = routes
            elif method != "majority":
                patterns[f"{method} {of}"] = getattr(search, method)(count)
    if "majority" in methods:
        for run in routers:
            count = sparse_layers(run.results)
            if 0 < count < search.layers:
                patterns[f"majority of {run.name}"] = majority(run.results, count)
    return patterns


def majority(results: Results, count: int) -> Routes:
    """Sparse where the router most often is, in ``count`` layers; cells weigh as in the mixture."""
    shares = torch.stack([result.full.double().mean(dim=0) for result in results.values()])
    often_full = kind_weights(list(results)) @ shares
    chosen = set(often_full.argsort(stable=True)[:count].tolist())
    return tuple(int(layer not in chosen) for layer in range(len(often_full)))
