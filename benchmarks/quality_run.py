"""Loading a model and running every contender on the same prompts."""

import argparse
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fluxcompile.config import FluxConfig
from fluxcompile.errors import FluxError
from fluxcompile.evaluation import AsUser, OneGraph, Results, evaluate
from fluxcompile.evaluation.command import counting
from fluxcompile.evaluation.compare import omega
from fluxcompile.evaluation.evaluate import Engine
from fluxcompile.evaluation.one_graph import serves
from fluxcompile.evaluation.prompts import Cells
from fluxcompile.training.command import load_model
from quality_contenders import NamedRouter, RouterRun, Run, StaticRun, same_attention
from quality_static import Search, counterparts
from quality_tiny import load_tiny

#: by how much the loss of a cell may differ between the two compiles of full attention: rounding
#: of bf16 moves single tokens, and hardly their mean
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 3e-3}


class Disagreement(FluxError):
    """The two compiles do not compute the same: no number of either is reported."""


def load(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The model in eval mode on the device, and its tokenizer."""
    name = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    dtype = getattr(torch, name)
    if args.tiny:
        return load_tiny(args.device, dtype)
    model, tokenizer = load_model(args.model, name)
    if tokenizer is None:
        raise FluxError(f"--model {args.model}: expected one with a tokenizer, got none")
    return model.to(args.device).eval(), tokenizer


class Bench:
    """Runs contenders on ``cells``; says how long each took."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, cells: Cells, args: argparse.Namespace
    ) -> None:
        self.model, self.tokenizer, self.cells, self.args = model, tokenizer, cells, args
        self.disagreement: float | None = None  # the largest found between the two compiles

    def full(self, config: FluxConfig) -> Run:
        """Full attention as a user runs it: what all else is held against."""
        started = time.perf_counter()
        with self._as_user(routes="full", config=config) as engine:
            results = self._evaluate("full", engine)
        self._full = results
        return Run("full", config, results, "user", time.perf_counter() - started)

    def routers(self, routers: Sequence[NamedRouter]) -> list[RouterRun]:
        """Each through a compile of its own, or as ``--through`` says."""
        runs = []
        for named in routers:
            started = time.perf_counter()
            config = named.router.config
            graph = self.args.through == "graph" and serves(config)
            named.router.check_model(self.model)
            with self._routed(named, graph) as engine:
                results = self._evaluate(named.name, engine)
            through = "graph" if graph else "user"
            seconds = time.perf_counter() - started
            runs.append(RouterRun(named.name, config, results, through, seconds, source=named))
        return runs

    def statics(
        self,
        configs: Sequence[FluxConfig],
        routers: Sequence[RouterRun],
        given: Mapping[str, tuple[int, ...]],
    ) -> list[StaticRun]:
        """Patterns for every kind of sparse attention that a router routes to."""
        distinct: list[FluxConfig] = []
        for config in configs:
            if not any(same_attention(config, other) for other in distinct):
                distinct.append(config)
        runs = []
        for config in distinct:
            alike = [run for run in routers if same_attention(run.config, config)]
            label = "" if len(distinct) == 1 else f" {config.sparse} {config.sink}+{config.local}"
            runs += self._statics(config, alike, given, label)
        return runs

    def _statics(
        self,
        config: FluxConfig,
        routers: Sequence[RouterRun],
        given: Mapping[str, tuple[int, ...]],
        label: str,
    ) -> list[StaticRun]:
        if serves(config):
            with OneGraph.of(self.model, config, lowering=self.args.lowering) as graph:
                self._check(graph)
                patterns = self._patterns(graph, routers, given)
                return [
                    self._static(name + label, config, routes, graph)
                    for name, routes in patterns.items()
                ]
        patterns = self._patterns(None, routers, given)
        return [
            self._static(name + label, config, routes, None) for name, routes in patterns.items()
        ]

    def _patterns(
        self,
        graph: OneGraph | None,
        routers: Sequence[RouterRun],
        given: Mapping[str, tuple[int, ...]],
    ) -> dict[str, tuple[int, ...]]:
        methods = list(self.args.methods)
        if graph is None and "greedy" in methods:
            print("no greedy patterns: only streaming attention has one compile for every pattern")
            methods.remove("greedy")
        search = Search(self.model, self.tokenizer, graph, self.args)
        patterns = {"all sparse": (0,) * search.layers} | dict(given)
        return patterns | counterparts(search, routers, methods, self.args.sparse_layers)

    def _static(
        self, name: str, config: FluxConfig, routes: tuple[int, ...], graph: OneGraph | None
    ) -> StaticRun:
        started = time.perf_counter()
        if graph is not None:
            results, through = self._evaluate(name, graph.pattern(routes)), "graph"
        else:
            with self._as_user(routes=routes, config=config) as engine:
                results, through = self._evaluate(name, engine), "user"
        seconds = time.perf_counter() - started
        return StaticRun(name, config, results, through, seconds, routes=routes)

    def _check(self, graph: OneGraph) -> None:
        """Full attention must score the same through both compiles."""
        layers = len(graph.router.layer_names)
        results = self._evaluate("full, again", graph.pattern([1] * layers))
        bound = AGREEMENT[next(self.model.parameters()).dtype]
        for cell, result in results.items():
            expected = float(self._full[cell].loss.mean())
            apart = abs(float(result.loss.mean()) / expected - 1)
            self.disagreement = max(self.disagreement or 0.0, apart)
            if cell.metric == "loss" and not apart <= bound:
                raise Disagreement.mismatch(
                    f"loss of {cell.task} at {cell.length}, full attention in training mode",
                    f"{expected:.4f} within {bound:.0e}",
                    f"{float(result.loss.mean()):.4f}",
                )

    @contextlib.contextmanager
    def _routed(self, named: NamedRouter, graph: bool) -> Iterator[Engine]:
        if not graph:
            with self._as_user(router=named.router) as engine:
                yield engine
            return
        lowering = self.args.lowering
        with OneGraph.of(self.model, named.router.config, lowering=lowering) as one:
            yield one.routed(named.router)

    def _as_user(self, **routing: Any) -> contextlib.AbstractContextManager[AsUser]:
        return AsUser.of(self.model, lowering=self.args.lowering, **routing)

    def _evaluate(self, name: str, engine: Engine) -> Results:
        total = sum(map(len, self.cells.values()))
        started = time.perf_counter()
        with counting(Console(stderr=True), name, total) as advance:
            results = evaluate(engine, self.cells, self.args.batch, advance)
        seconds = time.perf_counter() - started
        print(f"{name}: Ω {omega(results):.2f}, {total} prompts in {seconds:.0f} s", flush=True)
        return results
