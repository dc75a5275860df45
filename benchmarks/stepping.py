"""Decode steps under a clock, and what happens beside them: captures, compiles, waits."""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers.cache_utils import Cache


class Stepper:
    """Greedy steps of one model on one cache: the next token stays on the device.

    Args:
        call: the model, compiled or not.
        cache: by the name of the argument that takes it.
        token: int64 ``[B, 1]``, the first one.
    """

    def __init__(
        self, call: Callable[..., Any], cache: dict[str, Cache], token: torch.Tensor
    ) -> None:
        self.call, self.cache, self.token = call, cache, token.clone()

    def logits(self, token: torch.Tensor) -> torch.Tensor:
        """fp32 ``[B, V]`` after ``token`` ``[B, 1]``."""
        torch.compiler.cudagraph_mark_step_begin()
        output = self.call(input_ids=token, use_cache=True, **self.cache)
        return output.logits[:, -1].float()

    def step(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        output = self.call(input_ids=self.token, use_cache=True, **self.cache)
        self.token.copy_(output.logits[:, -1:].argmax(-1))

    def seconds(self, steps: int, device: str) -> list[float]:
        """Of each of ``steps`` that follow each other as they do in generation."""
        if device == "cpu":
            return [_wall_seconds(self.step) for _ in range(steps)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            self.step()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]

    def host_seconds(self, steps: int) -> float:
        """Median of what the host takes to give a step to an idle GPU."""

        def one() -> float:
            torch.cuda.synchronize()
            return _wall_seconds(self.step)

        return statistics.median(one() for _ in range(steps))

    def waits(self, steps: int) -> int:
        """How often the host waits for the GPU, in ``steps`` together."""
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(steps):
                    self.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in caught)


@dataclass
class Events:
    """What happened while watched.

    Attributes:
        captures: CUDA graphs that were captured.
        compiles: graphs that Dynamo compiled.
        skipped: graphs for which Inductor refused CUDA graphs.
    """

    captures: int = 0
    compiles: int = 0
    skipped: int = 0


@contextmanager
def watched() -> Iterator[Events]:
    """Count what happens inside."""
    found = Events()
    before = counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]
    capture_begin = torch.cuda.CUDAGraph.capture_begin

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.captures += 1
        return capture_begin(*args, **kwargs)

    torch.cuda.CUDAGraph.capture_begin = counted
    try:
        yield found
    finally:
        torch.cuda.CUDAGraph.capture_begin = capture_begin
        found.compiles = counters["stats"]["unique_graphs"] - before[0]
        found.skipped = counters["inductor"]["cudagraph_skips"] - before[1]


def _wall_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
