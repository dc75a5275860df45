"""Tell a decode step's self-attention from cross-attention, which has a single query too.

A query that sees every key attends causally only if the keys end with its own. Cross-attention's
keys are another sequence's: no key comes with the query.
"""

from __future__ import annotations

import torch

from fluxcompile.passes.graph_util import (
    argument,
    changes_of,
    is_tensor,
    op_name,
    same_size,
    value_of,
)
from fluxcompile.passes.site import AttentionSite, Skip, SkipReason
from fluxcompile.passes.views import index_symbols, upstream

_CONCATENATES = {"cat", "concat", "concatenate"}


class NoCausalTerm(Exception):
    """The mask lets every query see every (valid) key."""


def reads_own_key(site: AttentionSite) -> bool:
    """True for one query whose keys end with its own, so that seeing all of them is causal.

    Legal to say so because what this call appends to the keys, or writes into them, is as long as
    the query; a cross-attention's keys come from a cache, or are made for a whole other sequence.
    """
    queries = site.q_shape[2]
    if queries != 1:
        return False
    if same_size(site.k_shape[2], queries):
        return True
    token = index_symbols(4)[2]
    for node, index in upstream(site.k, index_symbols(4)):
        if node.target is torch.ops.flux.ring_cache.default:
            return True
        if token not in index:
            continue
        axis = index.index(token)
        if op_name(node) in _CONCATENATES:
            parts, along = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
            last = value_of(parts[-1])
            return along % last.dim() == axis and same_size(last.shape[axis], queries)
        changes = (change for change in changes_of(node) if change < site.output)
        if any(_is_as_long(change.args[-1], axis, len(index), queries) for change in changes):
            return True
    return False


def not_causal(site: AttentionSite) -> Skip:
    """A sequence that looks at itself in both directions has as many keys as queries."""
    itself = same_size(site.q_shape[2], site.k_shape[2])
    seen = "every key is seen" if itself else "the keys are not of the query's own sequence"
    return Skip(SkipReason.NOT_CAUSAL, seen)


def _is_as_long(new: object, axis: int, rank: int, queries: object) -> bool:
    """True where what is written into the keys is one token: with that axis, or without it."""
    if not is_tensor(new):
        return False
    shape = value_of(new).shape
    return len(shape) == rank - 1 or (len(shape) == rank and same_size(shape[axis], queries))
