"""Every kernel beside its floor and its peers, timed in one run, each checked before it is timed.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json
    python benchmarks/kernels.py --kernels streaming decode --lengths 32768 --batches 1
    python benchmarks/kernels.py --device cpu --tiny                              # does it run?

Random operands of Llama-3.1-8B's attention (32 query heads, 8 key-value heads), queries as a
projection leaves them (tokens first), keys and values as a cache holds them. A prefill is the
median of its calls, or a share of a replayed CUDA graph where Python may take longer to launch it
(under 2 ms; not a backward pass); a decode step is a share of a replayed graph that goes round
several caches, so that none is read from the L2 cache. Floors: useful arithmetic over the rate of a large
matrix product, or the bytes that must be read over the rate of a large copy.
"""

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from measured_kernels import MEASURED, Measurement, Setting, WrongResult

from common import (
    copy_ceiling,
    environment,
    forget_compiled,
    matmul_ceiling,
    print_table,
    write_json,
)


@dataclass
class Record:
    """What goes to the JSON file. Times in seconds, rates a second."""

    environment: dict
    dtype: str
    heads: int
    kv_heads: int
    matmul_ceiling_flops: float
    copy_ceiling_bytes: float
    rows: list[dict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--local", type=int, default=2048)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args(arguments)
    if args.tiny:
        args.lengths, args.batches, args.head_dims = [300], [1, 2], [64]
        args.sink, args.local = 16, 64
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    heads, kv_heads = (4, 2) if args.tiny else (32, 8)
    record = Record(
        environment=environment(args.device),
        dtype=str(dtype).removeprefix("torch."),
        heads=heads,
        kv_heads=kv_heads,
        matmul_ceiling_flops=matmul_ceiling(args.device, dtype),
        copy_ceiling_bytes=copy_ceiling(args.device),
    )
    for key, value in record.environment.items():
        print(f"{key:>12}: {value}")
    print(f"{'matmul':>12}: {record.matmul_ceiling_flops / 1e12:.1f} TFLOP/s")
    print(f"{'copy':>12}: {record.copy_ceiling_bytes / 1e12:.2f} TB/s")
    for head_dim in args.head_dims:
        for length in args.lengths:
            for batch in args.batches:
                setting = Setting(
                    batch, length, heads, kv_heads, head_dim, args.sink, args.local,
                    args.device, dtype, record.matmul_ceiling_flops, record.copy_ceiling_bytes,
                )  # fmt: skip
                rows = []
                for kernel in args.kernels:
                    rows += measure(kernel, setting, record)
                    write_json(args.json, asdict(record))
                if rows:
                    print_table(str(setting), [row.columns() for row in rows])
    if record.failures:
        raise SystemExit("\n".join(["not reported:", *record.failures]))


def measure(kernel: str, setting: Setting, record: Record) -> list[Measurement]:
    """Run a kernel at one setting and add its rows to the record, or why there are none."""
    rows: list[Measurement] = []
    try:
        rows = MEASURED[kernel](setting)
    except (WrongResult, torch.OutOfMemoryError) as problem:
        record.failures.append(f"{kernel}, {setting}: {problem}")
        print(record.failures[-1], flush=True)
    forget_compiled(setting.device)
    record.rows += [asdict(row) | setting.shape() for row in rows]
    return rows
