"""Time to compile prefill and decode: cold, and in a second process with the first one's caches.

    python benchmarks/compile_time.py --json compile.json
    python benchmarks/compile_time.py --only "^flux$" --cache static
    python benchmarks/compile_time.py --device cpu --tiny --lowering eager --only "eager|^flux$"

Every contender has a new folder for Inductor's and Triton's caches and two processes, one after the
other. Each makes the model, loads libraries, compiles as it answers a prompt with some tokens, and
answers the prompt again: what the first answer took longer is the compile time. Regional:
``fluxcompile.compile(model, regional=True)``.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import print_table
from compile_worker import CONTENDERS, add_worker_arguments
from record import Record, parse_with_common
from slots import cores

WORKER = Path(__file__).with_name("compile_worker.py")
PASSED_ON = (
    "shape", "layers", "length", "new", "omega", "sink", "local", "cache", "device", "lowering",
)  # fmt: skip


class WorkerFailed(Exception):
    """A process ended with an error; the end of what it said."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_worker_arguments(parser)
    return parse_with_common(parser, arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    record = Record("compile_time", args, {"cores": len(cores())})  # Inductor compiles on all
    for name in CONTENDERS:
        if record.has(name) or (args.only and not re.search(args.only, name)):
            continue
        row: dict = {"name": name}
        try:
            row |= two_processes(name, args)
        except WorkerFailed as problem:
            row["failed"] = str(problem)
        record.add(row)
        print(f"{name}: {brief(row)}", flush=True)
    rows = [row for row in record.rows if "cold" in row]
    if rows:
        title = f"compile of a prompt of {args.length} tokens and {args.new} steps, {args.shape}"
        print_table(title, [table_row(row, rows) for row in rows])
    record.finish()


def two_processes(name: str, args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cold, second = (worker(name, args, Path(folder)) for _ in range(2))
    return {"cold": cold, "second": second, "same_tokens": cold["tokens"] == second["tokens"]}


def worker(name: str, args: argparse.Namespace, folder: Path) -> dict:
    """Run a process with its caches in ``folder``; returns what it found."""
    command = [sys.executable, str(WORKER), name]
    for option in PASSED_ON:
        if (value := getattr(args, option)) is not None:
            command += [f"--{option}", str(value)]
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | caches
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise WorkerFailed(done.stderr[-1500:])
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "process": time.perf_counter() - started}


def brief(row: dict) -> str:
    if "failed" in row:
        return f"FAILED: {row['failed']}"
    return f"cold {row['cold']['compile']:.1f} s, second {row['second']['compile']:.1f} s"


def table_row(row: dict, rows: list[dict]) -> dict[str, str]:
    cold, second = row["cold"], row["second"]
    plain = next((x["cold"]["compile"] for x in rows if x["name"] == "inductor"), None)
    return {
        "contender": row["name"],
        "cold s": f"{cold['compile']:.1f}",
        "of inductor": "—" if not plain else f"{cold['compile'] / plain:.2f}×",
        "second s": f"{second['compile']:.1f}",
        "of cold": f"{second['compile'] / cold['compile']:.2f}×" if cold["compile"] > 0.1 else "—",
        "prompt, cold s": f"{cold['first'][0]:.1f}",
        "graphs": str(cold["graphs"]),
        "cache hits": str(second["caches"]["fxgraph_cache_hit"]),
        "misses": str(second["caches"]["fxgraph_cache_miss"]),
    }


if __name__ == "__main__":
    main()
