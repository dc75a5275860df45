"""Read what stands between a softmax and the product of queries and keys.

``scores = scale * product``, softcapped perhaps, with masks added, filled in or selected: any order
that is the same function, through casts and views, at one symbolic index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import fx

from fluxcompile.passes.axes import Bounds, settle
from fluxcompile.passes.contraction import is_contraction
from fluxcompile.passes.graph_util import argument, is_tensor, op_name, value_of
from fluxcompile.passes.mask_expression import BLOCKED, constant
from fluxcompile.passes.site import MaskTerm, MaskUse
from fluxcompile.passes.views import Index, broadcast_index, view_step

ROUNDING = {"to", "type", "float", "half", "bfloat16", "type_as"}
_MULTIPLY, _DIVIDE = {"mul", "imul", "mul_"}, {"truediv", "div", "itruediv", "div_"}
#: how many operations may stand between a product with the keys and its softmax
STEPS = 12


class UnreadableScores(Exception):
    """A step that is none of those above; ``node`` is where reading stopped."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(f"{op_name(node)} ({node.name})")
        self.node = node


@dataclass
class Scores:
    """What was read: the product and the index it is read at, and what is done to it.

    ``chain`` holds the nodes from the softmax's input to the product.
    """

    product: fx.Node
    index: Index
    scale: float = 1.0
    softcap: float = 0.0
    bounds: Bounds = field(default_factory=dict)
    terms: list[MaskTerm] = field(default_factory=list)
    chain: list[fx.Node] = field(default_factory=list)


def read_scores(scores: fx.Node, index: Index, bounds: Bounds) -> Scores:
    """Peel everything off a softmax's input, whose element is at ``index``.

    Raises:
        UnreadableScores: some step cannot be read.
    """
    read = Scores(scores, index, bounds=bounds)
    while not is_contraction(read.product):
        read.chain.append(read.product)
        if len(read.chain) > 2 * STEPS or read.product.op not in ("call_function", "call_method"):
            raise UnreadableScores(read.product)
        _peel(read)
        read.index = settle(read.index, bounds)
    read.chain.append(read.product)
    return read


def _peel(read: Scores) -> None:
    node, name, args = read.product, op_name(read.product), read.product.args
    if name in ROUNDING and args and is_tensor(args[0]):
        read.product = args[0]
    elif (step := view_step(node, read.index)) is not None:
        read.product, read.index = step
    elif name in ("add", "iadd", "add_"):
        _added(read)
    elif name in ("masked_fill", "masked_fill_"):
        _filled(read, args[0], argument(node, 1, "mask"), argument(node, 2, "value"))
    elif name == "where":
        _selected(read)
    elif name in _MULTIPLY | _DIVIDE:
        if read.scale == 1.0 and read.softcap == 0.0 and (capped := _softcap(node)) is not None:
            read.product, read.softcap = capped
            return
        scaled, factor = scaling(node)
        if scaled is None:
            raise UnreadableScores(node)
        read.product, read.scale = scaled, read.scale * factor
    else:
        raise UnreadableScores(node)


def _added(read: Scores) -> None:
    node, operands = read.product, read.product.args[:2]
    if len(operands) < 2 or not all(map(is_tensor, operands)) or node.kwargs:
        raise UnreadableScores(node)
    # A bias grows with a scale outside of it, and a softcap turns minus infinity into minus one.
    if read.scale != 1.0 or read.softcap != 0.0:
        raise UnreadableScores(node)
    holds = [is_scores(operand) for operand in operands]
    if sum(holds) != 1:
        raise UnreadableScores(node)
    scores, mask = operands if holds[0] else reversed(operands)
    _use(read, scores, mask, MaskUse.ADDED)


def _filled(read: Scores, scores: object, mask: object, value: object) -> None:
    if not is_tensor(scores) or not is_tensor(mask) or not _blocks(read, value):
        raise UnreadableScores(read.product)
    _use(read, scores, mask, MaskUse.BLOCKS)


def _selected(read: Scores) -> None:
    node = read.product
    # x.where(condition, other) and torch.where(condition, x, other)
    args = node.args if node.op == "call_function" else (node.args[1], node.args[0], *node.args[2:])
    if len(args) != 3 or node.kwargs or not is_tensor(args[0]):
        raise UnreadableScores(node)
    condition, yes, no = args
    if is_tensor(yes) and is_scores(yes) and _blocks(read, no):
        _use(read, yes, condition, MaskUse.KEEPS)
    elif is_tensor(no) and is_scores(no) and _blocks(read, yes):
        _use(read, no, condition, MaskUse.BLOCKS)
    else:
        raise UnreadableScores(node)


def _blocks(read: Scores, value: object) -> bool:
    """True where ``value`` in the place of a score leaves its key no weight."""
    number = constant(value)
    if number is None or number > BLOCKED or read.softcap != 0.0:
        return False
    return read.scale == 1.0 or (number == -math.inf and read.scale > 0)


def _use(read: Scores, scores: fx.Node, mask: fx.Node, use: MaskUse) -> None:
    shape = tuple(value_of(read.product).shape)
    if value_of(scores).dim() != len(shape):
        raise UnreadableScores(read.product)
    index = broadcast_index(tuple(value_of(mask).shape), read.index)
    read.terms.append(MaskTerm(mask, index, use, tuple(read.bounds.items())))
    read.index = broadcast_index(tuple(value_of(scores).shape), read.index)
    read.product = scores


def is_scores(node: fx.Node) -> bool:
    """True where a product lies a few steps upstream; masks have none."""
    level, seen = [node], {node}
    for _ in range(STEPS):
        if any(is_contraction(source) for source in level):
            return True
        sources = [s for reader in level for s in reader.all_input_nodes if is_tensor(s)]
        level = [source for source in dict.fromkeys(sources) if source not in seen]
        seen.update(level)
    return False


def scaling(node: fx.Node) -> tuple[fx.Node, float] | tuple[None, None]:
    """``(x, c)`` of ``x * c``, ``c * x`` and ``x / (1 / c)``, for a constant number ``c``."""
    name, operands = op_name(node), list(node.args[:2])
    if name not in _MULTIPLY | _DIVIDE or len(operands) < 2 or node.kwargs:
        return None, None
    if name in _MULTIPLY and _number(operands[0]) is not None:
        operands.reverse()
    scaled, factor = operands[0], _number(operands[1])
    if factor is None or factor == 0.0 or not math.isfinite(factor) or not is_tensor(scaled):
        return None, None
    if value_of(scaled).dim() != value_of(node).dim():
        return None, None
    return scaled, factor if name in _MULTIPLY else 1.0 / factor


def _softcap(node: fx.Node) -> tuple[fx.Node, float] | None:
    """``tanh(x / c) * c`` gives ``(x, c)``."""
    inner, cap = scaling(node)
    if inner is None or op_name(inner) != "tanh":
        return None
    ratio, inverse = scaling(inner.args[0]) if inner.args else (None, None)
    if ratio is None or not math.isclose(cap * inverse, 1.0, rel_tol=1e-6):
        return None
    return ratio, cap


def _number(value: object) -> float | None:
    """A constant number: literal, symbolic, or a 0-d tensor made of a literal."""
    number = value_of(value)
    if isinstance(number, torch.Tensor):
        return constant(value) if number.dim() == 0 else None
    if isinstance(number, bool) or not isinstance(number, int | float | torch.SymFloat):
        return None
    return float(number)
