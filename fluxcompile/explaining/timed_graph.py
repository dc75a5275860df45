"""Runs a rewritten graph node by node, with a clock on its attentions."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from fluxcompile.passes.find_attention import module_path


class TimedGraph(fx.Interpreter):
    """The graph as it is, without fusion; seconds of each attention go to ``runs``.

    An attention is what the passes made of it: one operator, a guarded branch with the operator
    that it takes, or PyTorch's own where it was left alone. A GPU is waited for before and after.
    Attention that is written out and was left alone has no node of its own, and no time.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        #: module path -> seconds of every run
        self.runs: dict[str, list[float]] = defaultdict(list)
        self._this_run: dict[str, float] = {}

    def __call__(self, *inputs: Any) -> Any:
        self._this_run = defaultdict(float)
        result = self.run(*inputs)
        for path, seconds in self._this_run.items():
            self.runs[path].append(seconds)
        return result

    def run_node(self, n: fx.Node) -> Any:
        if not is_attention(n):
            return super().run_node(n)
        _wait()
        started = time.perf_counter()
        result = super().run_node(n)
        _wait()
        self._this_run[module_path(n)] += time.perf_counter() - started
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
