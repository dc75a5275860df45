"""Every peer on one prompt: compiled, checked, warmed up, timed."""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

import fluxcompile
from checking import checked_error
from common import PeakMemory, forget_compiled, median_seconds, seconds, synchronise
from fluxcompile.backend import last_compile_stats
from fluxcompile.cache_argument import cache_argument
from models import pairs_full, pairs_streaming, prefill_flops
from router_cost import RouterCost, measured_cost, untuned
from routing import check_routes, router_for, spread_dense


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
        name: in the table.
        compiler: "eager", "inductor" or "flux".
        routes: one 0/1 a layer, 1 for full attention.
        router: routers decide these routes, instead of a fixed pattern.
        chunk: the prompt comes in pieces of so many tokens; 0 for all at once.
    """

    name: str
    compiler: str
    routes: tuple[int, ...]
    router: bool = False
    chunk: int = 0


@dataclass(frozen=True)
class Result:
    """One peer at one length. Times in seconds, memory in bytes; None where it does not apply."""

    peer: str
    length: int
    omega: float
    median: float
    times: list[float]
    floor: float
    compile: float | None = None
    passes: float | None = None
    sites: int | None = None
    peak_memory: int = 0
    error: float | None = None


def peers(args: argparse.Namespace, layers: int) -> list[Peer]:
    """Those of ``args``, for a model of so many layers."""
    full = (1,) * layers
    found = [
        Peer(name, name.removesuffix("-router"), full, router=name == "flux-router")
        for name in args.peers
    ]
    for omega in args.omega:
        routes = tuple(spread_dense(layers, omega))
        name = f"flux Ω={omega:.2f}"
        found.append(Peer(name, "flux", routes))
        if args.router:
            found.append(Peer(f"{name}, router", "flux", routes, router=True))
        if args.chunk:
            chunked = f"{name}, router, chunks of {args.chunk}"
            found.append(Peer(chunked, "flux", routes, router=True, chunk=args.chunk))
    return found


class Prefill:
    """One prompt of ``length`` tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: fluxcompile.FluxConfig,
        length: int,
        ceiling: float,
        args: argparse.Namespace,
    ) -> None:
        self.model, self.config, self.length = model, config, length
        self.ceiling, self.args = ceiling, args
        self.layers = model.config.num_hidden_layers
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
        self.input_ids = ids.to(model.device)
        self._expected: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.no_grad()
    def run(self, peer: Peer) -> Result:
        """Compile, check, warm up, time.

        Raises:
            WrongLogits: before anything is timed.
        """
        eager = peer.compiler == "eager"
        expected = None if eager else self.expected(peer.routes)
        if peer.router:
            self.attach(peer.routes)
        try:
            return self.time(peer, self.callable(peer), expected)
        finally:
            forget_compiled(self.args.device)
            if peer.router:
                fluxcompile.detach(self.model)

    def expected(self, routes: tuple[int, ...]) -> torch.Tensor:
        """Eager's logits or, where routes change them, those of the rewritten graph run eagerly."""
        if routes not in self._expected:
            sparse = {"routes": routes, "config": self.config, "lowering": "eager"}
            call = self.model if all(routes) else self.flux(**sparse)
            self._expected[routes] = self.last_logits(call)
            forget_compiled(self.args.device)
        return self._expected[routes]

    def attach(self, routes: tuple[int, ...]) -> None:
        full = torch.tensor([routes], dtype=torch.bool)
        router = router_for(self.model, self.config, full, self.input_ids)
        fluxcompile.attach(self.model, router)

    def callable(self, peer: Peer) -> Callable:
        if peer.compiler == "eager":
            return self.model
        if peer.compiler == "inductor":
            return torch.compile(self.model)
        return self.flux(routes="router" if peer.router else peer.routes, config=self.config)

    def flux(self, lowering: str | None = None, **options) -> Callable:
        options["lowering"] = lowering or self.args.lowering
        return torch.compile(self.model, backend="flux", options=options)

    def time(self, peer: Peer, call: Callable, expected: torch.Tensor | None) -> Result:
        device = self.args.device
        once = functools.partial(self.last_logits, call, peer.chunk)
        started = time.perf_counter()
        logits = once()
        synchronise(device)
        first_call = time.perf_counter() - started
        stats = last_compile_stats() if peer.compiler == "flux" else {}
        if expected is None:  # eager is what others are checked against
            self._expected[peer.routes] = expected = logits
        error = checked_error(peer.name, logits, expected, self.model.dtype)
        if peer.router:
            check_routes(self.model, torch.tensor([peer.routes], dtype=torch.bool))
        for _ in range(self.args.warm_up):
            once()
        with PeakMemory(device) as peak:
            times = seconds(once, self.args.repeat, device)
        median = statistics.median(times)
        return Result(
            peer=peer.name,
            length=self.length,
            omega=1 - sum(peer.routes) / len(peer.routes),
            median=median,
            times=times,
            floor=self.floor(peer.routes),
            compile=None if peer.compiler == "eager" else first_call - median,
            passes=stats.get("passes_seconds"),
            sites=stats.get("sites"),
            peak_memory=peak.bytes,
            error=error,
        )

    def last_logits(self, call: Callable, chunk: int = 0) -> torch.Tensor:
        """Logits [vocabulary] in fp32 of the prompt's last token, with a new cache."""
        cache = DynamicCache(config=self.model.config)
        cached = {cache_argument(self.model): cache}
        mask = torch.ones_like(self.input_ids)
        seen = 0
        for ids in self.input_ids.split(chunk or self.length, dim=1):
            seen += ids.shape[1]
            output = call(
                input_ids=ids,
                attention_mask=mask[:, :seen],
                use_cache=True,
                logits_to_keep=1,
                **cached,
            )
        return output.logits[0, -1].float()

    @torch.no_grad()
    def router_cost(self, pairs: int, routes: tuple[int, ...]) -> RouterCost:
        """What the routers add to one call, from pairs of calls made one after the other."""
        options = {"inductor": untuned(self.args.device), "config": self.config}
        without = self.flux(routes=routes, **options)
        self.last_logits(without)
        self.attach(routes)
        routed = self.flux(routes="router", **options)
        try:
            for call in (routed, without, routed):
                self.last_logits(call)
            fixed_run, routed_run = (
                functools.partial(self.call_seconds, call) for call in (without, routed)
            )
            return measured_cost(fixed_run, routed_run, pairs)
        finally:
            fluxcompile.detach(self.model)
            forget_compiled(self.args.device)

    def call_seconds(self, call: Callable) -> float:
        return median_seconds(lambda: self.last_logits(call), 1, self.args.device)

    def floor(self, routes: tuple[int, ...]) -> float:
        sparse = pairs_streaming(self.length, self.config.sink, self.config.local)
        seen = [pairs_full(self.length) if full else sparse for full in routes]
        reach = min(self.length, self.config.sink + self.config.local)
        seen[-1] = self.length if routes[-1] else reach  # one query: only its logits are wanted
        return prefill_flops(self.model.config, self.length, seen) / self.ceiling
