"""Evaluate a mask's subgraph at one symbolic position ``[b, h, i, j]``.

The result is a sympy Boolean over the index symbols, sizes, 0-d tensors and reads of tensors that
cannot be followed further. Nothing is run: the answer holds for every size the graph can see.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from fluxcompile.passes.axes import Bounds, settle
from fluxcompile.passes.graph_util import (
    argument,
    as_expr,
    changes_of,
    is_tensor,
    op_name,
    same_size,
    value_of,
)
from fluxcompile.passes.site import MaskUse
from fluxcompile.passes.views import Index, broadcast_index, view_step

#: an additive mask at or below this counts as minus infinity (float16's most negative value)
BLOCKED = -65504.0


class UnreadableMask(Exception):
    """The subgraph does something this evaluator cannot follow; the message says what."""


class Load(Boolean):
    """A read of bool tensor ``name`` at an index: an atom of the expression."""

    def __new__(cls, name: str, *index: sympy.Expr) -> Load:
        return sympy.Basic.__new__(cls, sympy.Symbol(name), *index)

    @property
    def name(self) -> str:
        return str(self.args[0])

    @property
    def index(self) -> Index:
        return self.args[1:]


_COMPARE = {
    "le": sympy.Le,
    "lt": sympy.Lt,
    "ge": sympy.Ge,
    "gt": sympy.Gt,
    "eq": sympy.Eq,
    "ne": sympy.Ne,
}
_COMPARE |= {f"__{name}__": relation for name, relation in list(_COMPARE.items())}
_LOGIC = {
    "and_": sympy.And,
    "__and__": sympy.And,
    "logical_and": sympy.And,
    "bitwise_and": sympy.And,
    "or_": sympy.Or,
    "__or__": sympy.Or,
    "logical_or": sympy.Or,
    "bitwise_or": sympy.Or,
}
_NEGATE = {"invert", "inv", "logical_not", "bitwise_not", "__invert__"}
_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}
_CASTS = {"to", "type", "bool", "long", "int", "contiguous", "clone"}
_FILLS = {"new_ones": 1, "ones": 1, "ones_like": 1, "new_zeros": 0, "zeros": 0, "zeros_like": 0}
_CONSTANTS = {*_FILLS, "full", "full_like"}
_TO_NUMBERS = {"to", "type", "float", "half", "bfloat16", "double", "long", "int", "type_as"}
#: narrower integers overflow at lengths that occur
_INTEGERS = (torch.int64, torch.int32)


class MaskExpression:
    """Evaluates bool and additive masks of one graph; remembers 0-d tensors as symbols."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self._bounds = bounds or {}
        self.scalars: dict[sympy.Symbol, fx.Node] = {}
        self.loads: dict[str, fx.Node] = {}

    def allowed(self, mask: fx.Node, index: Index, use: MaskUse = MaskUse.KEEPS) -> Boolean:
        """Where ``mask`` lets a query see a key: bool masks as they are, additive ones by zero."""
        dtype = value_of(mask).dtype
        fits = {
            MaskUse.KEEPS: dtype == torch.bool or dtype.is_floating_point,
            MaskUse.ADDED: dtype.is_floating_point,
            MaskUse.BLOCKS: dtype == torch.bool,
        }
        if not fits[use]:
            raise UnreadableMask(f"mask of dtype {dtype} that is {use.value}")
        if use is MaskUse.BLOCKS:
            return sympy.Not(self._bool(mask, index))
        if dtype == torch.bool:
            return sympy.sympify(self._bool(mask, index))
        if dtype.is_floating_point:
            return sympy.sympify(self._additive(mask, index))
        raise UnreadableMask(f"mask of dtype {dtype}")

    def _additive(self, node: fx.Node, index: Index) -> Boolean:
        """The condition under which an additive mask is 0; it must be minus infinity elsewhere."""
        self._require_unchanged(node)
        if (step := view_step(node, index)) is not None:
            return self._additive(*step)
        name = op_name(node)
        if name in ("to", "float", "type", "masked_fill") and is_tensor(node.args[0]):
            source = node.args[0]
            inner = broadcast_index(tuple(value_of(source).shape), index)
            if name == "masked_fill":
                self._require_blocked(argument(node, 2, "value"))
                blocked = self._bool_operand(argument(node, 1, "mask"), index)
                return sympy.And(self._additive(source, inner), sympy.Not(blocked))
            if value_of(source).dtype.is_floating_point:
                return self._additive(source, inner)
        if name in _CONSTANTS:
            return self._additive_constant(node)
        if name in ("tril", "triu"):
            inside = self._triangle(node, index)  # outside of it, zeros: every key is seen
            return sympy.Or(self._additive(node.args[0], index), sympy.Not(inside))
        if name == "add" and len(node.args) == 2 and all(map(is_tensor, node.args)):
            return sympy.And(*(self._additive_operand(operand, index) for operand in node.args))
        if name == "mul" and (found := self._indicated(node, index)) is not None:
            return found
        if name == "where" and len(node.args) == 3:
            condition = self._bool_operand(node.args[0], index)
            if _is_zero(node.args[1]):
                self._require_blocked(node.args[2])
                return condition
            if _is_zero(node.args[2]):
                self._require_blocked(node.args[1])
                return sympy.Not(condition)
        raise UnreadableMask(f"additive mask made by '{name}' ({node.name})")

    def _additive_operand(self, operand: fx.Node, index: Index) -> Boolean:
        value = value_of(operand)
        if not value.dtype.is_floating_point:
            raise UnreadableMask(f"'{op_name(operand)}' ({operand.name}) is {value.dtype}")
        return self._additive(operand, broadcast_index(tuple(value.shape), index))

    def _additive_constant(self, node: fx.Node) -> Boolean:
        if constant(node) == 0.0:
            return sympy.true
        self._require_blocked(node)
        return sympy.false

    def _indicated(self, node: fx.Node, index: Index) -> Boolean | None:
        """Of ``x * c``, where x is one or zero: minus infinity where x is one."""
        operands = list(node.args[:2])
        if len(operands) == 2 and not is_tensor(operands[0]):
            operands.reverse()
        if len(operands) < 2 or not is_tensor(operands[0]) or node.kwargs:
            return None
        bias = constant(operands[1])
        if bias is None or not math.isfinite(bias):  # zero times infinity is no number
            return None
        self._require_blocked(bias)
        shape = tuple(value_of(operands[0]).shape)
        return sympy.Not(self._indicator(operands[0], broadcast_index(shape, index)))

    def _indicator(self, node: fx.Node, index: Index) -> Boolean:
        """The condition under which a tensor that is one or zero everywhere is one."""
        if value_of(node).dtype == torch.bool:
            return self._bool(node, index)
        self._require_unchanged(node)
        if (step := view_step(node, index)) is not None:
            return self._indicator(*step)
        name = op_name(node)
        if name in _CONSTANTS and constant(node) in (0.0, 1.0):
            return sympy.true if constant(node) else sympy.false
        if name in ("tril", "triu"):
            return sympy.And(self._indicator(node.args[0], index), self._triangle(node, index))
        if name in _TO_NUMBERS and is_tensor(node.args[0]):
            return self._indicator(node.args[0], index)
        plain = len(node.args) == 2 and not node.kwargs and is_tensor(node.args[1])
        if name in ("sub", "rsub") and plain and constant(node.args[0]) == 1.0:
            shape = tuple(value_of(node.args[1]).shape)
            return sympy.Not(self._indicator(node.args[1], broadcast_index(shape, index)))
        raise UnreadableMask(f"'{name}' ({node.name}), expected ones and zeros")

    def _triangle(self, node: fx.Node, index: Index) -> Boolean:
        """The condition under which ``tril`` or ``triu`` keeps what is at ``index``."""
        diagonal = self._integer_operand(argument(node, 1, "diagonal", 0), ())
        row, column = index[-2:]
        if op_name(node) == "tril":
            return sympy.Le(column, row + diagonal)
        return sympy.Ge(column, row + diagonal)

    @staticmethod
    def _require_unchanged(node: fx.Node) -> None:
        if value_of(node).dim() > 0 and (changes := changes_of(node)):
            raise UnreadableMask(f"{node.name} is changed in place ({changes[0].name})")

    @staticmethod
    def _require_blocked(value: Any) -> None:
        number = constant(value)
        if number is None or number > BLOCKED:
            raise UnreadableMask(f"additive mask with the bias {value}, expected minus infinity")

    def _bool_operand(self, operand: Any, index: Index) -> Boolean:
        if isinstance(operand, bool):
            return sympy.true if operand else sympy.false
        if not is_tensor(operand):
            raise UnreadableMask(f"condition {operand}")
        return self._bool(operand, broadcast_index(tuple(value_of(operand).shape), index))

    def _bool(self, node: fx.Node, index: Index) -> Boolean:
        value = value_of(node)
        if value.dtype != torch.bool:
            raise UnreadableMask(f"'{op_name(node)}' ({node.name}) is {value.dtype}, expected bool")
        self._require_unchanged(node)
        if (step := self._view(node, index)) is not None:
            return self._bool(*step)
        name = op_name(node)
        operands = node.args
        if name in _LOGIC and len(operands) == 2:
            return _LOGIC[name](*(self._bool_operand(operand, index) for operand in operands))
        if name in _NEGATE:
            return sympy.Not(self._bool_operand(operands[0], index))
        if name in _COMPARE and len(operands) == 2:
            try:
                return _COMPARE[name](*(self._integer_operand(x, index) for x in operands))
            except UnreadableMask:
                return self._compared_to_one(node, index)
        if name in ("tril", "triu"):
            return sympy.And(self._bool(operands[0], index), self._triangle(node, index))
        if name in _CASTS and is_tensor(operands[0]) and value_of(operands[0]).dtype == torch.bool:
            return self._bool_operand(operands[0], index)
        if name in _CASTS and is_tensor(operands[0]):
            try:
                return self._indicator(operands[0], index)
            except UnreadableMask:
                return self._load(node, index)
        if name in _FILLS:
            return sympy.true if _FILLS[name] else sympy.false
        if name in ("full", "new_full", "full_like"):
            value = constant(argument(node, 2 if name == "new_full" else 1, "fill_value"))
            if value is None:
                raise UnreadableMask(f"filled with an unknown value ({node.name})")
            return sympy.true if value else sympy.false
        if name == "where" and len(operands) == 3:
            condition, yes, no = (self._bool_operand(operand, index) for operand in operands)
            return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))
        return self._load(node, index)

    def _compared_to_one(self, node: fx.Node, index: Index) -> Boolean:
        """``x == 0``, ``x != 1`` and so on, of what is one or zero; a read of any other."""
        name, (tested, number) = op_name(node).strip("_"), node.args
        if name not in ("eq", "ne") or not is_tensor(tested) or constant(number) not in (0.0, 1.0):
            return self._load(node, index)
        shape = tuple(value_of(tested).shape)
        index_of_tested = broadcast_index(shape, index)
        try:
            if constant(number) == 0.0 and value_of(tested).dtype.is_floating_point:
                is_zero = self._additive(tested, index_of_tested)
                return is_zero if name == "eq" else sympy.Not(is_zero)
        except UnreadableMask:
            pass  # not an additive mask: ones and zeros, then?
        try:
            is_one = self._indicator(tested, index_of_tested)
        except UnreadableMask:
            return self._load(node, index)
        return is_one if (name == "eq") == bool(constant(number)) else sympy.Not(is_one)

    def _load(self, node: fx.Node, index: Index) -> Load:
        self.loads[node.name] = node
        return Load(node.name, *settle(index, self._bounds))

    def _view(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
        """One view step, including reads by index tensors (``mask[batch, key]``)."""
        if (step := view_step(node, index)) is not None:
            return step
        if op_name(node) != "getitem" or not isinstance(node.args[1], tuple):
            return None
        source, keys = node.args
        if not all(is_tensor(key) for key in keys) or len(keys) != value_of(source).dim():
            return None
        return source, tuple(self._integer_operand(key, index) for key in keys)

    def _integer_operand(self, operand: Any, index: Index) -> sympy.Expr:
        if not is_tensor(operand):
            value = value_of(operand)
            if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
                return as_expr(value)
            raise UnreadableMask(f"operand {operand}, expected an integer")
        return self._integer(operand, broadcast_index(tuple(value_of(operand).shape), index))

    def _integer(self, node: fx.Node, index: Index) -> sympy.Expr:
        value = value_of(node)
        if value.dtype not in _INTEGERS:
            raise UnreadableMask(f"'{op_name(node)}' ({node.name}) is {value.dtype}, expected int")
        self._require_unchanged(node)
        if value.dim() == 0 and changes_of(node):
            return self._scalar(node)  # what it was made of is not what it is when it is read
        if (step := self._view(node, index)) is not None:
            return self._integer(*step)
        name = op_name(node)
        if name in _ARITHMETIC and len(node.args) == 2 and not node.kwargs:
            return _ARITHMETIC[name](*(self._integer_operand(x, index) for x in node.args))
        if name == "arange":
            only_end = len(node.args) == 1 and "end" not in node.kwargs
            start = 0 if only_end else argument(node, 0, "start", 0)
            stride = argument(node, 2, "step", 1)
            return self._integer_operand(start, ()) + self._integer_operand(stride, ()) * index[0]
        if name in _CASTS and is_tensor(node.args[0]) and value_of(node.args[0]).dtype in _INTEGERS:
            return self._integer_operand(node.args[0], index)
        if name == "diff":
            return self._difference(node, index)
        if name == "cumsum":
            return self._running_total(node, index)
        if value.dim() == 0 and value.dtype == torch.int64:
            return self._scalar(node)
        raise UnreadableMask(f"integers made by '{name}' ({node.name})")

    def _difference(self, node: fx.Node, index: Index) -> sympy.Expr:
        """``diff(x, prepend=first)``, where the first step is as large as every other one."""
        source, first = node.args[0], node.kwargs.get("prepend")
        axis = argument(node, 2, "dim", -1)
        plain = argument(node, 1, "n", 1) == 1 and "append" not in node.kwargs
        if not (plain and is_tensor(first) and axis in (-1, len(index) - 1)):
            raise UnreadableMask(f"difference other than with one prepended value ({node.name})")
        if not same_size(value_of(first).shape[-1], 1):
            raise UnreadableMask(f"difference with several prepended values ({node.name})")
        *row, token = index
        zero = sympy.Integer(0)
        start = self._integer(source, (*row, zero)) - self._integer(first, (*row, zero))
        if same_size(value_of(source).shape[-1], 1):
            return sympy.expand(start)
        step = self._integer(source, index) - self._integer(source, (*row, token - 1))
        if sympy.expand(step - start) != 0:
            raise UnreadableMask(f"difference with another first step ({node.name})")
        return sympy.expand(step)

    def _running_total(self, node: fx.Node, index: Index) -> sympy.Expr:
        """``cumsum`` of what is zero everywhere: of the breaks in positions that have none."""
        source = node.args[0]
        if value_of(source).dtype == torch.bool:
            zero = self._bool(source, index) == sympy.false
        else:
            zero = self._integer(source, index) == 0
        if not zero:
            raise UnreadableMask(f"running total of what may not be zero ({node.name})")
        return sympy.Integer(0)

    def _scalar(self, node: fx.Node) -> sympy.Symbol:
        symbol = sympy.Symbol(f"tensor_{node.name}", integer=True)
        self.scalars[symbol] = node
        return symbol


def constant(value: Any) -> float | None:
    """The number behind an argument: a literal, or a node that is one number everywhere."""
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, fx.Node) or changes_of(value):
        return None
    name = op_name(value)
    if name in ("full", "full_like", "tensor", "scalar_tensor"):
        inner = (
            argument(value, 1, "fill_value")
            if name.startswith("full")
            else argument(value, 0, "data")
        )
        return float(inner) if isinstance(inner, bool | int | float) else None
    if name in _FILLS:
        return float(_FILLS[name])
    return None


def _is_zero(value: Any) -> bool:
    return constant(value) == 0.0
