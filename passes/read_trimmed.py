"""Attention over a trimmed cache: the rings of sink and local tokens in place of all keys.

======  ===========================================================================================
before  ``k = trimmed_cache(new_k, ring_k, ...)``; ``sdpa(q, k, v, mask over all tokens)``
few     write the new tokens into the rings; ``flux::decode_attention`` over the rings
more    ``flux::streaming_attention`` over the rings' tokens by age and the new ones; then write
======  ===========================================================================================

Legal because such a layer is sparse in every row, and the rings hold whatever sparse decode reads:
a query's window is counted in valid tokens, of which rings drop none within it. The order in a ring
is not that of the sequence, which only a positional mask would notice, and none is left: what a
query sees of the rings is worked out from the tokens' ranks.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from fluxcompile.errors import RewriteError
from fluxcompile.kernels.ring import layout
from fluxcompile.kernels.ring.layout import RingPattern
from fluxcompile.kernels.validation import MAX_DECODE_QUERIES
from fluxcompile.passes.emit import Emitter
from fluxcompile.passes.graph_util import as_expr, value_of
from fluxcompile.passes.mask_operands import MaskOperandCache
from fluxcompile.passes.plan import Policy, RoutingPlan
from fluxcompile.passes.site import AttentionSite, CausalMask, GivenMask, TrimmedKV


class TrimmedReader:
    """Rewrites sites over trimmed caches; what depends on the tokens alone is made once."""

    def __init__(self, emitter: Emitter, masks: MaskOperandCache) -> None:
        self._emitter = emitter
        self._masks = masks
        self._ranks: dict[tuple, tuple[fx.Node, ...]] = {}
        self._shared: dict[tuple, fx.Node | tuple[fx.Node, ...]] = {}

    def read(self, site: AttentionSite, policy: Policy, plan: RoutingPlan) -> fx.Node:
        """Attention ``[B, Sq, H, D]`` of ``site``.

        Raises:
            RewriteError: this call wants to read more than the cache holds.
        """
        _check(site, policy, plan)
        queries = as_expr(site.q_shape[2])
        few = queries.is_Integer and int(queries) <= MAX_DECODE_QUERIES
        few = few and site.trimmed.pattern.holds(int(queries))
        site.became = "decode of a trimmed cache" if few else "streaming over a trimmed cache"
        with self._emitter.graph.inserting_before(site.output):
            past, rank, fresh, same, first = self._tokens(site)
            kv = site.trimmed
            if few:
                self._write(kv, rank, fresh)
                result = self._decode(site, kv, rank)
            else:
                result = self._stream(site, kv, past, fresh)
                self._write(kv, rank, fresh)
            if first:
                self._call(layout.count_written_, kv.counts, rank)
                result = self._call(torch.ops.flux.agree.default, result, same)
        return result

    def _tokens(self, site: AttentionSite) -> tuple:
        """The step's ranks, and whether no site before shares them."""
        queries, counts = as_expr(site.q_shape[2]), site.trimmed.counts
        valid = self._masks.key_valid(site)
        key = counts, valid, queries
        known = key in self._ranks
        if not known:
            length = as_expr(site.k_shape[2])
            sizes = self._emitter.size(length), self._emitter.size(queries)
            made = self._call(layout.count_tokens, counts, valid, *sizes)
            self._ranks[key] = tuple(self._emitter.item(made, i) for i in range(4))
        return *self._ranks[key], not known

    def _decode(self, site: AttentionSite, kv: TrimmedKV, rank: fx.Node) -> fx.Node:
        pattern = kv.pattern
        bounds = self._once(layout.ring_bounds, rank, pattern.sink, pattern.local, pattern.turn)
        operands = site.q, kv.keys, kv.values, bounds, None, None, site.scale, site.softcap
        return self._emitter.call(
            torch.ops.flux.decode_attention.default, operands, like=site.output
        )

    def _stream(self, site: AttentionSite, kv: TrimmedKV, past: fx.Node, fresh: fx.Node) -> fx.Node:
        pattern = kv.pattern
        slots, valid, bounds, flags, start = self._by_age(site, pattern, past, fresh)
        keys = self._call(layout.unroll, kv.keys, slots, kv.new_keys)
        values = self._call(layout.unroll, kv.values, slots, kv.new_values)
        masks = bounds, valid, flags, None, start, None
        widths = pattern.sink, pattern.local, 0
        return self._emitter.call(
            torch.ops.flux.streaming_attention.default,
            (site.q, keys, values, *masks, *widths, site.scale, site.softcap),
            like=site.output,
        )

    def _by_age(
        self, site: AttentionSite, pattern: RingPattern, past: fx.Node, fresh: fx.Node
    ) -> tuple[fx.Node, ...]:
        key = "by age", past, pattern
        if key not in self._shared:
            emitter = self._emitter
            aged = self._call(layout.slots_by_age, past, pattern.sink, pattern.turn)
            slots, there = emitter.item(aged, 0), emitter.item(aged, 1)
            valid = emitter.call(torch.cat, ([there, fresh],), {"dim": 1})
            made = emitter.call(torch.ops.flux.mask_bounds.default, (valid,))
            options = {"dtype": torch.int32, "device": value_of(site.q).device}
            start = emitter.call(torch.full, ((1,), pattern.kept), options)
            self._shared[key] = slots, valid, emitter.item(made, 0), emitter.item(made, 1), start
        return self._shared[key]

    def _write(self, kv: TrimmedKV, rank: fx.Node, fresh: fx.Node) -> None:
        slots = self._once(layout.slots_to_write, rank, fresh, kv.pattern.sink, kv.pattern.turn)
        self._call(layout.write_ring_, kv.keys, slots, kv.new_keys)
        self._call(layout.write_ring_, kv.values, slots, kv.new_values)

    def _call(self, target, *args) -> fx.Node:
        return self._emitter.call(target, args)

    def _once(self, target, *args) -> fx.Node:
        key = target, *args
        if key not in self._shared:
            self._shared[key] = self._call(target, *args)
        return self._shared[key]


def may_trim(site: AttentionSite, policy: Policy, plan: RoutingPlan) -> bool:
    """Whether the layer's cache, in rows that are sparse, may forget what sparse decode does not
    read: it asks for that, for the pattern that the rows are routed to, and nothing else is read.
    """
    if site.marker is None or policy is Policy.FULL or plan.config.decode != "sparse":
        return False
    sink, local, _ = site.marker.args[1:]
    fits = (sink, local) == (plan.config.sink, plan.config.local)
    return fits and isinstance(site.mask, CausalMask) and not site.window and not site.forgets


def _check(site: AttentionSite, policy: Policy, plan: RoutingPlan) -> None:
    """A trimmed layer can be read in one way only."""
    pattern, config = site.trimmed.pattern, plan.config
    holds = f"{pattern.sink} sink and {pattern.local} local tokens"
    if policy is Policy.FULL:
        wants = "full attention"
    elif config.decode != "sparse":
        wants = f"{config.decode} decode"
    elif (config.sink, config.local) != (pattern.sink, pattern.local):
        wants = f"{config.sink} sink and {config.local} local tokens"
    elif site.window:
        wants = f"a sliding window of {site.window} tokens"
    elif isinstance(site.mask, GivenMask) and as_expr(site.q_shape[2]) != sympy.Integer(1):
        wants = "a given 4-D mask over several queries"
    else:
        return
    raise RewriteError(
        f"{site.path or site.output.name}: its cache has been trimmed to {holds}, but the model as "
        f"it is compiled now wants {wants}; start with a new cache"
    )
