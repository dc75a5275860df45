"""Slices of last rows, and how they move upstream over operations that work row by row.

======  =====================================
before  ``add(a, b)[:, -1:]``
after   ``add(a[:, -1:], b[:, -1:])``
======  =====================================

Legal where nothing reads the operation but such slices: what stood there for all rows goes. What
changes a tensor in place is a reader of it, so that a slice stops behind it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from fluxcompile.passes.graph_util import as_expr, changes_of, erase_dead, is_tensor, value_of
from fluxcompile.passes.row_wise import row_wise, splits_features

_ALL, _LAST = slice(None), slice(-1, None)


class LastRows:
    """Slices of one graph, and the axis of each.

    Attributes:
        became: what stands in the place of a slice that moved on.
    """

    def __init__(self) -> None:
        self.became: dict[fx.Node, fx.Node] = {}
        self._axis: dict[fx.Node, int] = {}
        self._sources: set[fx.Node] = set()
        self._values: dict[tuple, torch.Tensor] = {}

    def find(self, graph: fx.Graph) -> None:
        """Know the slices that the graph has. An index of -1 becomes a slice and an index of 0."""
        for node in list(graph.nodes):
            place = _last_place(node)
            if place is None:
                continue
            source, axis, is_slice = place
            unused = [x for x in node.all_input_nodes if x is not source]
            with graph.inserting_before(node):
                row = self.slice(source, axis)
            if is_slice:
                node.replace_all_uses_with(row)
                graph.erase_node(node)
            else:
                node.args = (row, (*[_ALL] * axis, 0))
            for start in unused:
                erase_dead(start)

    def slice(self, source: fx.Node, axis: int) -> fx.Node:
        """The last row, at the current place."""
        key = (*[_ALL] * axis, _LAST)
        row = source.graph.call_function(operator.getitem, (source, key))
        row.meta = self._meta(source, axis)
        self._axis[row] = axis
        self._sources.add(source)
        return row

    def move_up(self, ends: Collection[fx.Node] = ()) -> dict[fx.Node, tuple[fx.Node, int]]:
        """Move all slices as far as they go; those of ``ends`` stay.

        Returns:
            Of the ends that nothing else reads, the one slice that is left, and its axis.
        """
        reached = {}
        # Later nodes first: a node's readers have settled when it is looked at.
        node = max(self._sources, default=None)
        while self._sources:
            above = node.prev
            if node in self._sources:
                self._sources.remove(node)
                axis = self._axis_of_all(node.users)
                if not is_tensor(node):
                    self._move_over_parts(node)
                elif axis is not None and node in ends:
                    reached[node] = self._merge(node, axis), axis
                elif axis is not None:
                    self._move_over(node, axis)
            node = above
        return reached

    def _axis_of_all(self, readers: Collection[fx.Node]) -> int | None:
        axes = {self._axis.get(reader) for reader in readers}
        return axes.pop() if len(axes) == 1 else None

    def _move_over(self, node: fx.Node, axis: int) -> None:
        if _is_part(node):
            self._sources.add(node.args[0])  # where the other parts are looked at too
        elif (found := row_wise(node, axis)) is not None:
            one = self._of_rows(node, found.axes, found.args, found.kwargs)
            one.meta = self._meta(node, axis)
            self._put(one, node)

    def _move_over_parts(self, node: fx.Node) -> None:
        """The parts of a ``chunk`` or ``split`` move together."""
        parts = list(node.users)
        axis = self._axis_of_all([user for part in parts for user in part.users])
        if axis is None or not all(map(_is_part, parts)) or not splits_features(node, axis):
            return
        one = self._of_rows(node, {node.args[0]: axis}, node.args, node.kwargs)
        one.meta = self._meta(node, axis)
        for part in parts:
            with node.graph.inserting_before(part):
                row = node.graph.call_function(operator.getitem, (one, part.args[1]))
            row.meta = self._meta(part, axis)
            self._put(row, part)
        node.graph.erase_node(node)

    def _of_rows(
        self, node: fx.Node, axes: Mapping[fx.Node, int], args: tuple, kwargs: Mapping[str, Any]
    ) -> fx.Node:
        """``node`` once more, of the last rows of the operands in ``axes``."""
        with node.graph.inserting_before(node):
            rows = {operand: self.slice(operand, axis) for operand, axis in axes.items()}
            args, kwargs = fx.map_arg((args, dict(kwargs)), lambda x: rows.get(x, x))
            return node.graph.create_node(node.op, node.target, args, kwargs)

    def _put(self, one: fx.Node, node: fx.Node) -> None:
        """``one`` in the place of all slices of ``node``, which goes."""
        self._replace_readers(node, one)
        node.graph.erase_node(node)

    def _merge(self, node: fx.Node, axis: int) -> fx.Node:
        """One slice in the place of all that read ``node``, right behind it."""
        readers = list(node.users)
        with node.graph.inserting_after(node):
            merged = self.slice(node, axis)
        self._sources.discard(node)
        self._replace_readers(node, merged, readers)
        return merged

    def _replace_readers(
        self, node: fx.Node, one: fx.Node, readers: list[fx.Node] | None = None
    ) -> None:
        for row in list(node.users) if readers is None else readers:
            row.replace_all_uses_with(one)
            node.graph.erase_node(row)
            self.became[row] = one

    def _meta(self, node: fx.Node, axis: int) -> dict[str, Any]:
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            row: Any = self._row(value, axis)
        else:
            row = tuple(self._row(part, axis) for part in value)
        return {**node.meta, "example_value": row}

    def _row(self, value: torch.Tensor, axis: int) -> torch.Tensor:
        """A new value of one row, since cutting the old one could add guards."""
        shape = [1 if i == axis else size for i, size in enumerate(value.shape)]
        key = (*map(as_expr, shape), value.dtype, value.device)
        if key not in self._values:  # making one takes long where sizes are symbols
            self._values[key] = value.new_empty(shape)
        return self._values[key]


def _last_place(node: fx.Node) -> tuple[fx.Node, int, bool] | None:
    """The tensor and the axis of which a node reads the last index, and whether as a slice."""
    if node.target is not operator.getitem or not is_tensor(node.args[0]):
        return None
    source, key = node.args
    key = key if isinstance(key, tuple) else (key,)
    axes = [axis for axis, part in enumerate(key) if part != _ALL]
    if len(axes) != 1 or not value_of(source).is_floating_point():
        return None
    axis, part = axes[0], key[axes[0]]
    is_slice = isinstance(part, slice) and part.stop is None and part.step in (None, 1)
    if not _is_minus_one(part.start if is_slice else part):
        return None
    if as_expr(value_of(source).shape[axis]) == 1 or changes_of(node):
        return None
    return source, axis, is_slice


def _is_minus_one(place: object) -> bool:
    value = value_of(place)  # of a node too, where it is the same in every call of this graph
    return isinstance(value, int | torch.SymInt) and as_expr(value) == -1


def _is_part(node: fx.Node) -> bool:
    """True for a tensor taken out of several."""
    return node.target is operator.getitem and isinstance(value_of(node.args[0]), tuple | list)
