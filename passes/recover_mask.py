"""Read a mask's subgraph back into *causal + valid keys (+ sliding window)*.

Legal because the expression that comes out is equal to the mask at every position: a site whose
expression has any other term is left alone, and the term is reported.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from fluxcompile.passes.axes import BATCH, HEADS, KEY, QUERY
from fluxcompile.passes.graph_util import (
    as_expr,
    changes_of,
    hint,
    is_tensor,
    same_size,
    value_of,
)
from fluxcompile.passes.mask_expression import (
    Load,
    MaskExpression,
    UnreadableMask,
)
from fluxcompile.passes.own_keys import NoCausalTerm, not_causal, reads_own_key
from fluxcompile.passes.site import (
    AttentionSite,
    CausalMask,
    GivenMask,
    Mask,
    MaskUse,
    Skip,
    SkipReason,
)


def recover_masks(sites: list[AttentionSite]) -> int:
    """Set ``site.mask`` (or ``site.skip``) on every site; returns how many masks were read.

    Layers share mask nodes, so each node is evaluated once for each pair of lengths.
    """
    known: dict[tuple, Mask | Skip] = {}
    for site in sites:
        if site.skip is not None:
            continue
        lengths = as_expr(site.q_shape[2]), as_expr(site.k_shape[2])
        sizes = as_expr(site.q_shape[0]), *lengths
        key = (site.attn_mask, site.mask_terms, site.is_causal, *sizes, reads_own_key(site))
        if key not in known:
            known[key] = _recover(site)
        found = known[key]
        if isinstance(found, Skip):
            site.skip = found
        else:
            site.mask = found
    return sum(site.mask is not None for site in sites)


def _recover(site: AttentionSite) -> Mask | Skip:
    query_length, key_length = site.q_shape[2], site.k_shape[2]
    if site.attn_mask is None:
        if site.is_causal and same_size(query_length, key_length):
            return CausalMask()
        if not site.is_causal and reads_own_key(site):
            return CausalMask()
        return not_causal(site)
    if not is_tensor(site.attn_mask):
        return Skip(SkipReason.MASK_UNREADABLE, f"mask is {site.attn_mask}")
    if site.is_causal:
        return Skip(SkipReason.MASK_UNREADABLE, "a mask and is_causal together")
    try:
        return _read(site, query_length, key_length)
    except NoCausalTerm:
        return not_causal(site)
    except UnreadableMask as problem:
        return Skip(SkipReason.MASK_UNREADABLE, str(problem))


def _read(site: AttentionSite, query_length: object, key_length: object) -> Mask:
    evaluator = MaskExpression({s: size for term in site.mask_terms for s, size in term.bounds})
    seen = [evaluator.allowed(term.node, term.index, term.use) for term in site.mask_terms]
    expression = sympy.And(*seen)
    terms = tuple(sympy.And.make_args(expression))
    if any(isinstance(term, Load) and len(term.index) == 4 for term in terms):
        return _given(site, terms, evaluator)
    if expression.free_symbols & HEADS:
        raise UnreadableMask("differs between heads")
    batch, i, j = (
        sympy.Integer(0) if same_size(size, 1) else axis
        for axis, size in ((BATCH, site.q_shape[0]), (QUERY, query_length), (KEY, key_length))
    )
    axes, lengths = (batch, i, j), (query_length, key_length)
    return _classify(site.attn_mask, terms, evaluator, axes, lengths, reads_own_key(site))


def _given(site: AttentionSite, terms: tuple, evaluator: MaskExpression) -> GivenMask:
    """A mask that is itself one four-dimensional input: its structure shows only at run time."""
    mask, use = site.attn_mask, site.mask_terms[0].use
    if len(terms) != 1 or value_of(mask).dtype != torch.bool or use is not MaskUse.KEEPS:
        raise UnreadableMask(f"a given mask combined with other terms: {list(map(str, terms))}")
    source = evaluator.loads[terms[0].name]
    if source.op != "placeholder":
        raise UnreadableMask(f"made by {source.target} ({source.name})")
    shape = tuple(value_of(mask).shape)
    full = len(shape) == 4 and shape[1] == 1
    lengths = site.q_shape[2], site.k_shape[2]
    if not full or not all(map(same_size, shape[2:], lengths)):
        raise UnreadableMask(f"a given mask of shape {list(shape)}, expected [B, 1, Sq, Skv]")
    return GivenMask(mask)


def _classify(
    mask: fx.Node,
    terms: tuple,
    evaluator: MaskExpression,
    position: tuple,
    lengths: tuple,
    own_key: bool,
) -> CausalMask:
    batch, i, j = position
    last = as_expr(lengths[1]) - as_expr(lengths[0])  # key index of query 0, lower-right aligned
    upper: list[sympy.Expr] = []
    lower: list[sympy.Expr] = []
    valid: list[tuple[fx.Node, sympy.Expr]] = []
    for term in terms:
        if term == sympy.true:
            continue
        if isinstance(term, Load):
            source = evaluator.loads[term.name]
            valid.append((source, _valid_offset(term, source, batch, j)))
            continue
        bound = _bound(term, i, j)
        (upper if bound[0] == "upper" else lower).append(bound[1])
    if len(valid) > 1 or len(upper) > 1 or len(lower) > 1:
        raise UnreadableMask(f"more than one term of a kind: {[str(t) for t in terms]}")
    if not upper:
        if not own_key:
            if lower:
                raise UnreadableMask("no causal term")
            raise NoCausalTerm
        upper.append(last)  # a single query on all keys: causal holds by itself
    offset = upper[0]
    window = 0
    if lower:
        width = sympy.expand(offset - lower[0])
        if not (width.is_Integer and width > 0):
            raise UnreadableMask(f"sliding window of width {width}")
        window = int(width)
    for symbol in offset.free_symbols & evaluator.scalars.keys():
        if any(change < mask for change in changes_of(evaluator.scalars[symbol])):
            raise UnreadableMask(f"{evaluator.scalars[symbol].name} changes before the mask")
    proven = sympy.expand(offset - last) == 0
    scalars = tuple(
        (s, n) for s, n in evaluator.scalars.items() if not proven and s in offset.free_symbols
    )
    node, valid_offset = valid[0] if valid else (None, sympy.Integer(0))
    return CausalMask(None if proven else offset, window, node, valid_offset, scalars)


def _valid_offset(term: Load, source: fx.Node, batch: sympy.Expr, j: sympy.Symbol) -> sympy.Expr:
    if len(term.index) != 2:
        raise UnreadableMask(f"reads {term.name}{list(term.index)}, expected [batch, key]")
    offset = sympy.expand(term.index[1] - j)
    shared = term.index[0] == 0 and hint(value_of(source).shape[0]) == 1
    own = shared or (term.index[0] == batch and batch != 0)
    if not own or j in offset.free_symbols or offset.is_negative:
        raise UnreadableMask(f"reads {term.name}{list(term.index)}, expected [batch, key + c]")
    return offset


def _bound(term: sympy.Basic, i: sympy.Expr, j: sympy.Symbol) -> tuple[str, sympy.Expr]:
    """``("upper", c)`` for ``j <= i + c`` and ``("lower", c)`` for ``j > i + c``."""
    relation = term
    if isinstance(relation, sympy.Ge | sympy.Gt):
        relation = relation.reversed
    if not isinstance(relation, sympy.Le | sympy.Lt):
        raise UnreadableMask(f"term {term}")
    difference = sympy.expand(relation.lhs - relation.rhs)  # <= 0 or < 0
    if isinstance(relation, sympy.Lt):
        difference += 1  # integers
    slope = difference.coeff(j, 1)
    rest = sympy.expand(difference - slope * j)
    if slope == 1:
        kind, constant = "upper", sympy.expand(-rest)
    elif slope == -1:
        kind, constant = "lower", sympy.expand(rest - 1)
    else:
        raise UnreadableMask(f"term {term}")
    if i != 0:
        constant = sympy.expand(constant - i)
    if j in constant.free_symbols or (i != 0 and i in constant.free_symbols):
        raise UnreadableMask(f"term {term}")
    return kind, constant
