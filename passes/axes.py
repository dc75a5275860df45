"""Names for the axes of an attention, as symbols that an index is made of.

An element of the scores is at ``(BATCH, HEAD, QUERY, KEY)``. Where heads are written as groups,
``HEAD`` is ``KV_HEAD * group size + GROUP``. The first four are ``index_symbols(4)``, so that masks
read through either are the same expressions.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from fluxcompile.passes.views import Index, index_symbols

BATCH, HEAD, QUERY, KEY = index_symbols(4)
KV_HEAD, GROUP, FEATURE = (
    sympy.Symbol(name, integer=True, nonnegative=True) for name in ("kv_head", "group", "feature")
)
#: what an expression that is the same for every head has none of
HEADS = frozenset({HEAD, KV_HEAD, GROUP})

Bounds = Mapping[sympy.Symbol, int]


def settle(index: Index, bounds: Bounds) -> Index:
    """``index`` simplified by what the axes are bounded by: ``floor(HEAD / 8)`` is 0 of 8 heads.

    ``bounds`` gives the sizes of axes that have a known one.
    """
    return tuple(_settle(expression, bounds) for expression in index)


def _settle(expression: sympy.Expr, bounds: Bounds) -> sympy.Expr:
    expression = sympy.expand(expression)
    expression = expression.replace(
        sympy.floor,
        lambda x: sympy.Integer(0) if _below(x, sympy.Integer(1), bounds) else _floor(x),
    )
    return expression.replace(
        sympy.Mod, lambda x, size: x if _below(x, size, bounds) else sympy.Mod(x, size)
    )


def _floor(x: sympy.Expr) -> sympy.Expr:
    return sympy.floor(sympy.expand(x))


def _below(x: sympy.Expr, limit: sympy.Expr, bounds: Bounds) -> bool:
    """True where ``0 <= x < limit`` for certain; ``x`` must grow with every axis in it."""
    if not limit.is_number or not x.free_symbols <= bounds.keys() or not _grows(x):
        return False
    largest = x.subs({symbol: bounds[symbol] - 1 for symbol in x.free_symbols})
    smallest = x.subs(dict.fromkeys(x.free_symbols, 0))
    return bool(smallest >= 0) and bool(largest < limit)


def _grows(x: sympy.Expr) -> bool:
    """True where ``x`` never falls as an axis' index rises, and is never negative."""
    if isinstance(x, sympy.Add | sympy.Mul | sympy.floor):
        return all(map(_grows, x.args))
    return x.is_Symbol or bool(x.is_number and x.is_nonnegative)
