"""A decode step: eager, Inductor and flux, without and with CUDA graphs, timed in one run.

    python benchmarks/decode.py --lengths 131072 --omega 0 0.5 0.75 --json decode.json
    python benchmarks/decode.py --lengths 32768 --batch 8 --routes static mixed
    python benchmarks/decode.py --lengths 32768 --router-pairs 10 --only routers  # routers' cost
    python benchmarks/decode.py --device cpu --tiny --lowering eager         # does it run?

Random weights of a known shape. The caches hold random keys and values and the routes of a short
prompt (see `caches.py`). Every contender takes the same first steps, which must give the logits of
the eager model on a cache that holds what these routes read; then it goes on greedily: 10 steps to
warm up, 50 under the clock. The floor is what a step has to read, weights once and keys and values,
over the rate of a large copy on this machine. No mask is passed, as there is no padding.

Beside the time: what the host takes to give a step to an idle device, and how often during timed
steps a CUDA graph was captured, a graph compiled, or (in further steps) the device waited for.
What routers cost may be less than two contenders differ by anyway: turns on one cache tell it.
"""

import argparse
import re
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict

import torch
from transformers import PreTrainedModel

import fluxcompile
from caches import KINDS, SHORT, Filling, fill
from checking import WrongLogits, checked_error
from common import (
    PeakMemory,
    copy_ceiling,
    forget_compiled,
    print_table,
    synchronise,
)
from decode_contenders import ROUTES, Contender, Runner, contenders, routed_contenders
from decode_pairs import Turns
from decode_reference import reference_logits
from models import SHAPES, decode_bytes, kv_token_bytes, load_model
from record import Record, dtype_on, failure, parse_with_common
from router_cost import RouterCost
from stepping import Stepper, watched

CHECKED, WARM_UP, HOST, WATCHED = 3, 10, 10, 5  # steps


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES, "smollm2"], default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--omega", type=float, nargs="+", default=[0.0, 0.5, 0.75])
    parser.add_argument("--caches", nargs="+", choices=KINDS, default=["flux", "static"])
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=["static", "router"])
    parser.add_argument("--sink", type=int, default=fluxcompile.FluxConfig().sink)
    parser.add_argument("--local", type=int, default=fluxcompile.FluxConfig().local)
    parser.add_argument("--steps", type=int, default=50, help="under the clock")
    parser.add_argument(
        "--router-pairs",
        type=int,
        default=0,
        help="time this many pairs of blocks of --steps, 2 or more, under a fixed pattern (each "
        "--omega) and under routers that decide the same, on one of each of --caches: what routers "
        "cost",
    )
    return parse_with_common(parser, arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    dtype = dtype_on(args.device)
    rate = copy_ceiling(args.device)
    model, about = load_model(args.shape, args.layers, args.device, dtype)
    record = Record("decode", args, {"model": about, "dtype": str(dtype).removeprefix("torch.")})
    record.say(copy_ceiling_bytes=rate)
    print(f"{'copy':>12}: {rate / 1e12:.2f} TB/s", flush=True)
    for length in args.lengths:
        for batch in args.batch:
            decode = Decode(model, length, batch, rate, args)
            decode.run(record)
            title = f"a decode step at {length} tokens, batch {batch}, {args.shape}"
            rows = [row for row in record.rows if row["setting"] == decode.setting]
            rows = [row for row in rows if "added" not in row]  # another thing than a step's time
            if rows:
                print_table(title, [table_row(row) for row in rows])
    if wrong := record.finish():
        raise SystemExit(f"wrong: {', '.join(wrong)}")


class Decode:
    """Every contender at one length and batch size."""

    def __init__(
        self,
        model: PreTrainedModel,
        length: int,
        batch: int,
        rate: float,
        args: argparse.Namespace,
    ) -> None:
        self.model, self.length, self.batch = model, length, batch
        self.rate, self.args = rate, args
        self.config = fluxcompile.FluxConfig(sink=args.sink, local=args.local)
        self.layers = model.config.num_hidden_layers
        self.setting = f"KV {length}, batch {batch}"
        # All steps fit: the last has `length` tokens behind it.
        steps = CHECKED + WARM_UP + args.steps + HOST + WATCHED
        self.filling = Filling(model, batch, length - steps)
        self.timed_at = self.filling.tokens + CHECKED + WARM_UP + args.steps // 2
        generator = torch.Generator().manual_seed(length + batch)
        vocabulary = model.config.vocab_size
        drawn = torch.randint(vocabulary, (CHECKED, batch), generator=generator)
        self.tokens = drawn.to(model.device)
        # One token over and over: routers then read rows that differ, and nothing else.
        rows = torch.randperm(vocabulary, generator=generator)[:batch, None]
        short = min(SHORT, self.filling.tokens)
        self.prompt = rows.expand(-1, short).contiguous().to(model.device)
        self.references: dict[tuple, torch.Tensor] = {}

    @torch.no_grad()
    def run(self, record: Record) -> None:
        for contender in contenders(self.args, self.batch):
            self.add_row(record, contender.name, contender, self.measure)
        for contender in routed_contenders(self.args) if self.args.router_pairs else ():
            name = f"routers, {contender.cache} cache, Ω={contender.omega:.2f}"
            self.add_row(record, name, contender, self.router_cost)

    def add_row(
        self,
        record: Record,
        name: str,
        contender: Contender,
        measure: Callable[[Contender], dict],
    ) -> None:
        """What ``measure`` finds, or why it does not, unless it is there or not wanted."""
        args, name = self.args, f"{self.setting}: {name}"
        if record.has(name) or (args.only and not re.search(args.only, name)):
            return
        row = {"name": name, "setting": self.setting, "length": self.length,
               "batch": self.batch, **vars(contender)}  # fmt: skip
        started = time.perf_counter()
        try:
            row |= self.skipped() or measure(contender)
        except WrongLogits as problem:
            row["wrong"] = str(problem)
        except Exception as problem:
            traceback.print_exc()
            row |= failure(problem, args.device)
        row["took"] = time.perf_counter() - started
        print(f"{name}: {brief(row)} ({row['took']:.0f} s)", flush=True)
        record.add(row)
        forget_compiled(args.device)

    def skipped(self) -> dict:
        """Why the cache does not fit into the device's memory; empty if it does."""
        if self.args.device == "cpu":
            return {}
        per_token = self.layers * kv_token_bytes(self.model.config, self.model.dtype)
        needs, free = self.batch * self.length * per_token, torch.cuda.mem_get_info()[0]
        if needs < free:
            return {}
        return {"skipped": f"{needs / 2**30:.0f} GiB of keys and values, {free / 2**30:.0f} free"}

    def measure(self, contender: Contender) -> dict:
        """Lay out, fill, check, warm up, time."""
        device, args = self.args.device, self.args
        full = contender.full(self.layers, self.batch)
        expected = self.reference(full)
        runner = self.runner(contender, full)
        try:
            fill(runner.cache, self.filling)
            stepper = Stepper(runner.compiled(), runner.cached, self.tokens[-1][:, None])
            started = time.perf_counter()
            got = [stepper.logits(self.tokens[0][:, None])]
            synchronise(device)
            first = time.perf_counter() - started
            got += [stepper.logits(token[:, None]) for token in self.tokens[1:]]
            got = torch.stack(got)
            error = checked_error(contender.name, got, expected, self.model.dtype)
            stepper.seconds(WARM_UP, device)
            with watched() as events, PeakMemory(device) as peak:
                times = stepper.seconds(args.steps, device)
            row = {
                "median": statistics.median(times),
                "mean": statistics.fmean(times),
                "times": times,
                "floor": self.floor(full),
                "host": stepper.host_seconds(HOST) if device == "cuda" else None,
                "waits": stepper.waits(WATCHED) / WATCHED if device == "cuda" else None,
                "captures": events.captures,
                "compiles": events.compiles,
                "first_step": first,
                "peak_memory": peak.bytes,
                "error": error,
                "same_tokens": (got.argmax(-1) == expected.argmax(-1)).float().mean().item(),
            }
        finally:
            runner.close()
        return row

    def router_cost(self, contender: Contender) -> dict:
        """Lay out, check the fixed pattern and the router, warm both up, time them in turns."""
        args, full = self.args, contender.full(self.layers, self.batch)
        expected = self.reference(full)
        runner = self.runner(contender, full)
        try:
            turns = Turns(runner, self.filling, self.tokens[-1][:, None])
            error = turns.check(self.tokens, expected)
            for stepper in (turns.fixed, turns.routed):
                turns.seconds(stepper, WARM_UP)
            with watched() as events:
                cost = turns.cost(args.steps, args.router_pairs)
        finally:
            runner.close()
        happened = {"captures": events.captures, "compiles": events.compiles}
        return asdict(cost) | happened | {"error": error}

    def runner(self, contender: Contender, full: torch.Tensor) -> Runner:
        return Runner(
            contender, self.model, self.config, full, self.prompt, self.length, self.args.lowering
        )

    def reference(self, full: torch.Tensor) -> torch.Tensor:
        key = tuple(full.flatten().tolist())
        if key not in self.references:
            made = reference_logits(self.filling, self.config, full, self.tokens)
            self.references[key] = made
        return self.references[key]

    def floor(self, full: torch.Tensor) -> float:
        """Seconds to read what a step in the middle of the timed ones needs."""
        sparse = min(self.timed_at, self.config.sink + self.config.local)
        read = [[self.timed_at if x else sparse for x in row] for row in full.tolist()]
        return decode_bytes(self.model, read) / self.rate


def brief(row: dict) -> str:
    for problem in ("wrong", "failed", "skipped"):
        if problem in row:
            return f"{problem.upper()}: {row[problem]}"
    if "added" in row:
        return str(RouterCost(row["static"], row["added"], row["control"]))
    return f"{1000 * row['median']:.2f} ms, {row['median'] / row['floor']:.2f} of the floor"


def table_row(row: dict) -> dict[str, str]:
    name = row["name"].split(": ", 1)[1]
    problem = next((x for x in ("wrong", "failed", "skipped") if x in row), None)
    if problem:
        columns = ("ms/token", "floor ms", "of floor", "host ms", "waits", "captures", "compiles")
        return {"contender": name, **dict.fromkeys((*columns, "error"), "—"), "ms/token": problem}
    return {
        "contender": name,
        "ms/token": f"{1000 * row['median']:.2f}",
        "floor ms": f"{1000 * row['floor']:.2f}",
        "of floor": f"{row['median'] / row['floor']:.2f}×",
        "host ms": "—" if row["host"] is None else f"{1000 * row['host']:.2f}",
        "waits": "—" if row["waits"] is None else f"{row['waits']:.1f}",
        "captures": str(row["captures"]),
        "compiles": str(row["compiles"]),
        "error": f"{row['error']:.1e}",
    }


if __name__ == "__main__":
    main()
