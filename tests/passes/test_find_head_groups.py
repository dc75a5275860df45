"""Layers whose heads are spread over processes: what a router then reads, and where it cannot."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fluxcompile.heads_of_all import mean_over_groups
from fluxcompile.layer_router import LayerRouter
from fluxcompile.passes import find_head_groups
from fluxcompile.passes.pipeline import rewrite
from fluxcompile.passes.plan import Policy, RoutingPlan, Training
from fluxcompile.passes.site import SkipReason

from .graphs import CONFIG, Layer, hidden, record


@pytest.fixture
def spread(monkeypatch):
    """The weights whose groups are asked for; each is split over a group named "heads"."""
    asked = []

    def groups(weight):
        asked.append(weight)
        return ("heads",)

    monkeypatch.setattr(find_head_groups, "_groups", groups)
    monkeypatch.setattr(find_head_groups, "_one_process", lambda: False)
    return asked


def routed(config=CONFIG, **layer):
    model = Layer(**layer).requires_grad_(False)
    return model, record(model, hidden()).rewrite(Policy.ROUTER, config)


def test_the_mean_is_taken_over_the_group(spread):
    _, result = routed()
    (reduced,) = result.gm.graph.find_nodes(op="call_function", target=mean_over_groups)
    assert reduced.args[2] == ("heads",)
    (decided,) = result.gm.graph.find_nodes(
        op="call_function", target=torch.ops.flux.route_features.default
    )
    assert decided.args[0] is reduced


def test_the_weight_is_the_projection_s_not_the_norm_s(spread):
    model, _ = routed(norm=nn.RMSNorm(8))
    assert all(weight is model.q_proj.weight for weight in spread)
    assert spread


def test_a_router_of_single_heads_does_not_route(spread):
    config = replace(CONFIG, heads="each")
    model = Layer().requires_grad_(False)
    recorded = record(model, hidden())
    result = recorded.rewrite(Policy.ROUTER, config)
    assert result.sites[0].not_routed.reason is SkipReason.HEADS_ELSEWHERE
    assert result.sites[0].became == "full"


def test_training_wants_whole_layers(spread):
    result = record(Layer().requires_grad_(False), hidden()).analyse()
    plan = RoutingPlan(CONFIG, {0: Policy.ROUTER}, {0: LayerRouter(8)}, training=Training.SOFT)
    rewrite(result, plan)
    assert result.sites[0].skip.reason is SkipReason.HEADS_ELSEWHERE


def test_static_routes_read_nothing(spread):
    result = record(Layer().requires_grad_(False), hidden()).rewrite(Policy.SPARSE)
    assert result.sites[0].became == "streaming"
    assert not result.gm.graph.find_nodes(op="call_function", target=mean_over_groups)


def test_whole_layers_have_no_group():
    _, result = routed()
    assert result.sites[0].head_groups == ()
    assert not result.gm.graph.find_nodes(op="call_function", target=mean_over_groups)
