"""Find the query before rotary embedding, from the shape of the dataflow alone.

The layer's hidden state flows to the attention through the query projection, perhaps a norm, and
perhaps rotary embedding. Rotary embedding is the one step that mixes in a tensor which depends on
positions but on no weight (cosines and sines). So: among the nodes that depend on both weights and
inputs, every path from the projection to the attention's query passes through the *dominators* of
that query; going up the dominator tree, the region between two dominators that has such a side
input is the rotary embedding, and the dominator above it is the query the router reads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx

from fluxcompile.passes.graph_util import (
    TRANSPOSES,
    changes_of,
    hint,
    is_tensor,
    op_name,
    value_of,
)
from fluxcompile.passes.site import AttentionSite, Skip, SkipReason
from fluxcompile.passes.views import permutation

_ROOT = "root"
#: what quantised weights are stored in, as parameters or as buffers of their module
_QUANTIZED = {
    *(torch.int8, torch.uint8, torch.int32),
    *(getattr(torch, name) for name in dir(torch) if name.startswith("float8_")),
}
#: Dynamo's name for where a module's own parameters and buffers are found
_OF_MODULE = "ParamBufferSource"
#: ways to reorder axes that are not followed
_OTHER_MOVES = TRANSPOSES | {
    *("movedim", "moveaxis", "swapdims", "t", "einsum", "flip", "roll", "getattr"),
}
#: what may stand between the query and the two halves, or pairs, that are rotated
_TAKES_APART = {
    *("chunk", "split", "tensor_split", "unbind", "view", "reshape", "unflatten", "unsqueeze"),
    *("getitem", "view_as_complex", "float", "to", "contiguous"),
}
_SAME_AXES_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}


def find_queries(
    gm: fx.GraphModule, sites: list[AttentionSite], example_inputs: Sequence[Any]
) -> int:
    """Set ``query_tap`` and ``tap_axes`` of every live site; returns how many were found."""
    roles = _Roles(gm, example_inputs)
    found = 0
    for site in sites:
        if site.skip is not None:
            continue
        tap = _query_before_rotary(site.q, roles)
        axes = _axes_to_heads_tokens(tap, site.q)
        if changes := changes_of(tap):  # rotated in place: no node holds the query as it was
            site.not_routed = Skip(SkipReason.QUERY_NOT_FOUND, f"changed by {changes[0].name}")
            continue
        if axes is None:
            site.not_routed = Skip(SkipReason.QUERY_NOT_FOUND, f"stopped at {tap.name}")
            continue
        site.query_tap, site.tap_axes = tap, axes
        found += 1
    return found


class _Roles:
    """Whether a node's value comes from weights, from inputs, or from both (an activation).

    Quantised weights may be buffers, whose scales are buffers too. Other buffers are not weights:
    rotary embedding keeps its frequencies in one. So a buffer counts as part of a weight only with
    a weight that it is combined with and nothing else.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.weights: set[fx.Node] = set()
        self.buffers: set[fx.Node] = set()
        self.activations: set[fx.Node] = set()
        inputs = iter(example_inputs)
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                value = next(inputs)
                if isinstance(value, torch.nn.Parameter):
                    self.weights.add(node)
                elif isinstance(value, torch.Tensor) and _is_buffer(node):
                    quantized = value.dtype in _QUANTIZED and value.dim() >= 2
                    (self.weights if quantized else self.buffers).add(node)
            elif node.op == "get_attr":
                self.weights.add(node)
            else:
                self._derive(node)

    def _derive(self, node: fx.Node) -> None:
        if _is_metadata(value_of(node)):
            return  # a hidden state's size (the length that positions count up to) holds no weight
        sources = node.all_input_nodes
        if any(source in self.activations for source in sources):
            self.activations.add(node)
            return
        from_weights = [source in self.weights for source in sources]
        from_buffers = [source in self.buffers for source in sources]
        only_own = bool(sources) and all(map(operator.or_, from_weights, from_buffers))
        if only_own:
            (self.weights if any(from_weights) else self.buffers).add(node)
        elif any(from_weights):
            self.activations.add(node)

    def is_projection(self, node: fx.Node) -> bool:
        """A product with a weight matrix: where an activation stops being the same query."""
        return any(
            source in self.weights and is_tensor(source) and value_of(source).dim() >= 2
            for source in node.all_input_nodes
        )

    def position_inputs(self, node: fx.Node) -> list[fx.Node]:
        """Inputs with at least two axes that depend on no weight: cosines, sines, rotations."""
        return [
            source
            for source in node.all_input_nodes
            if source not in self.activations
            and source not in self.weights
            and is_tensor(source)
            and value_of(source).dim() >= 2
        ]


def _is_buffer(placeholder: fx.Node) -> bool:
    """True where Dynamo found an input among a module's own parameters and buffers."""
    source = getattr(placeholder, "_dynamo_source", None)
    while source is not None:
        if type(source).__name__.endswith(_OF_MODULE):
            return True
        source = getattr(source, "base", None)
    return False


def _is_metadata(value: Any) -> bool:
    """Sizes and the like: numbers, dtypes and devices, alone or several."""
    if isinstance(value, tuple | list):
        return bool(value) and all(map(_is_metadata, value))
    return isinstance(value, int | float | torch.SymInt | torch.dtype | torch.device)


def _query_before_rotary(query: fx.Node, roles: _Roles) -> fx.Node:
    flow = _dataflow(query, roles)
    above = nx.immediate_dominators(flow, _ROOT)
    tap, node = query, query
    while (dominator := above.get(node, _ROOT)) not in (_ROOT, node):
        if any(roles.position_inputs(inner) for inner in _region(flow, dominator, node)):
            tap = dominator
        node = dominator
    return _whole(tap, query)


def _whole(tap: fx.Node, query: fx.Node) -> fx.Node:
    """Undo how rotary embedding takes the query apart: into halves, pairs or complex numbers."""
    node = tap
    while not _as_large(node, query):
        if op_name(node) not in _TAKES_APART or not isinstance(node.args[0], fx.Node):
            return tap
        node = node.args[0]
    return node


def _as_large(node: fx.Node, query: fx.Node) -> bool:
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.is_complex():
        return False
    sizes = (math.prod(map(hint, value_of(x).shape)) for x in (node, query))
    return len(set(sizes)) == 1


def _dataflow(query: fx.Node, roles: _Roles) -> nx.DiGraph:
    """Activations between the nearest projections (fed by a root) and the query."""
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_node(_ROOT)
    worklist, seen = [query], {query}
    while worklist:
        node = worklist.pop()
        sources = [source for source in node.all_input_nodes if source in roles.activations]
        if roles.is_projection(node) or not sources:
            flow.add_edge(_ROOT, node)
            continue
        for source in sources:
            flow.add_edge(source, node)
            if source not in seen:
                seen.add(source)
                worklist.append(source)
    return flow


def _region(flow: nx.DiGraph, dominator: fx.Node, node: fx.Node) -> set[fx.Node]:
    """Nodes on the paths from ``dominator`` (excluded) to ``node`` (included)."""
    region, worklist = {node}, [node]
    while worklist:
        for source in flow.predecessors(worklist.pop()):
            if source is not dominator and source not in region and source != _ROOT:
                region.add(source)
                worklist.append(source)
    return region


def _axes_to_heads_tokens(tap: fx.Node, query: fx.Node) -> tuple[int, ...] | None:
    """How to permute the tap to the query's ``[B, H, Sq, D]``; None where it cannot be told."""
    if not is_tensor(tap) or value_of(tap).dim() != 4:
        return None
    axes = _axes_along_path(tap, query)
    if axes is None:
        return None
    shape, target = value_of(tap).shape, value_of(query).shape
    agrees = all(hint(shape[axis]) == hint(target[o]) for o, axis in enumerate(axes))
    return axes if agrees else None


def _axes_along_path(tap: fx.Node, query: fx.Node) -> tuple[int, ...] | None:
    path = _one_path(tap, query)
    if path is None:
        return None
    axes: tuple[int, ...] = (0, 1, 2, 3)
    for node in path:
        if not is_tensor(node):
            continue
        name = op_name(node)
        if name in ("transpose", "permute", "swapaxes"):
            moved = permutation(node)
            if moved is None or len(moved) < 4 or any(m != a for a, m in enumerate(moved[4:], 4)):
                return None
            axes = tuple(axes[axis] for axis in moved[:4])
        elif name in _OTHER_MOVES or not _keeps_leading_axes(node):
            return None
    return axes


def _keeps_leading_axes(node: fx.Node) -> bool:
    """True unless a reshape does more than split or merge features (``view_as_complex`` style)."""
    if op_name(node) not in _SAME_AXES_RESHAPES:
        return True
    before, after = value_of(node.args[0]).shape, value_of(node).shape
    if len(before) < 4 or len(after) < 4:
        return False
    return all(hint(before[axis]) == hint(after[axis]) for axis in range(3))


def _one_path(tap: fx.Node, query: fx.Node) -> list[fx.Node] | None:
    """Any dataflow path from tap to query, the tap left out."""
    if tap is query:
        return []
    worklist: list[tuple[fx.Node, list[fx.Node]]] = [(query, [query])]
    seen = {query}
    while worklist:
        node, path = worklist.pop(0)
        for source in node.all_input_nodes:
            if source is tap:
                return list(reversed(path))
            if source not in seen and source.op not in ("placeholder", "get_attr"):
                seen.add(source)
                worklist.append((source, [*path, source]))
    return None
