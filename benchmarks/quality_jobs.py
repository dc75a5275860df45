"""What there is to compute, as jobs: any worker can do any of them, and all would find the same.

A job is small and can be sent to another process. ``about`` says all that its result depends on
beyond model, prompts and the settings common to all; ``run`` does it with a worker's model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fluxcompile.config import FluxConfig
from fluxcompile.router import FluxRouter
from fluxcompile.training.patterns import serves
from quality_outcome import Outcome

if TYPE_CHECKING:
    from quality_worker import Worker


@dataclass(frozen=True)
class Full:
    """Full attention as a user runs it: what all else is held against."""

    config: FluxConfig
    name: str = "full"

    def about(self) -> list[Any]:
        return ["full", self.config.to_dict()]

    def run(self, worker: Worker) -> Outcome:
        started = time.perf_counter()
        with worker.as_user(routes="full", config=self.config) as engine:
            results = worker.evaluate(self.name, engine)
        return Outcome(time.perf_counter() - started, results, "user")


@dataclass(frozen=True)
class Routed:
    """A learned router, through a compile of its own or the shared one of its config.

    Attributes:
        directory: of the router.
        bias: that it is given.
        digest: of its weights, with the bias.
        through: ``"user"`` or ``"graph"``.
    """

    name: str
    config: FluxConfig
    directory: str
    bias: float
    digest: str
    through: str

    def about(self) -> list[Any]:
        return ["router", self.config.to_dict(), self.digest, self.through]

    def run(self, worker: Worker) -> Outcome:
        started = time.perf_counter()
        router = FluxRouter.from_pretrained(self.directory).biased(self.bias).to(worker.args.device)
        if self.through == "graph":
            results = worker.evaluate(self.name, worker.graph(self.config).routed(router))
        else:
            with worker.as_user(router=router) as engine:
                results = worker.evaluate(self.name, engine)
        return Outcome(time.perf_counter() - started, results, self.through)


@dataclass(frozen=True)
class Greedy:
    """Greedy search for ``depth`` sparse layers: one after the other, on one worker.

    Attributes:
        method: its name among the methods.
        kind: of prompts that it goes by; None for all.
    """

    config: FluxConfig
    depth: int
    method: str
    kind: str | None

    @property
    def name(self) -> str:
        return f"{self.method} search"

    def about(self) -> list[Any]:
        return ["greedy", self.config.to_dict(), self.depth, self.kind]

    def run(self, worker: Worker) -> Outcome:
        started = time.perf_counter()
        order = worker.search.greedy(worker.graph(self.config), self.depth, self.kind)
        return Outcome(time.perf_counter() - started, order=tuple(order))


@dataclass(frozen=True)
class Exchanged:
    """Exchanges of layers after greedy search, for one number of sparse layers.

    Attributes:
        routes: that greedy search found.
        method: its name among the methods.
        kind: of prompts that both go by; None for all.
    """

    config: FluxConfig
    routes: tuple[int, ...]
    method: str
    kind: str | None

    @property
    def name(self) -> str:
        return f"{self.method} {self.routes.count(0)}/{len(self.routes)} search"

    def about(self) -> list[Any]:
        return ["exchanged", self.config.to_dict(), list(self.routes), self.kind]

    def run(self, worker: Worker) -> Outcome:
        started = time.perf_counter()
        found = worker.search.exchanged(worker.graph(self.config), self.routes, self.kind)
        return Outcome(time.perf_counter() - started, order=tuple(found))


@dataclass(frozen=True)
class Entropies:
    """The layers by matrix entropy."""

    name: str = "entropies"

    def about(self) -> list[Any]:
        return ["entropies"]

    def run(self, worker: Worker) -> Outcome:
        started = time.perf_counter()
        return Outcome(time.perf_counter() - started, order=tuple(worker.search.entropy()))


@dataclass(frozen=True)
class Pattern:
    """Fixed routes, through the compile that serves every pattern if the config allows it.

    Attributes:
        routes: one 0/1 a layer, 1 for full attention.
        expected: as :meth:`Worker.agreement` takes it; a worker's shared compile must agree with
            full attention before it is used.
    """

    name: str
    config: FluxConfig
    routes: tuple[int, ...]
    expected: dict = field(compare=False)

    def about(self) -> list[Any]:
        return ["pattern", self.config.to_dict(), list(self.routes)]

    def run(self, worker: Worker) -> Outcome:
        if not serves(self.config):
            started = time.perf_counter()
            with worker.as_user(routes=self.routes, config=self.config) as engine:
                results = worker.evaluate(self.name, engine)
            return Outcome(time.perf_counter() - started, results, "user")
        graph = worker.graph(self.config)
        apart = worker.agreement(self.expected)
        started = time.perf_counter()
        results = worker.evaluate(self.name, graph.pattern(self.routes))
        return Outcome(time.perf_counter() - started, results, "graph", apart)


Job = Full | Routed | Greedy | Exchanged | Entropies | Pattern
