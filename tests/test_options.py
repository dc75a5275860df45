"""The backend's options: each one, what it refuses, and how ``torch.compile`` hands them over."""

import numpy
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import fluxcompile
from fluxcompile.config import FluxConfig
from fluxcompile.errors import ConfigError, FluxWarning, OptionError, RouterError
from fluxcompile.options import CompileOptions
from tests.passes.graphs import Stack, hidden
from tests.router_models import random_router

KNOWN = ["router", "config", "routes", "strict", "lowering", "inductor"]
SMALL = {"sink": 2, "local": 4, "pool_size": 3}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Stack().requires_grad_(False)


@pytest.fixture(scope="module")
def x():
    return hidden(length=12)


def run(model, x, mode=None, **options):
    options = None if mode else {"lowering": "eager", **options}
    with torch.no_grad():
        return torch.compile(model, backend="flux", mode=mode, options=options)(x)


def refused(model, x, error, **options):
    """The user's error is inside the one that Dynamo raises for every backend."""
    with pytest.raises(BackendCompilerFailed) as caught:
        run(model, x, **options)
    assert type(caught.value.inner_exception) is error
    assert str(caught.value.inner_exception) in str(caught.value)
    return str(caught.value.inner_exception)


def test_defaults():
    assert CompileOptions.parse(None, None) == CompileOptions.parse({}, None) == CompileOptions()
    options = CompileOptions()
    assert (options.lowering, options.strict, options.routes) == ("inductor", False, None)


def test_unknown_options_list_the_known_ones():
    with pytest.raises(OptionError) as caught:
        CompileOptions.parse({"sink": 4, "router ": None, "strict": True}, None)
    message = str(caught.value)
    assert all(repr(name) in message for name in KNOWN)
    assert "'sink'" in message
    assert "'router '" in message


def test_mode_is_no_option():
    with pytest.raises(OptionError, match="mode"):
        CompileOptions.parse({"mode": "default"}, None)


BAD = {
    "router": [3, ["a"], 1.5, True],
    "config": [3, "streaming", ["sink"]],
    "routes": ["all", "", [], (), [2], [0.5], ["1"], 1, b"", {0: 1}, [None], {0, 1}, [[0], [1]]],
    "strict": [1, 0, "yes", None],
    "lowering": ["Inductor", "", None, 3, ["eager"]],
    "inductor": [3, ["max_autotune"], {"no_such_setting": 1}, {"triton.no_such": 1}, {3: 4}],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in BAD for value in BAD[name]], ids=str
)
def test_bad_values(name, value):
    with pytest.raises(OptionError) as caught:
        CompileOptions.parse({name: value}, None)
    assert str(caught.value).startswith(f"{name}: expected ")
    assert "got" in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [{"sink": 0}, {"local": 0}, {"pool_size": 0}, {"sink": -1}, {"sparse": "blocks"}, {"snk": 3}],
    ids=str,
)
def test_bad_config_fields(fields):
    with pytest.raises(ConfigError):
        CompileOptions.parse({"config": fields}, None)


@pytest.mark.parametrize("value", ["router", "full", "sparse", None])
def test_routes_by_word(value):
    assert CompileOptions.parse({"routes": value}, None).routes == value


@pytest.mark.parametrize("value", [[0, 1], (False, True), [0.0, 1.0], numpy.array([0, 1]).tolist()])
def test_routes_by_layer(value):
    assert CompileOptions.parse({"routes": value}, None).routes == (0, 1)


def test_config_as_object_or_fields():
    config = FluxConfig(sink=3)
    assert CompileOptions.parse({"config": config}, None).config is config
    assert CompileOptions.parse({"config": {"sink": 3}}, None).config == config


def test_router_as_object_or_path(tmp_path):
    router = random_router()
    assert CompileOptions.parse({"router": router}, None).router is router
    router.save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path)):
        loaded = CompileOptions.parse({"router": path}, None).router
        assert loaded.layer_names == router.layer_names


class TestInductor:
    """Inductor's own settings."""

    def test_dashes_are_underscores(self):
        options = CompileOptions.parse({"inductor": {"max-autotune": True}}, None)
        assert options.inductor == {"max_autotune": True}

    def test_nested(self):
        options = CompileOptions.parse({"inductor": {"triton.cudagraphs": True}}, None)
        assert options.inductor_patches() == {"triton.cudagraphs": True}

    def test_mode_then_options(self):
        options = CompileOptions.parse(
            {"inductor": {"triton.cudagraphs": False}}, "reduce-overhead"
        )
        assert options.inductor_patches() == {"triton.cudagraphs": False}
        assert CompileOptions.parse(None, "reduce-overhead").inductor_patches() == {
            "triton.cudagraphs": True
        }

    @pytest.mark.parametrize(
        "mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", None]
    )
    def test_modes(self, mode):
        assert CompileOptions.parse(None, mode).inductor_mode == mode

    @pytest.mark.parametrize("mode", ["fast", "", "Default", 3])
    def test_unknown_modes(self, mode):
        with pytest.raises(OptionError, match="default"):
            CompileOptions.parse(None, mode)

    def test_a_mode_s_own_settings_stay_as_they_are(self):
        from torch._inductor import list_mode_options

        before = {name: dict(value) for name, value in list_mode_options().items()}
        CompileOptions.parse(
            {"inductor": {"fallback_random": True}}, "max-autotune"
        ).inductor_patches()
        assert list_mode_options() == before


class TestCompile:
    """Through ``torch.compile``."""

    def test_it_is_found_by_name(self):
        assert "flux" in torch._dynamo.list_backends()
        from fluxcompile.backend import flux

        assert torch._dynamo.lookup_backend("flux") is flux

    def test_unknown_option(self, model, x):
        message = refused(model, x, OptionError, sinks=3)
        assert all(name in message for name in KNOWN)

    def test_bad_values(self, model, x):
        refused(model, x, OptionError, routes="none")
        refused(model, x, OptionError, lowering="tvm")
        refused(model, x, ConfigError, config={"sink": 0})

    def test_router_wanted_and_none_there(self, model, x):
        assert "router" in refused(model, x, OptionError, routes="router")

    def test_a_number_of_routes_that_is_not_the_layers(self, model, x):
        assert "expected 2 entries" in refused(model, x, OptionError, routes=[0, 1, 1])
        assert "expected 2 entries" in refused(model, x, OptionError, routes=[0])

    @pytest.mark.parametrize("sparse", ["streaming", "xattention", "triangle", "power"])
    def test_sparse_modes(self, model, x, sparse):
        config = {"sparse": sparse, "sink": 1, "local": 2, "block": 16}
        run(model, x, config=config, routes="sparse")
        assert fluxcompile.routes(model).omega == 1.0

    def test_retrieval_is_what_routed_layers_take_for_full(self, model):
        config = {"sink": 1, "local": 2, "block": 16, "retrieval": "xattention"}
        long = hidden(length=40)

        def became(routes):
            options = {"config": config, "routes": routes}
            return [row.became for row in fluxcompile.explain(model, long, options=options).rows]

        assert became((1, 0)) == ["xattention", "streaming"]
        assert became("full") == ["full", "full"]
        run(model, long, config=config, routes=[1, 0])
        assert fluxcompile.routes(model).fa.tolist() == [[True, False]] * 2

    @pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
    def test_lowerings(self, model, x, lowering):
        out = run(model, x, lowering=lowering, routes="full")
        torch.testing.assert_close(out, model(x), atol=2e-5, rtol=2e-5)

    def test_routes_reach_the_graph(self, model, x):
        run(model, x, routes=[1, 0], config=SMALL)
        assert fluxcompile.routes(model).fa.tolist() == [[True, False]] * 2
        run(model, x, routes=(0, 0), config=FluxConfig(**SMALL))
        assert fluxcompile.routes(model).omega == 1.0

    def test_the_router_s_config_is_the_default(self, model, x):
        router = random_router(head_dim=8, config=FluxConfig(sink=1, local=2))
        rows = fluxcompile.explain(model, x, options={"router": router}).rows
        assert {row.became for row in rows} == {"routed: full or streaming"}
        wide = {"router": router, "config": FluxConfig()}
        rows = fluxcompile.explain(model, x, options=wide).rows
        assert {row.became for row in rows} == {"full (short enough to be equal)"}

    def test_an_option_s_router_goes_before_the_attached_one(self, model, x):
        attached, given = random_router(head_dim=8), random_router(head_dim=8)
        with torch.no_grad():
            attached.layers.requires_grad_(False)
            for layers, bias in ((attached.layers, [9.0, 0.0]), (given.layers, [0.0, 9.0])):
                for layer in layers:
                    layer.head[-1].weight.zero_()
                    layer.head[-1].bias.copy_(torch.tensor(bias))
        fluxcompile.attach(model, attached)
        try:
            run(model, x)
            assert fluxcompile.routes(model).omega == 1.0
            run(model, x, router=given)
            assert fluxcompile.routes(model).omega == 0.0
            run(model, x, routes="full")
            assert fluxcompile.routes(model).omega == 0.0
        finally:
            fluxcompile.detach(model)

    def test_a_router_of_another_head_dim(self, model, x):
        message = refused(model, x, RouterError, router=random_router(head_dim=4))
        assert "expected 8" in message
        assert "got 4" in message

    def test_unknown_mode(self, model, x):
        with pytest.raises(BackendCompilerFailed) as caught:
            run(model, x, mode="fastest")
        assert type(caught.value.inner_exception) is OptionError

    def test_a_mode_is_handed_to_inductor(self, model, x, monkeypatch):
        """Hugging Face's own compile passes ``reduce-overhead``; prompts run without graphs."""
        seen = {}
        monkeypatch.setattr("fluxcompile.backend._warned", set())

        def compile_fx(gm, inputs, config_patches=None):
            seen.update(config_patches)
            return gm.forward

        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
        with pytest.warns(FluxWarning, match="no router"):
            run(model, x, mode="reduce-overhead")
        assert seen["triton.cudagraphs"] is False
        assert seen.keys() >= {"post_grad_custom_post_pass"}
        seen.clear()
        run(model, x, routes="full", lowering="inductor", inductor={"max_autotune": True})
        assert seen["max_autotune"] is True
        assert "triton.cudagraphs" not in seen
