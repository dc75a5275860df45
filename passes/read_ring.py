"""Attention over a cache of rings, in the place of all keys.

======  ===========================================================================================
before  ``k = ring_cache(new_k, ring_k, ...)``; ``sdpa(q, k, v, mask over all tokens)``
few     write the new tokens into the rings; ``flux::decode_attention`` over the rings
more    ``flux::streaming_attention`` over the rings' tokens by age and the new ones; then write
======  ===========================================================================================

Legal because rings hold whatever may be read: a layer whose rings are trimmed is sparse in every
row, and a query's window is counted in valid tokens, of which rings drop none within it. The order
in a ring is not that of the sequence, which only a positional mask would notice, and none is left:
what a query sees of the rings is worked out from the tokens' ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch import fx

from fluxcompile.errors import RewriteError
from fluxcompile.kernels.ring import layout
from fluxcompile.kernels.ring.layout import RingPattern
from fluxcompile.kernels.validation import MAX_DECODE_QUERIES
from fluxcompile.passes.emit import Emitter
from fluxcompile.passes.graph_util import as_expr, value_of
from fluxcompile.passes.insert_router import RouteSource
from fluxcompile.passes.mask_operands import MaskOperandCache
from fluxcompile.passes.plan import Policy, RoutingPlan
from fluxcompile.passes.site import AttentionSite, CausalMask, GivenMask, RingKV


def may_become_ring(site: AttentionSite) -> bool:
    """Whether the layer's cache asks for it, and the graph knows which of its tokens are valid."""
    return site.marker is not None and isinstance(site.mask, CausalMask) and not site.forgets


def allow_trimming(site: AttentionSite, policy: Policy, plan: RoutingPlan) -> None:
    """Set whether the layer's cache, in rows that are sparse, may drop what sparse decode does not
    read: it asks for the pattern that rows are routed to, and nothing else is read.
    """
    config, pattern = plan.config, RingPattern.of_code(site.marker.args[1])
    if policy is Policy.FULL:
        return
    if site.window:
        site.not_trimmed = f"the layer has a window of {site.window} tokens"
    elif config.decode != "sparse":
        site.not_trimmed = f'FluxConfig.decode is "{config.decode}"'
    elif (pattern.sink, pattern.local) != (config.sink, config.local):
        site.not_trimmed = (
            f"routes read {config.sink} sink and {config.local} local tokens, not {pattern.sink} "
            f"and {pattern.local}"
        )
    site.may_trim = not site.not_trimmed


class RingReader:
    """Rewrites sites over rings; what depends on the tokens alone is made once."""

    def __init__(self, emitter: Emitter, masks: MaskOperandCache, routes: RouteSource) -> None:
        self._emitter = emitter
        self._masks = masks
        self._routes = routes
        self._counted: set[fx.Node] = set()
        self._made: dict[tuple, fx.Node] = {}

    def read(self, site: AttentionSite, policy: Policy, plan: RoutingPlan) -> fx.Node:
        """Attention ``[B, Sq, H, D]`` of ``site``.

        Raises:
            RewriteError: this call wants to read more than the cache holds.
        """
        whole = site.ring.is_whole
        _check(site, policy, plan, whole)
        route = None
        if whole and policy is Policy.ROUTER:
            route = self._routes.route(site, plan.routers[site.layer])
        full = policy is Policy.FULL
        queries = as_expr(site.q_shape[2])
        few = queries.is_Integer and int(queries) <= MAX_DECODE_QUERIES
        few = few and (whole or site.ring.pattern.holds(int(queries)))
        site.became = ("decode" if few else "streaming") + (
            " of a whole ring" if whole else " of a trimmed ring"
        )
        with self._emitter.graph.inserting_before(site.output):
            step = self._step(site)
            if few:
                self._write(site, step)
                dense = full or plan.config.decode != "sparse"
                result = self._decode(site, step, plan, None if dense else route, dense)
            else:
                result = self._stream(site, step, plan, route, full)
                self._write(site, step)
            return self._count(site, step, result)

    def _step(self, site: AttentionSite) -> tuple[fx.Node, ...]:
        """``past``, ``rank``, ``fresh`` and agreement of :func:`layout.count_tokens`."""
        ring, size = site.ring, self._emitter.size
        valid = self._masks.key_valid(site)
        queries = size(as_expr(site.q_shape[2]))
        key = "step", ring.counts, valid, as_expr(site.q_shape[2])
        if key not in self._made:
            length = size(as_expr(site.k_shape[2]))
            args = ring.counts, ring.seen, valid, length, queries, ring.pattern.room > 0
            made = self._emitter.call(layout.count_tokens, args)
            self._made[key] = tuple(self._emitter.item(made, i) for i in range(4))
        return self._made[key]

    def _count(self, site: AttentionSite, step: tuple[fx.Node, ...], result: fx.Node) -> fx.Node:
        """Once for all layers that share the counts: count on, and check that they are right."""
        ring = site.ring
        if ring.seen is not None and ring.seen not in self._counted:
            queries = self._emitter.size(as_expr(site.q_shape[2]))
            self._emitter.call(layout.count_seen_, (ring.seen, queries))
            self._counted.add(ring.seen)
        if ring.counts in self._counted:
            return result
        self._counted.add(ring.counts)
        _, rank, _, same = step
        self._emitter.call(layout.count_written_, (ring.counts, rank))
        return self._emitter.call(torch.ops.flux.agree.default, (result, same))

    def _decode(
        self,
        site: AttentionSite,
        step: tuple[fx.Node, ...],
        plan: RoutingPlan,
        route: fx.Node | None,
        dense: bool,
    ) -> fx.Node:
        ring, rank = site.ring, step[1]
        if dense:
            bounds = self._once(layout.dense_bounds, rank)
        else:
            # Of a whole ring, where rank and slot are the same, any pattern can be read.
            sink, local = plan.config.sink, plan.config.local
            bounds = self._once(layout.ring_bounds, rank, sink, local, self._turn(ring, sink))
        operands = site.q, ring.keys, ring.values, bounds, None, route, site.scale, site.softcap
        return self._emitter.call(
            torch.ops.flux.decode_attention.default, operands, like=site.output
        )

    def _stream(
        self,
        site: AttentionSite,
        step: tuple[fx.Node, ...],
        plan: RoutingPlan,
        route: fx.Node | None,
        full: bool,
    ) -> fx.Node:
        ring = site.ring
        slots, *masks = self._by_age(site, step)
        keys = self._emitter.call(layout.unroll, (ring.keys, slots, ring.new_keys))
        values = self._emitter.call(layout.unroll, (ring.values, slots, ring.new_values))
        operands = site.q, keys, values, *masks
        score = 0, site.scale, site.softcap
        target = torch.ops.flux.full_attention.default
        if not full:
            target = torch.ops.flux.streaming_attention.default
            operands += route, plan.config.sink, plan.config.local
        return self._emitter.call(target, (*operands, *score), like=site.output)

    def _by_age(self, site: AttentionSite, step: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """Slots, oldest token first, and the mask operands of these and the new tokens."""
        past, _, fresh, _ = step
        ring, emitter = site.ring, self._emitter
        key = "by age", past, ring.pattern, ring.slots
        if key not in self._made:
            turn = self._turn(ring, ring.pattern.sink)
            aged = emitter.call(layout.slots_by_age, (past, ring.pattern.sink, turn))
            slots, there = emitter.item(aged, 0), emitter.item(aged, 1)
            valid = emitter.call(torch.cat, ([there, fresh],), {"dim": 1})
            made = emitter.call(torch.ops.flux.mask_bounds.default, (valid,))
            options = {"dtype": torch.int32, "device": value_of(site.q).device}
            start = emitter.call(torch.full, ((1,), emitter.size(ring.slots - 1)), options)
            bounds, flags = emitter.item(made, 0), emitter.item(made, 1)
            self._made[key] = slots, bounds, valid, flags, None, start
        return self._made[key]

    def _write(self, site: AttentionSite, step: tuple[fx.Node, ...]) -> None:
        ring = site.ring
        _, rank, fresh, _ = step
        sink = ring.pattern.sink
        turn = self._turn(ring, sink)
        slots = self._once(layout.slots_to_write, rank, fresh, sink, turn)
        self._emitter.call(layout.write_ring_, (ring.keys, slots, ring.new_keys))
        self._emitter.call(layout.write_ring_, (ring.values, slots, ring.new_values))

    def _turn(self, ring: RingKV, sink: int) -> int | fx.Node:
        expression = sympy.expand(ring.slots - 1 - sink)
        key = "turn", expression
        if key not in self._made:
            self._made[key] = self._emitter.size(expression)
        return self._made[key]

    def _once(self, target: Callable[..., object], *args: object) -> fx.Node:
        key = target, *args
        if key not in self._made:
            self._made[key] = self._emitter.call(target, args)
        return self._made[key]


def _check(site: AttentionSite, policy: Policy, plan: RoutingPlan, whole: bool) -> None:
    """Rings are read by their tokens' ranks, trimmed ones besides in one way only."""
    pattern, config = site.ring.pattern, plan.config
    routed = policy is not Policy.FULL and config.decode == "sparse"
    wants = None
    if site.window:
        wants = f"a sliding window of {site.window} tokens"
    elif isinstance(site.mask, GivenMask) and as_expr(site.q_shape[2]) != 1:
        wants = "a given 4-D mask over several queries"
    elif routed and not whole and (config.sink, config.local) != (pattern.sink, pattern.local):
        wants = f"{config.sink} sink and {config.local} local tokens"
    elif not routed and not whole:
        wants = "full attention" if policy is Policy.FULL else f"{config.decode} decode"
    if wants is not None:
        kept = "all tokens by rank" if whole else f"{pattern.sink} sink and {pattern.local} local"
        raise RewriteError(
            f"{site.path or site.output.name}: its cache keeps {kept}, but the model as it is "
            f"compiled now wants {wants}; start with a new cache"
        )
