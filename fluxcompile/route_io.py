"""Add the routes to a rewritten graph's outputs, and say where the runtime finds what it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fluxcompile.passes.graph_util import op_name, same_size
from fluxcompile.passes.pipeline import Rewrite
from fluxcompile.passes.plan import Policy, RoutingPlan
from fluxcompile.passes.site import AttentionSite
from fluxcompile.planning import Planner
from fluxcompile.ring_io import ring_io, trimmed_layers
from fluxcompile.runtime import RouteIO


def route_io(
    result: Rewrite, plan: RoutingPlan, planner: Planner, inputs: Sequence[Any]
) -> RouteIO:
    """Describe the graph's routes to the runtime, adding the routes output if there is one."""
    gm, routes = result.gm, result.routes
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    model_key = next((i for i, x in enumerate(inputs) if isinstance(x, torch.nn.Parameter)), None)
    own = len(next(iter(reversed(gm.graph.nodes))).args[0])
    carriers = _carriers(gm, routes.columns)
    growing = ring_io(gm, result.sites, routes.columns)
    valids = len(next(iter(reversed(gm.graph.nodes))).args[0]) - own
    if not routes.columns:
        io = _static_io(result, plan, planner, placeholders, model_key)
        return dataclasses.replace(io, growing=growing, valids=valids)
    sites = routes.columns
    positions = {node: position for position, node in enumerate(placeholders)}
    past = next((site.past_key for site in sites if site.past_key is not None), None)
    io = RouteIO(
        layers=tuple(site.layer for site in sites),
        layer_names=tuple(planner.layer_name(site) for site in sites),
        takes_routes=routes.routes_input is not None,
        past_key=None if past is None else positions[past],
        carriers=carriers,
        decides=any(site.may_start_prompt for site in sites),
        model_key=model_key,
        generation=planner.generation,
        strict=plan.strict,
        growing=growing,
        valids=valids,
        trimmed=trimmed_layers(result.sites),
    )
    if not io.keeps_routes:
        append_output(gm, routes.decided)
    return io


def _static_io(
    result: Rewrite,
    plan: RoutingPlan,
    planner: Planner,
    placeholders: list[fx.Node],
    model_key: int | None,
) -> RouteIO:
    sites = [site for site in result.sites if site.skip is None and site.layer is not None]
    batch = next((i for i, node in enumerate(placeholders) if _is_batch_first(node, sites)), None)
    return RouteIO(
        layers=tuple(site.layer for site in sites),
        layer_names=tuple(planner.layer_name(site) for site in sites),
        static=tuple(_takes_full(site, plan) for site in sites),
        decides=any(site.may_start_prompt for site in sites),
        model_key=model_key,
        generation=planner.generation,
        batch_input=batch,
    )


def _is_batch_first(node: fx.Node, sites: list[AttentionSite]) -> bool:
    value = node.meta.get("example_value")
    if not sites or not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return False
    batch, _, queries, _ = sites[0].q_shape
    leading = value.dim() in (2, 3) and same_size(value.shape[0], batch)
    return leading and same_size(value.shape[1], queries)


def _takes_full(site: AttentionSite, plan: RoutingPlan) -> bool:
    policy = plan.policies.get(site.layer, Policy.FULL)
    return policy is Policy.FULL or site.not_routed is not None


def append_output(gm: fx.GraphModule, columns: list[fx.Node]) -> None:
    """Add ``columns``, each ``[B, ...]``, to the graph's outputs as ``[B, len(columns), ...]``."""
    output = next(iter(reversed(gm.graph.nodes)))
    with gm.graph.inserting_before(output):
        stacked = gm.graph.call_function(torch.stack, (columns,), {"dim": 1})
    output.args = ((*output.args[0], stacked),)
    gm.graph.lint()
    gm.recompile()


def _carriers(gm: fx.GraphModule, sites: list[AttentionSite]) -> tuple[int, ...]:
    """Positions among the outputs of the routed layers' key caches; static buffers have none."""
    output = next(iter(reversed(gm.graph.nodes)))
    found = []
    for site in sites:
        for position, node in enumerate(output.args[0]):
            if not isinstance(node, fx.Node):
                continue
            if node in (site.k, site.key_buffer) or _slice_of(node, site.k):
                found.append(position)
                break
    return tuple(found)


def _slice_of(node: fx.Node, key: fx.Node) -> bool:
    return op_name(node) == "getitem" and node.args[0] is key
