"""Tell a decode step's self-attention from cross-attention, which has a single query too.

A query that sees every key attends causally only if the keys end with its own. Cross-attention's
keys are another sequence's: no key comes with the query.
"""

from __future__ import annotations

import torch
from torch import fx

from fluxcompile.passes.graph_util import (
    argument,
    is_tensor,
    mutates,
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
    for node, _ in upstream(site.k, index_symbols(4)):
        if op_name(node) in _CONCATENATES:
            parts, axis = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
            return axis in (2, -2) and same_size(value_of(parts[-1]).shape[-2], queries)
        if node.target is torch.ops.flux.ring_cache.default:
            return True
        if any(_writes(user, node, queries) for user in node.users if user < site.output):
            return True
    return False


def not_causal(site: AttentionSite) -> Skip:
    """A sequence that looks at itself in both directions has as many keys as queries."""
    itself = same_size(site.q_shape[2], site.k_shape[2])
    seen = "every key is seen" if itself else "the keys are not of the query's own sequence"
    return Skip(SkipReason.NOT_CAUSAL, seen)


def _writes(user: fx.Node, keys: fx.Node, queries: object) -> bool:
    """True where ``user`` puts as many new keys into ``keys`` as there are queries."""
    if not (mutates(user) and user.args and user.args[0] is keys):
        return False
    new = user.args[-1]
    if not is_tensor(new) or value_of(new).dim() < 2:
        return False
    return same_size(value_of(new).shape[-2], queries)
