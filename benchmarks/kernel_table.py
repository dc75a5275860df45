"""Every kernel beside its floor and its peers, timed in one run, each checked before it is timed.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json
    python benchmarks/kernels.py --kernels streaming decode --lengths 32768 --batches 1
    python benchmarks/kernels.py --gpus 8 --json benchmarks/results/kernels.json  # side by side
    python benchmarks/kernels.py --device cpu --tiny                              # does it run?

Random operands of Llama-3.1-8B's attention (32 query heads, 8 key-value heads), queries as a
projection leaves them (tokens first), keys and values as a cache holds them. A prefill is the
median of its calls, or a share of a replayed CUDA graph where Python may take longer to launch it
(under 2 ms; not a backward pass); a decode step is a share of a replayed graph that goes round
several caches, so that none is read from the L2 cache. Floors: useful arithmetic over the rate of a
large matrix product, or the bytes that must be read over the rate of a large copy.

With ``--gpus`` every shape is measured by a process of its own, on one GPU: see `kernel_spread`.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import asdict, fields

import torch
from measured_kernels import MEASURED, Measurement, Setting

from common import (
    copy_ceiling,
    environment,
    forget_compiled,
    matmul_ceiling,
    print_table,
    write_json,
)
from kernel_record import Record
from kernel_spread import spread
from record import add_common, failure
from slots import leave_on_sigterm

USUAL = {"lengths": [8192, 32768, 131072], "batches": [1, 8], "head_dims": [128, 64],
         "sink": 128, "local": 2048}  # fmt: skip
TINY = {"lengths": [300], "batches": [1, 2], "head_dims": [64], "sink": 16, "local": 64}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", choices=MEASURED, default=list(MEASURED))
    for name in ("--lengths", "--batches", "--head-dims"):
        parser.add_argument(name, type=int, nargs="+", metavar="N")
    parser.add_argument("--sink", type=int)
    parser.add_argument("--local", type=int)
    add_common(parser, tiny="small sizes")
    parser.add_argument("--gpus", type=int, help="a process a shape, so many side by side")
    parser.add_argument(
        "--resume", action="store_true", help="with --gpus: keep the shapes that were measured"
    )
    args = parser.parse_args(arguments)
    for name, value in (TINY if args.tiny else USUAL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.gpus is not None and (args.gpus < 1 or args.device == "cpu" or args.json is None):
        parser.error("--gpus: expected at least 1, no --device cpu, and a file for --json")
    if args.resume and args.gpus is None:
        parser.error("--resume needs --gpus")
    return args


def shapes(args: argparse.Namespace) -> Iterator[tuple[int, int, int]]:
    """Head dim, length and batch size of every table, in order."""
    return itertools.product(args.head_dims, args.lengths, args.batches)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    heads, kv_heads = (4, 2) if args.tiny else (32, 8)
    record = Record(
        environment(args.device), str(dtype).removeprefix("torch."), heads, kv_heads, args.kernels,
        at_once=args.at_once,
    )  # fmt: skip
    for key, value in record.environment.items():
        print(f"{key:>12}: {value}", flush=True)
    if args.gpus is None:
        measure_all(record, dtype, args)
    else:
        leave_on_sigterm()
        spread(args, record, list(shapes(args)))
        print_rows(record, args)
    if record.failures:
        raise SystemExit("\n".join(["not reported:", *record.failures]))


def measure_all(record: Record, dtype: torch.dtype, args: argparse.Namespace) -> None:
    """Every shape into ``record``, in this process."""
    record.matmul_ceiling_flops = matmul_ceiling(args.device, dtype)
    record.copy_ceiling_bytes = copy_ceiling(args.device)
    print(f"{'matmul':>12}: {record.matmul_ceiling_flops / 1e12:.1f} TFLOP/s")
    print(f"{'copy':>12}: {record.copy_ceiling_bytes / 1e12:.2f} TB/s")
    for head_dim, length, batch in shapes(args):
        setting = Setting(
            batch, length, record.heads, record.kv_heads, head_dim, args.sink, args.local,
            args.device, dtype, record.matmul_ceiling_flops, record.copy_ceiling_bytes,
        )  # fmt: skip
        rows = []
        for kernel in args.kernels:
            rows += measure(kernel, setting, record)
            write_json(args.json, asdict(record))
        if rows:
            print_table(str(setting), [row.columns() for row in rows])
    record.complete = True
    write_json(args.json, asdict(record))


def print_rows(record: Record, args: argparse.Namespace) -> None:
    """Tables of what other processes measured."""
    names = [field.name for field in fields(Measurement)]
    for head_dim, length, batch in shapes(args):
        rows = [
            Measurement(**{name: row[name] for name in names})
            for row in record.rows
            if (row["head_dim"], row["length"], row["batch"]) == (head_dim, length, batch)
        ]
        if rows:
            title = f"batch {batch}, {length} tokens, head dim {head_dim}"
            print_table(title, [row.columns() for row in rows])


def measure(kernel: str, setting: Setting, record: Record) -> list[Measurement]:
    """Run a kernel at one setting and add its rows to the record, or why there are none.

    Raises:
        Exception: the kernel's, if nothing more can run on the device.
    """
    rows: list[Measurement] = []
    try:
        rows = MEASURED[kernel](setting)
    except Exception as problem:
        why = failure(problem, setting.device)
        record.failures.append(f"{kernel}, {setting}: {why['failed']}")
        print(record.failures[-1], flush=True)
        if "lost" in why:
            raise
    forget_compiled(setting.device)
    record.rows += [asdict(row) | setting.shape() for row in rows]
    return rows
