"""Runs a rewritten graph node by node, with a clock on its attentions."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from fluxcompile.passes.find_attention import module_path


class Stopwatch:
    """Seconds of each attention, call by call of the model."""

    def __init__(self) -> None:
        self._calls: list[dict[str, float]] = []

    def next_call(self) -> None:
        self._calls.append(defaultdict(float))

    def add(self, path: str, seconds: float) -> None:
        """To the module at ``path``, in this call: it may run more than once, in several graphs."""
        self._calls[-1][path] += seconds

    def medians(self) -> dict[str, float]:
        """Module path -> median over the calls after the first, which warms up."""
        calls = self._calls[1:]
        paths = dict.fromkeys(path for call in calls for path in call)
        return {path: statistics.median(call[path] for call in calls) for path in paths}


class TimedGraph(fx.Interpreter):
    """The graph as it is, without fusion; what each attention takes goes to a stopwatch.

    An attention is what the passes made of it: one operator, a guarded branch with the operator
    that it takes, or PyTorch's own where it was left alone. A GPU is waited for before and after.
    Attention that is written out and was left alone has no node of its own, and no time.
    """

    def __init__(self, gm: fx.GraphModule, stopwatch: Stopwatch) -> None:
        super().__init__(gm)
        self._stopwatch = stopwatch

    def __call__(self, *inputs: Any) -> Any:
        return self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        if not is_attention(n):
            return super().run_node(n)
        _wait()
        started = time.perf_counter()
        result = super().run_node(n)
        _wait()
        self._stopwatch.add(module_path(n), time.perf_counter() - started)
        return result


def is_attention(node: fx.Node) -> bool:
    """Whether a node computes a whole attention, or is the branch that does."""
    if node.op != "call_function":
        return False
    if node.target in (
        functional.scaled_dot_product_attention,
        torch._C._nn.scaled_dot_product_attention,
        torch.ops.higher_order.cond,
    ):
        return True
    return str(node.target).startswith("flux.") and "_attention" in str(node.target)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
