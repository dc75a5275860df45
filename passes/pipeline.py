"""The passes in order, each timed: analyse, name, rewrite, verify."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fluxcompile.passes.arrange_operands import arrange_operands, drop_unused
from fluxcompile.passes.assign_layers import LayerOf, assign_layers
from fluxcompile.passes.branch_attention import branch_attention
from fluxcompile.passes.find_attention import find_attention
from fluxcompile.passes.find_cache import find_caches
from fluxcompile.passes.find_head_groups import find_head_groups
from fluxcompile.passes.find_query import find_queries
from fluxcompile.passes.insert_router import RouteSource
from fluxcompile.passes.insert_shares import ShareSource
from fluxcompile.passes.last_token import ask_last_token, read_last_token
from fluxcompile.passes.mix_attention import mix_attention
from fluxcompile.passes.plan import RoutingPlan
from fluxcompile.passes.project_rows import project_rows
from fluxcompile.passes.recover_kv import recover_kv
from fluxcompile.passes.recover_mask import recover_masks
from fluxcompile.passes.site import AttentionSite
from fluxcompile.passes.start_cache import start_caches
from fluxcompile.passes.store_rotary import store_rotary
from fluxcompile.passes.verify import verify, verify_mixture


@dataclass
class Rewrite:
    """What the passes made of one graph.

    ``routes`` is None when nothing was rewritten for inference, ``shares`` when nothing was for
    training.
    """

    gm: fx.GraphModule
    sites: list[AttentionSite]
    routes: RouteSource | None
    shares: ShareSource | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def analyse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    layer_of: LayerOf | None = None,
    layer_names: Sequence[str] = (),
) -> Rewrite:
    """Find the attentions and all that is known of them.

    Changes nothing, but for views of queries, keys and values whose axes stand in another order.
    """
    result = Rewrite(gm, [], None)
    clock = _Clock(result.seconds)
    result.sites = sites = clock("find_attention", lambda: find_attention(gm))
    if sites:
        clock("arrange_operands", lambda: arrange_operands(gm, sites))
        clock("recover_mask", lambda: recover_masks(sites))
        clock("recover_kv", lambda: recover_kv(sites))
        clock("find_head_groups", lambda: find_head_groups(gm, sites, example_inputs))
        clock("find_query", lambda: find_queries(gm, sites, example_inputs))
        clock("find_cache", lambda: find_caches(sites))
        clock(
            "assign_layers",
            lambda: assign_layers(gm, sites, example_inputs, layer_of, layer_names),
        )
    return result


def rewrite(result: Rewrite, plan: RoutingPlan) -> Rewrite:
    """Rewrite what may be rewritten, as ``plan`` says, and verify the outcome."""
    clock = _Clock(result.seconds)
    gm, sites = result.gm, result.sites
    if plan.training is not None:
        result.shares = clock("mix_attention", lambda: mix_attention(gm, sites, plan))
    else:
        clock("start_cache", lambda: start_caches(gm, sites))
        clock("read_last_token", lambda: read_last_token(gm, sites, plan))
        result.routes = clock("branch_attention", lambda: branch_attention(gm, sites, plan))
        clock("ask_last_token", lambda: ask_last_token(sites))
    drop_unused(sites)
    clock("store_rotary", lambda: store_rotary(gm))
    if sites and plan.training is None:
        clock("project_rows", lambda: project_rows(gm))
    clock("verify", lambda: verify(gm, sites))
    if result.shares is not None:
        clock("verify_mixture", lambda: verify_mixture(gm, sites, result.shares))
    clock("recompile", gm.recompile)
    return result


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds

    def __call__(self, name: str, stage: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = stage()
        self._seconds[name] = time.perf_counter() - start
        return result
