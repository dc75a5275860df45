"""``explain_prompt``: what it finds is what the model does."""

import inspect

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import DynamicCache

import fluxcompile
from fluxcompile import FluxCache, OptionError
from fluxcompile.cache_argument import CACHE_ARGUMENTS
from fluxcompile.explaining import explain_prompt
from fluxcompile.explaining.timed_graph import Stopwatch
from fluxcompile.passes.site import SkipReason
from tests.explaining import cases
from tests.passes.graphs import Layer, eager_softmax, hidden
from tests.router_models import random_router

PATHS = list(cases.PATHS)
PINNED = {"routes": [1, 0, 0, 1], "config": cases.SMALL}


@pytest.fixture(scope="module")
def pinned():
    return explain_prompt(cases.model(), options=PINNED, repeats=2, **cases.prompt())


class TestPinned:
    def test_layers(self, pinned):
        assert [row.path for row in pinned.layers.rows] == PATHS
        became = [row.became for row in pinned.layers.rows]
        assert became == ["full", "streaming", "streaming", "full"]

    def test_routes(self, pinned):
        assert pinned.routes.fa.tolist() == [[True, False, False, True]] * cases.ROWS
        assert pinned.routes.omega == 0.5

    def test_every_layer_is_timed(self, pinned):
        for times in (pinned.times.routed, pinned.times.full):
            assert list(times) == PATHS
            assert all(0 < seconds < 60 for seconds in times.values())
        assert "Median over 2 runs" in pinned.times.how
        assert "without Inductor" in pinned.times.how

    def test_memory_is_that_of_the_users_cache(self, pinned):
        model = cases.model()
        fluxcompile.compile(model, lowering="eager", **PINNED)
        cache = FluxCache(model, sink=cases.SMALL["sink"], local=cases.SMALL["local"])
        with torch.no_grad():
            model(**cases.prompt(), past_key_values=cache)
        assert pinned.memory == cache.memory()
        assert pinned.memory.trimmed == (1, 2)

    def test_full_memory_by_arithmetic(self, pinned):
        keys_and_values, kv_heads, head_dim, float32 = 2, 2, 16, 4
        whole = keys_and_values * cases.ROWS * kv_heads * cases.TOKENS * head_dim * float32
        assert pinned.memory.untrimmed == (whole,) * cases.LAYERS
        assert [pinned.memory.layers[i] == whole for i in range(4)] == [True, False, False, True]


@torch.no_grad()
def test_a_routers_routes_are_those_of_the_compiled_model():
    """Runs that are pinned to full, for their times, leave no trace, and the model is as it was."""
    model, given = cases.model(layers=2), cases.prompt()
    config = fluxcompile.FluxConfig(**cases.SMALL)
    router = random_router(head_dim=16, config=config)
    for layer, logits in zip(router.layers, ([0.0, 999.0], [999.0, 0.0]), strict=True):
        layer.head[-1].bias.copy_(torch.tensor(logits))
    fluxcompile.attach(model, router)
    logits = model(**given).logits
    report = explain_prompt(model, repeats=1, **given)
    assert {row.became for row in report.layers.rows} == {"routed: full or streaming"}
    assert report.routes.fa.tolist() == [[True, False]] * cases.ROWS
    assert fluxcompile.routes(model) is report.routes
    assert torch.equal(model(**given).logits, logits)
    assert model._compiled_call_impl is None
    fluxcompile.compile(model, lowering="eager")
    model(**given)
    assert torch.equal(fluxcompile.routes(model).fa, report.routes.fa)


def test_nobody_routes():
    report = explain_prompt(cases.model(layers=1), repeats=0, **cases.prompt())
    assert {row.reason for row in report.layers.rows} == {SkipReason.NO_ROUTER}
    assert report.times is None
    assert report.routes is None or report.routes.omega == 0
    assert report.memory.share == 1.0


@pytest.mark.slow
def test_no_cache_is_forced_on_a_call_without_one():
    report = explain_prompt(
        cases.model(), options=PINNED, repeats=0, use_cache=False, **cases.prompt()
    )
    assert report.memory is None
    assert {row.cache for row in report.layers.rows} == {"none"}


@pytest.mark.parametrize("name", CACHE_ARGUMENTS)
def test_a_cache_of_the_callers_is_the_only_one(name):
    model = cases.model(layers=1)
    if name not in inspect.signature(model.forward).parameters:
        pytest.skip(f"this transformers does not take {name}=")
    cache = DynamicCache(config=model.config)
    report = explain_prompt(model, repeats=0, **{name: cache}, **cases.prompt())
    assert report.memory is None
    assert cache.get_seq_length() == cases.prompt()["input_ids"].shape[1]


def test_a_hand_written_model_with_a_layer_that_is_left_alone():
    net = nn.Sequential(Layer(), Layer(eager_softmax)).requires_grad_(False)
    options = {"routes": "sparse", "config": {**cases.SMALL, "sink": 2, "local": 4}}
    report = explain_prompt(net, hidden(), options=options, repeats=1)
    assert report.memory is None
    assert [row.became for row in report.layers.rows] == ["streaming", "left alone"]
    assert set(report.times.routed) == {"0"}, "what is written out is no operator"


def test_layers_that_are_compiled_again_count_once():
    class Forgetful(nn.Module):
        """Every call has to be traced again."""

        def __init__(self):
            super().__init__()
            self.layer, self.calls = Layer(), 0

        def forward(self, x):
            self.calls += 1
            return self.layer(x) + self.calls

    net = Forgetful().requires_grad_(False)
    options = {"routes": "sparse", "config": {**cases.SMALL, "sink": 2, "local": 4}}
    counters.clear()
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=False):
        report = explain_prompt(net, hidden(), options=options, repeats=2)
    assert net.calls == counters["stats"]["unique_graphs"] == 6
    assert [row.path for row in report.layers.rows] == ["layer"]
    assert list(report.times.routed) == ["layer"]


def test_a_stopwatch_takes_medians_of_whole_calls():
    watch = Stopwatch()
    for seconds in ((100.0,), (1.0, 2.0), (4.0,), (5.0, 4.0)):  # the first one warms up
        watch.next_call()
        for part in seconds:
            watch.add("layer", part)
    assert watch.medians() == {"layer": 4.0}


@pytest.mark.parametrize("repeats", [-1, 1.5, True])
def test_bad_repeats(repeats):
    with pytest.raises(OptionError, match="repeats: expected an int >= 0"):
        explain_prompt(cases.model(), repeats=repeats, **cases.prompt())


def test_unknown_options():
    with pytest.raises(OptionError, match="expected any of"):
        explain_prompt(cases.model(), options={"routs": "full"}, **cases.prompt())
