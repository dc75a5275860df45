"""Prefill of a long prompt: eager, plain Inductor and flux, timed in one run.

    python benchmarks/prefill.py --lengths 32768 --json benchmarks/results/prefill.json
    python benchmarks/prefill.py --lengths 131072 --peers eager flux --omega 0.5 0.75
    python benchmarks/prefill.py --lengths 8192 --peers --router-pairs 20        # routers' cost
    python benchmarks/prefill.py --device cpu --tiny --lengths 512               # does it run?

Random weights of a known shape, batch 1, a mask of ones and an empty DynamicCache as ``generate``
gives them, logits of the last token only. Every peer that computes full attention must agree with
eager before its time is reported; sparse routes with the same rewritten graph run eagerly. The
floor is the arithmetic that the routes leave, over the rate of a large matrix product.
"""

import argparse
import re
import traceback
from dataclasses import asdict

import fluxcompile
from checking import WrongLogits
from common import matmul_ceiling, print_table
from models import SHAPES, load_model
from prefill_run import Prefill, peers
from record import Record, dtype_on, failure, parse_with_common
from routing import spread_dense

PEERS = ("eager", "inductor", "flux", "flux-router")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES, "smollm2"], default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--omega",
        type=float,
        nargs="*",
        default=[],
        help="also flux with this share of layers sparse, in a fixed pattern (changes the logits)",
    )
    parser.add_argument(
        "--router", action="store_true", help="these Ω also with routers that decide the pattern"
    )
    parser.add_argument(
        "--chunk", type=int, default=0, help="these Ω also routed, in chunks of so many tokens"
    )
    parser.add_argument("--sink", type=int, default=fluxcompile.FluxConfig().sink)
    parser.add_argument("--local", type=int, default=fluxcompile.FluxConfig().local)
    parser.add_argument("--warm-up", type=int, default=2, help="calls after the one that compiles")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--router-pairs",
        type=int,
        default=0,
        help="time this many pairs of calls, 2 or more, under a fixed pattern (full, or each "
        "--omega) and under routers that decide the same: what routers cost",
    )
    return parse_with_common(parser, arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    dtype = dtype_on(args.device)
    ceiling = matmul_ceiling(args.device, dtype)
    model, about = load_model(args.shape, args.layers, args.device, dtype)
    config = fluxcompile.FluxConfig(sink=args.sink, local=args.local)
    name = str(dtype).removeprefix("torch.")
    record = Record(
        "prefill", args,
        {"model": about, "dtype": name, "batch": 1, "flux_config": config.to_dict()},
    )  # fmt: skip
    record.say(matmul_ceiling_flops=ceiling)
    print(f"{'matmul':>12}: {ceiling / 1e12:.1f} TFLOP/s in {name}", flush=True)
    for length in args.lengths:
        prefill = Prefill(model, config, length, ceiling, args)
        run_peers(prefill, record)
        run_costs(prefill, record)
        rows = [row for row in record.rows if row["length"] == length and "median" in row]
        if rows:
            title = f"prefill of {length} tokens, {args.shape}, {prefill.layers} layers"
            print_table(title, [table_row(row, rows) for row in rows])
    if wrong := record.finish():
        raise SystemExit(f"wrong: {', '.join(wrong)}")


def run_peers(prefill: Prefill, record: Record) -> None:
    """Time every peer that the record has not."""
    for peer in peers(prefill.args, prefill.layers):
        name = f"{prefill.length} tokens: {peer.name}"
        if not _wanted(name, record, prefill.args):
            continue
        row = {"name": name, "peer": peer.name, "length": prefill.length}
        try:
            row |= asdict(prefill.run(peer))
        except WrongLogits as problem:
            row["wrong"] = str(problem)
        except Exception as problem:
            traceback.print_exc()
            row |= failure(problem, prefill.args.device)
        said = f"{1000 * row['median']:.1f} ms" if "median" in row else str(row)
        print(f"{name}: {said}", flush=True)
        record.add(row)


def run_costs(prefill: Prefill, record: Record) -> None:
    """Time what routers add, for full attention or every Ω of the arguments."""
    args = prefill.args
    for omega in (args.omega or [0.0]) if args.router_pairs else []:
        name = f"{prefill.length} tokens: routers, Ω={omega:.2f}"
        if not _wanted(name, record, args):
            continue
        routes = tuple(spread_dense(prefill.layers, omega))
        row = {"name": name, "length": prefill.length, "omega": omega}
        try:
            cost = prefill.router_cost(args.router_pairs, routes)
        except Exception as problem:
            traceback.print_exc()
            row |= failure(problem, args.device)
        else:
            row |= asdict(cost)
            print(f"{name}, all {prefill.layers} together: {cost}", flush=True)
        record.add(row)


def _wanted(name: str, record: Record, args: argparse.Namespace) -> bool:
    return not record.has(name) and (not args.only or bool(re.search(args.only, name)))


def table_row(row: dict, rows: list[dict]) -> dict[str, str]:
    def times(peer: str) -> str:
        of = next((other["median"] for other in rows if other["peer"] == peer), None)
        return "—" if of is None else f"{row['median'] / of:.3f}×"

    def number(value: float | None, form: str) -> str:
        return "—" if value is None else format(value, form)

    return {
        "peer": row["peer"],
        "median ms": f"{1000 * row['median']:.1f}",
        "of eager": times("eager"),
        "of inductor": times("inductor"),
        "floor ms": f"{1000 * row['floor']:.1f}",
        "peak GiB": f"{row['peak_memory'] / 2**30:.2f}" if row["peak_memory"] else "—",
        "compile s": number(row["compile"], ".1f"),
        "passes s": number(row["passes"], ".2f"),
        "sites": number(row["sites"], "d"),
        "error": number(row["error"], ".1e"),
    }


if __name__ == "__main__":
    main()
