"""Who takes a decode step: compiler, CUDA graphs or not, cache, and who decides the routes."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch._inductor import list_mode_options
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

import fluxcompile
from caches import new_cache
from fluxcompile import FluxConfig
from fluxcompile.cache_argument import cache_argument
from router_cost import untuned
from routing import check_routes, router_for, rows_alike, rows_mixed

ROUTES = ("static", "router", "mixed")


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        compiler: "eager", "inductor" or "flux".
        cache: one of `caches.KINDS`.
        graphs: with CUDA graphs, as ``mode="reduce-overhead"`` sets them up.
        omega: share of the layers that are sparse.
        routes: "static", a fixed pattern; "router", routers that decide that pattern; "mixed",
            routers that decide another one for every row.
    """

    compiler: str
    cache: str
    graphs: bool = False
    omega: float = 0.0
    routes: str = "static"

    @property
    def name(self) -> str:
        parts = [self.compiler + " + graphs" * self.graphs, f"{self.cache} cache"]
        if self.compiler == "flux":
            parts += [f"Ω={self.omega:.2f}", self.routes]
        return ", ".join(parts)

    def full(self, layers: int, batch: int) -> torch.Tensor:
        """bool ``[B, L]``, True for full attention."""
        make = rows_mixed if self.routes == "mixed" else rows_alike
        return make(layers, self.omega, batch)


def contenders(args: argparse.Namespace, batch: int) -> Iterator[Contender]:
    """Those of ``args`` for ``batch`` rows."""
    graphs = (False, True) if args.device == "cuda" else (False,)
    yield from (Contender("eager", cache) for cache in ("dynamic", "static"))
    yield from (Contender("inductor", "static", with_graphs) for with_graphs in graphs)
    for cache in args.caches:
        for routes in args.routes:
            for omega in args.omega:
                if routes == "mixed" and (batch == 1 or not 0 < omega < 1):
                    continue
                for with_graphs in graphs:
                    yield Contender("flux", cache, with_graphs, omega, routes)


def routed_contenders(args: argparse.Namespace) -> Iterator[Contender]:
    """Those whose routers are measured against the same routes as a fixed pattern."""
    for cache in args.caches:
        for omega in args.omega:
            yield Contender("flux", cache, args.device == "cuda", omega, "router")


class Runner:
    """One contender, made ready: a cache laid out and routed, and a compiled model.

    Args:
        full: the routes, bool ``[B, L]``.
        prompt: int64 ``[B, S]``, what the cache is laid out by.
        room: tokens that a cache of fixed size is made for.
    """

    def __init__(
        self,
        contender: Contender,
        model: PreTrainedModel,
        config: FluxConfig,
        full: torch.Tensor,
        prompt: torch.Tensor,
        room: int,
        lowering: str,
    ) -> None:
        self.contender, self.model, self.config = contender, model, config
        self.full, self.lowering = full, lowering
        self.routed = contender.compiler == "flux" and contender.routes != "static"
        if self.routed:
            fluxcompile.attach(model, router_for(model, config, full, prompt))
        self.cache = new_cache(contender.cache, model, config, room)
        try:
            self._lay_out(prompt)
        except BaseException:
            self.close()
            raise

    def _lay_out(self, prompt: torch.Tensor) -> None:
        """Run ``prompt`` into the cache: eagerly, or routed where routes or rings have to be made.

        A static cache is laid out eagerly in any case. Made in a compiled graph it would not be
        marked as staying where it is, which CUDA graphs want.
        """
        lays_rings = self.contender.cache.startswith("flux")
        if not lays_rings:
            self.model(input_ids=prompt, use_cache=True, **self.cached)
        if not (lays_rings or self.routed):
            return
        if not lays_rings:
            self.cache.reset()
        # What lowers the prompt's graph is of no account to what it leaves; this is the cheapest.
        call = torch.compile(self.model, backend="flux", options=self._options("eager"))
        call(input_ids=prompt, use_cache=True, logits_to_keep=1, **self.cached)
        if self.routed:
            check_routes(self.model, self.full)

    @property
    def cached(self) -> dict[str, Cache]:
        """The cache, by the name of the argument that takes it."""
        return {cache_argument(self.model): self.cache}

    def compiled(self) -> Callable:
        """What takes the steps."""
        graphs = self.contender.graphs
        if self.contender.compiler == "eager":
            return self.model
        if self.contender.compiler == "inductor":
            return torch.compile(self.model, mode="reduce-overhead" if graphs else None)
        return self._flux(self._options(self.lowering), {})

    def fixed_and_routed(self) -> tuple[Callable, Callable]:
        """The same routes as a fixed pattern and by the router, neither tuned by timing."""
        untimed = untuned(self.model.device.type)
        options = self._options(self.lowering)
        fixed = self._flux({**options, "routes": self._pattern}, untimed)
        return fixed, self._flux(options, untimed)

    def _flux(self, options: dict, inductor: dict) -> Callable:
        if self.contender.graphs:  # torch.compile takes mode or options
            inductor = list_mode_options("reduce-overhead") | inductor
        return torch.compile(self.model, backend="flux", options={**options, "inductor": inductor})

    def _options(self, lowering: str) -> dict:
        routes = "router" if self.routed else self._pattern
        return {"lowering": lowering, "routes": routes, "config": self.config, "strict": True}

    @property
    def _pattern(self) -> list[int]:
        """One 0/1 a layer; of rows that are routed alike."""
        return self.full[0].int().tolist()

    def close(self) -> None:
        if self.routed:
            fluxcompile.detach(self.model)
