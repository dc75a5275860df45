"""Write new nodes into a graph: sizes, masks in the kernels' form, and calls with provenance."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import fx

from fluxcompile.passes.graph_util import as_expr, is_tensor, value_of

_PROVENANCE = ("nn_module_stack", "source_fn_stack", "stack_trace")


class UnknownSize(Exception):
    """A size expression uses a symbol that no graph input carries."""


class Emitter:
    """Adds nodes to one graph, each at a stated place."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = gm.graph
        self._sizes = _size_sources(gm.graph)
        self._submodules = 0

    def call(
        self,
        target: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any] | None = None,
        like: fx.Node | None = None,
    ) -> fx.Node:
        """A function call at the current insertion point, with ``like``'s provenance."""
        node = self.graph.call_function(target, args, kwargs or {})
        if like is not None:
            node.meta.update({k: like.meta[k] for k in _PROVENANCE if k in like.meta})
        return node

    @contextmanager
    def after(self, *needed: fx.Node) -> Iterator[None]:
        """Insert as early as may be: right behind the last of ``needed`` in the graph."""
        behind = max(needed).next
        while behind.op == "placeholder":
            behind = behind.next
        with self.graph.inserting_before(behind):
            yield

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_method(name, args, kwargs)

    def item(self, node: fx.Node, key: Any) -> fx.Node:
        return self.call(operator.getitem, (node, key))

    def placeholder(self, name: str) -> fx.Node:
        """A new graph input, the last so far."""
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node._dynamo_source = None  # not a value of the user's program, so nothing guards it
        return node

    def source_of(self, expression: sympy.Expr) -> int | tuple[fx.Node, int | None]:
        """A size as an int, or the input that carries it and, if that is a tensor, the axis."""
        if expression.is_Integer:
            return int(expression)
        if expression not in self._sizes:
            raise UnknownSize(str(expression))
        return self._sizes[expression]

    def size(self, expression: sympy.Expr) -> int | fx.Node:
        """A sympy size as an int or as nodes built from the graph's inputs."""
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            if expression not in self._sizes:
                raise UnknownSize(str(expression))
            source, axis = self._sizes[expression]
            return source if axis is None else self.method("size", source, axis)
        parts = [self.size(arg) for arg in expression.args]
        for kind, combine in _COMBINE.items():
            if isinstance(expression, kind):
                total = parts[0]
                for part in parts[1:]:
                    total = self.call(combine, (total, part))
                return total
        raise UnknownSize(str(expression))

    def size_with_scalars(
        self, expression: sympy.Expr, scalars: tuple[tuple[sympy.Symbol, fx.Node], ...]
    ) -> int | fx.Node:
        """As ``size``, where some symbols are 0-d tensors; they must enter linearly."""
        rest = expression
        tensors = []
        for symbol, node in scalars:
            factor = expression.coeff(symbol, 1)
            if not factor.is_Integer:
                raise UnknownSize(str(expression))
            rest = sympy.expand(rest - factor * symbol)
            tensors.append((int(factor), node))
        if any(symbol in rest.free_symbols for symbol, _ in scalars):
            raise UnknownSize(str(expression))
        total = self.size(rest)
        for factor, node in tensors:
            scaled = node if factor == 1 else self.call(operator.mul, (node, factor))
            total = self.call(operator.add, (scaled, total))
        return total

    def submodule(self, prefix: str, module: torch.nn.Module) -> str:
        """Register a module under a fresh name and return the name."""
        name = f"{prefix}_{self._submodules}"
        self._submodules += 1
        self.gm.add_submodule(name, module)
        return name

    def decision(
        self, rows: fx.Node, over_rows: str, before: fx.Node, behind: tuple[fx.Node, ...]
    ) -> fx.Node:
        """The predicate ``rows.all()`` or ``rows.any()`` of a branch that stands at ``before``.

        On a GPU it starts for the host as soon as the rows are known, and the host waits for it
        once ``behind``, the branch's operands, have been launched: they keep the device busy.
        """
        if value_of(before).device.type != "cuda":
            with self.after(rows):
                return self.method(over_rows, rows)
        with self.after(rows):
            sent = self.call(torch.ops.flux.send_flag.default, (rows, over_rows == "any"))
        with self.graph.inserting_before(before):
            return self.call(torch.ops.flux.await_flag.default, (sent, list(behind)))

    def cond(self, predicate: fx.Node, yes: Branch, no: Branch, like: fx.Node) -> fx.Node:
        """``torch.cond`` between two branches over the union of their operands."""
        operands = list(dict.fromkeys([*yes.operands(), *no.operands()]))
        branches = [
            self.graph.get_attr(self.submodule("flux_branch", branch.module(operands)))
            for branch in (yes, no)
        ]
        result = self.call(
            torch.ops.higher_order.cond, (predicate, *branches, tuple(operands)), like=like
        )
        return self.item(result, 0)


class Branch:
    """One side of a guarded branch: a call, and what is done to its result."""

    def __init__(
        self,
        target: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any] | None = None,
        to_tokens_first: bool = False,
    ) -> None:
        self.target, self.args, self.kwargs = target, args, kwargs or {}
        #: the call gives [B, H, Sq, D]; the branch must give contiguous [B, Sq, H, D]
        self.to_tokens_first = to_tokens_first

    def operands(self) -> list[fx.Node]:
        found: list[fx.Node] = []
        fx.map_arg((self.args, self.kwargs), found.append)
        return found

    def emit(self, emitter: Emitter, like: fx.Node) -> fx.Node:
        """The call in the main graph: no branch at all."""
        return self._finish(emitter.call(self.target, self.args, self.kwargs, like=like))

    def module(self, operands: list[fx.Node]) -> fx.GraphModule:
        """The call as a graph of its own over ``operands``."""
        graph = fx.Graph()
        inputs = {node: graph.placeholder(f"operand_{i}") for i, node in enumerate(operands)}
        args, kwargs = fx.map_arg((self.args, self.kwargs), lambda node: inputs[node])
        graph.output((self._finish(graph.call_function(self.target, args, kwargs)),))
        return fx.GraphModule(torch.nn.Module(), graph)

    def _finish(self, result: fx.Node) -> fx.Node:
        if not self.to_tokens_first:
            return result
        graph = result.graph
        return graph.call_method("contiguous", (graph.call_method("transpose", (result, 1, 2)),))


def _size_sources(graph: fx.Graph) -> dict[sympy.Symbol, tuple[fx.Node, int | None]]:
    """For each size symbol an input that carries it: a SymInt input, else a tensor's axis."""
    sources: dict[sympy.Symbol, tuple[fx.Node, int | None]] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            break
        value = value_of(node)
        if isinstance(value, torch.SymInt) and as_expr(value).is_Symbol:
            sources[as_expr(value)] = (node, None)
    for node in graph.nodes:
        if node.op == "placeholder" and is_tensor(node):
            for axis, size in enumerate(value_of(node).shape):
                expression = as_expr(size)
                if expression.is_Symbol:
                    sources.setdefault(expression, (node, axis))
    return sources


_COMBINE: dict[type, Callable[..., Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Max: torch.sym_max,
    sympy.Min: torch.sym_min,
}
try:  # torch's own Max and Min, which size expressions are made of
    from torch.utils._sympy.functions import Max as _TorchMax
    from torch.utils._sympy.functions import Min as _TorchMin

    _COMBINE |= {_TorchMax: torch.sym_max, _TorchMin: torch.sym_min}
except ImportError:
    pass
