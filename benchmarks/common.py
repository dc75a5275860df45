"""What every benchmark needs: a clock, a record of where it ran, a table and a JSON file."""

import gc
import importlib.metadata
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fluxcompile.errors import OptionError

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_BOUND = 2e-3  # seconds: what is shorter may wait for Python
REPLAYED = 10  # calls in the graph that is replayed in its place
_PLAIN_LIST = re.compile(r"\[\n\s+([^][{}]*?)\n\s+\]")  # of indented JSON
_BETWEEN = re.compile(r",\n\s+")  # its values


def environment(device: str) -> dict:
    """Device, versions, date and commit: what a figure needs to mean anything."""
    packages = ("torch", "triton", "transformers", "fluxcompile")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def undated(where: dict) -> dict:
    """An `environment` as it is on another day."""
    return {name: value for name, value in where.items() if name != "date"}


def git_commit() -> str:
    """What FLUXCOMPILE_COMMIT says (for a copy of a tree); else the checkout's commit.

    With ``+`` if the checkout differs from it; ``unknown`` outside one.
    """
    if named := os.environ.get("FLUXCOMPILE_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def seconds(function: Callable[[], object], repeat: int, device: str) -> list[float]:
    """The time of each of ``repeat`` calls, by CUDA events on a GPU. Warm up before."""
    return [(_cuda_seconds if device == "cuda" else _cpu_seconds)(function) for _ in range(repeat)]


def median_seconds(function: Callable[[], object], repeat: int, device: str) -> float:
    return statistics.median(seconds(function, repeat, device))


def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on random data: the floor's denominator."""
    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / median_seconds(lambda: a @ b, 10, device)


def copy_ceiling(device: str) -> float:
    """Bytes a second, read plus written, of a large copy on the device."""
    source = torch.randn(2**28 if device == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 10, device)


def typical_seconds(function: Callable[[], object], device: str) -> float:
    """Median of as many calls as fit in half a second, 3 to 50, after a warm-up.

    On a GPU the calls queue up behind each other, as the layers of a model do: what the host does
    to launch one is hidden behind the one before.
    """
    function()
    once = median_seconds(function, 1, device)
    repeat = max(3, min(50, int(0.5 / max(once, 1e-6))))
    if device == "cuda":
        return statistics.median(_queued_cuda_seconds(function, repeat))
    return median_seconds(function, repeat, device)


def device_seconds(function: Callable[[], object], device: str) -> float:
    """`typical_seconds`, or a share of a replayed graph for what may be shorter than its launch."""
    seconds = typical_seconds(function, device)
    if device == "cuda" and seconds < LAUNCH_BOUND:
        return replayed_seconds([function] * REPLAYED, device)
    return seconds


def replayed_seconds(functions: list[Callable[[], object]], device: str) -> float:
    """Mean seconds of one function, all of them captured in one CUDA graph and replayed in turn.

    For kernels that are shorter than their launch. On a CPU: called in turn.
    """

    def all_of_them() -> None:
        for function in functions:
            function()

    if device == "cpu":
        return typical_seconds(all_of_them, device) / len(functions)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        all_of_them()  # compiles what is still to be compiled
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return typical_seconds(graph.replay, device) / len(functions)


def visible_gpus() -> list[str]:
    """The GPUs that there are, by the names that CUDA_VISIBLE_DEVICES takes."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(count)] if visible is None else visible.split(",")[:count]


def some_gpus(count: int) -> list[str]:
    """The first ``count`` of `visible_gpus`.

    Raises:
        OptionError: there are not so many.
    """
    gpus = visible_gpus()
    if len(gpus) < count:
        raise OptionError.mismatch("--gpus", f"at most {len(gpus)}", count)
    return gpus[:count]


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class PeakMemory:
    """``with PeakMemory(device) as peak``: ``peak.bytes`` allocated at most inside (0 on a CPU)."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        synchronise(self.device)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_) -> None:
        synchronise(self.device)
        if self.device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated()


def forget_compiled(device: str) -> None:
    """Drop every compiled graph and give its memory back before the next peer runs."""
    torch._dynamo.reset()
    if device == "cuda":
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()  # their pools hold memory
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def print_table(title: str, rows: list[dict[str, str]]) -> None:
    """One column a key of the first row; the first column is the name."""
    table = Table(title=title, title_justify="left")
    for i, header in enumerate(rows[0]):
        table.add_column(header, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    # Redirected output has no width of its own, and a wrapped table cannot be read.
    Console(width=None if os.isatty(1) else 180).print(table)


def write_json(path: Path | None, record: dict) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.new")  # whoever is ended while writing leaves the old
        beside.write_text(to_json(record) + "\n")
        beside.replace(path)


def to_json(record: dict) -> str:
    """Indented, but for lists of plain values, which take a line: thousands of lines else."""
    indented = json.dumps(record, indent=2)
    return _PLAIN_LIST.sub(lambda found: f"[{_BETWEEN.sub(', ', found[1])}]", indented)


def _queued_cuda_seconds(function: Callable[[], object], repeat: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    for _ in range(2):
        function()  # gives the host its lead
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]


def _cuda_seconds(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _cpu_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
