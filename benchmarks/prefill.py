"""Prefill of a long prompt: eager, plain Inductor and flux, timed in one run.

    python benchmarks/prefill.py --lengths 32768 --json benchmarks/results/prefill.json
    python benchmarks/prefill.py --lengths 8192 --router-pairs 20                # routers' cost
    python benchmarks/prefill.py --device cpu --tiny --lengths 512               # does it run?

Random weights of Llama-3.1-8B's shape, batch 1, a mask of ones and an empty DynamicCache as
``generate`` gives them, logits of the last token only. Every peer that computes full attention
must agree with eager before its time is reported.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaForCausalLM

import fluxcompile
from common import (
    PeakMemory,
    environment,
    forget_compiled,
    matmul_ceiling,
    median_seconds,
    print_table,
    seconds,
    synchronise,
    write_json,
)
from fluxcompile.backend import last_compile_stats
from models import SHAPES, pairs_full, pairs_streaming, prefill_flops, random_llama

PEERS = ("eager", "inductor", "flux", "flux-router")

# |peer - eager| over |eager|, both norms of the last token's logits. In bf16 eager itself is 2e-2
# from fp32 on a small model of this depth, and attention to the wrong keys is 4e-1 off.
ERROR_BOUND = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


class WrongLogits(Exception):
    """A peer disagrees with eager: its speed is not reported."""


@dataclass(frozen=True)
class Result:
    """One peer at one length. Times in seconds, memory in bytes; None where it does not apply."""

    peer: str
    length: int
    median: float
    times: list[float]
    floor: float
    compile: float | None = None
    passes: float | None = None
    sites: int | None = None
    peak_memory: int = 0
    error: float | None = None


@dataclass(frozen=True)
class RouterCost:
    """Seconds by which a routed call took longer, pair by pair; a graph against itself."""

    added: list[float]
    control: list[float]

    def __str__(self) -> str:
        return f"{_middle(self.added)}; a graph against itself: {_middle(self.control)}"


def _middle(added: list[float]) -> str:
    low, median, high = (1000 * value for value in statistics.quantiles(added, n=4))
    return f"{median:+.2f} ms (quartiles {low:+.2f} to {high:+.2f})"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--omega",
        type=float,
        nargs="*",
        default=[],
        help="also flux with this share of layers sparse, in a fixed pattern (changes the logits)",
    )
    parser.add_argument("--sink", type=int, default=fluxcompile.FluxConfig().sink)
    parser.add_argument("--local", type=int, default=fluxcompile.FluxConfig().local)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--router-pairs",
        type=int,
        default=0,
        help="time this many pairs of calls without and with routers, 2 or more: what routers cost",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the script")
    parser.add_argument("--lowering", default="inductor", help="of the flux peers")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    shape = "tiny" if args.tiny else "llama-3.1-8b"
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    ceiling = matmul_ceiling(args.device, dtype)
    model = random_llama(shape, args.layers, args.device, dtype)
    config = fluxcompile.FluxConfig(sink=args.sink, local=args.local)
    record = {
        "benchmark": "prefill",
        "environment": environment(args.device),
        "model": {**SHAPES[shape], "shape": shape, "num_hidden_layers": len(model.model.layers)},
        "dtype": str(dtype).removeprefix("torch."),
        "batch": 1,
        "flux_config": config.to_dict(),
        "matmul_ceiling_flops": ceiling,
        "results": [],
    }
    for key, value in record["environment"].items():
        print(f"{key:>12}: {value}")
    print(f"{'matmul':>12}: {ceiling / 1e12:.1f} TFLOP/s in {record['dtype']}")
    for length in args.lengths:
        prefill = Prefill(model, config, length, ceiling, args)
        results = prefill.run()
        title = f"prefill of {length} tokens, {shape}, {len(model.model.layers)} layers"
        print_table(title, [table_row(result, results) for result in results])
        record["results"] += [asdict(result) for result in results]
        if args.router_pairs:
            cost = prefill.router_cost(args.router_pairs)
            record.setdefault("router_cost", {})[length] = asdict(cost)
            print(f"all {prefill.layers} routers together, {length} tokens: {cost}")
        write_json(args.json, record)
        if prefill.wrong:
            raise SystemExit(f"wrong at {length} tokens: {prefill.wrong}")


class Prefill:
    """Every peer on one prompt of ``length`` tokens."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        config: fluxcompile.FluxConfig,
        length: int,
        ceiling: float,
        args: argparse.Namespace,
    ) -> None:
        self.model, self.config, self.length = model, config, length
        self.ceiling, self.args = ceiling, args
        self.layers = len(model.model.layers)
        self.wrong: list[str] = []
        self.input_ids = torch.randint(model.config.vocab_size, (1, length), device=args.device)

    @torch.no_grad()
    def run(self) -> list[Result]:
        self.eager_logits = self.last_logits(self.model)
        full = [1] * self.layers
        results = []
        for peer in self.args.peers:
            if peer == "flux-router":
                router = fluxcompile.FluxRouter.from_model(self.model, self.config)
                fluxcompile.attach(self.model, router.to(self.args.device))
            try:
                results.append(self.time(peer, self.callable(peer), full))
            except WrongLogits as problem:
                print(problem)
                self.wrong.append(peer)
                forget_compiled(self.args.device)
            if peer == "flux-router":
                fluxcompile.detach(self.model)
        for omega in self.args.omega:
            routes = spread_dense(self.layers, omega)
            call = self.flux(routes=routes, config=self.config)
            results.append(self.time(f"flux Ω={omega:.2f}", call, routes))
        return results

    @torch.no_grad()
    def router_cost(self, pairs: int) -> RouterCost:
        """What the routers add to one call, from pairs of calls made one after the other.

        Clocks and power drift by more than routers cost, and the second call of a pair meets a
        warmer GPU: each pair is timed in both orders, and the same graph against itself tells
        what is left of either. Inductor tunes pointwise kernels by timing them, so that the same
        kernel may come out slower in one of two graphs; here neither graph is tuned.
        """
        untuned = {"triton.autotune_pointwise": False} if self.args.device == "cuda" else {}
        without = self.flux(routes="full", inductor=untuned)
        self.last_logits(without)
        router = fluxcompile.FluxRouter.from_model(self.model, self.config)
        fluxcompile.attach(self.model, router.to(self.args.device))
        routed = self.flux(routes="router", inductor=untuned)
        for call in (routed, without, routed):
            self.last_logits(call)
        cost = RouterCost(
            added=[self.difference(without, routed) for _ in range(pairs)],
            control=[self.difference(without, without) for _ in range(pairs)],
        )
        fluxcompile.detach(self.model)
        forget_compiled(self.args.device)
        return cost

    def difference(self, one: Callable, other: Callable) -> float:
        """Seconds that ``other`` takes longer than ``one``, the mean over both orders."""
        turns = [(one, -0.5), (other, 0.5), (other, 0.5), (one, -0.5)]
        return sum(
            sign * median_seconds(lambda call=call: self.last_logits(call), 1, self.args.device)
            for call, sign in turns
        )

    def callable(self, peer: str) -> Callable:
        if peer == "eager":
            return self.model
        if peer == "inductor":
            return torch.compile(self.model)
        return self.flux(routes="router" if peer == "flux-router" else "full")

    def flux(self, **options) -> Callable:
        options["lowering"] = self.args.lowering
        return torch.compile(self.model, backend="flux", options=options)

    def time(self, peer: str, call: Callable, routes: list[int]) -> Result:
        """Compile, check, warm up, time.

        Raises:
            WrongLogits: before anything is timed.
        """
        device = self.args.device
        started = time.perf_counter()
        logits = self.last_logits(call)
        synchronise(device)
        first_call = time.perf_counter() - started
        stats = last_compile_stats() if peer.startswith("flux") else {}
        # Sparse layers change the logits on purpose: only full attention must agree with eager.
        error = self.checked_error(peer, logits) if all(routes) else None
        for _ in range(2):
            self.last_logits(call)
        with PeakMemory(device) as peak:
            times = seconds(lambda: self.last_logits(call), self.args.repeat, device)
        forget_compiled(device)
        median = statistics.median(times)
        print(f"{peer}, {self.length} tokens: {1000 * median:.1f} ms", flush=True)
        return Result(
            peer=peer,
            length=self.length,
            median=median,
            times=times,
            floor=self.floor(routes),
            compile=None if peer == "eager" else first_call - median,
            passes=stats.get("passes_seconds"),
            sites=stats.get("sites"),
            peak_memory=peak.bytes,
            error=error,
        )

    def last_logits(self, call: Callable) -> torch.Tensor:
        """Logits [vocabulary] in fp32 of the prompt's last token, with a new cache."""
        output = call(
            input_ids=self.input_ids,
            attention_mask=torch.ones_like(self.input_ids),
            past_key_values=DynamicCache(config=self.model.config),
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[0, -1].float()

    def checked_error(self, peer: str, logits: torch.Tensor) -> float:
        difference = (logits - self.eager_logits).norm() / self.eager_logits.norm()
        error, bound = difference.item(), ERROR_BOUND[self.model.dtype]
        if not error <= bound:  # also where it is nan
            raise WrongLogits(f"{peer}: logits differ from eager by {error:.2e}, bound {bound:.0e}")
        return error

    def floor(self, routes: list[int]) -> float:
        sparse = pairs_streaming(self.length, self.config.sink, self.config.local)
        seen = [pairs_full(self.length) if full else sparse for full in routes]
        return prefill_flops(self.model.config, self.length, seen) / self.ceiling


def spread_dense(layers: int, omega: float) -> list[int]:
    """A 0/1 pattern with ``omega`` of the layers sparse (0), the dense ones evenly spread."""
    dense = layers - round(omega * layers)
    return [(i + 1) * dense // layers - i * dense // layers for i in range(layers)]


def table_row(result: Result, results: list[Result]) -> dict[str, str]:
    def times(peer: str) -> str:
        of = next((other.median for other in results if other.peer == peer), None)
        return "—" if of is None else f"{result.median / of:.3f}×"

    def number(value: float | None, form: str) -> str:
        return "—" if value is None else format(value, form)

    return {
        "peer": result.peer,
        "median ms": f"{1000 * result.median:.1f}",
        "of eager": times("eager"),
        "of inductor": times("inductor"),
        "floor ms": f"{1000 * result.floor:.1f}",
        "peak GiB": f"{result.peak_memory / 2**30:.2f}" if result.peak_memory else "—",
        "compile s": number(result.compile, ".1f"),
        "passes s": number(result.passes, ".2f"),
        "sites": number(result.sites, "d"),
        "error": number(result.error, ".1e"),
    }


if __name__ == "__main__":
    main()
