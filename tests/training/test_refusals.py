"""What training cannot do is said, never silently left out."""

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from transformers import DynamicCache

import fluxcompile
from fluxcompile import OptionError, RewriteError, RouterError, soft_routes
from fluxcompile.options import CompileOptions
from fluxcompile.passes.site import SkipReason
from tests.parity.models import WINDOW, flux_config, prompt
from tests.passes.graphs import Stack, hidden
from tests.training import cases
from tests.training.cases import LONG, SHORT


def refused(error, call) -> str:
    """The user's error is inside the one that Dynamo raises for every backend."""
    with pytest.raises(BackendCompilerFailed) as caught:
        call()
    assert type(caught.value.inner_exception) is error
    return str(caught.value.inner_exception)


@pytest.fixture
def case():
    return cases.compiled(cases.trainable("llama"))


def test_a_cache(case):
    batch = prompt(2, LONG, "left")
    message = refused(RewriteError, lambda: case.model(batch.ids, attention_mask=batch.mask))
    assert "use_cache=False" in message
    assert "layers.0.self_attn" in message


def test_a_token_on_top_of_a_cache(case):
    batch = prompt(2, LONG)
    cache = DynamicCache(config=case.model.config)
    case.model.forward(batch.ids, past_key_values=cache)
    message = refused(RewriteError, lambda: case.model(batch.ids[:, :1], past_key_values=cache))
    assert "use_cache=False" in message


def test_a_mask_that_is_not_causal(case):
    """A float mask of the user's own is no mask of the kind that is recovered."""
    batch = prompt(2, LONG)
    mask = torch.randn(2, 1, LONG, LONG, dtype=torch.float64)
    assert "mask is not causal" in refused(
        RewriteError, lambda: case.model(batch.ids, attention_mask=mask, use_cache=False)
    )


def test_dropout():
    case = cases.trainable("llama", overrides={"attention_dropout": 0.5})
    cases.compiled(case).model.train()
    assert "dropout" in refused(
        RewriteError, lambda: cases.lm_loss(case.model, prompt(2, LONG, "left"))
    )


def test_gradient_checkpointing(case):
    case.model.train()
    case.model.gradient_checkpointing_enable()
    message = refused(RewriteError, lambda: cases.lm_loss(case.model, prompt(2, LONG, "left")))
    assert "activation_memory_budget" in message


@pytest.mark.parametrize("sparse", ["xattention", "power"])
@pytest.mark.parametrize("routes", ["router", "locked", "sparse"])
def test_sparse_modes_without_a_backward(sparse, routes):
    case = cases.compiled(cases.trainable("llama", sparse=sparse, block=16), routes=routes)
    message = refused(OptionError, lambda: cases.lm_loss(case.model, prompt(2, LONG)))
    assert "['streaming', 'triangle']" in message
    assert repr(sparse) in message


def test_retrieval_without_a_backward():
    case = cases.compiled(cases.trainable("llama", retrieval="xattention", block=16))
    assert "['full']" in refused(OptionError, lambda: cases.lm_loss(case.model, prompt(2, LONG)))


def test_a_model_that_is_not_frozen(case):
    case.model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    message = refused(OptionError, lambda: cases.lm_loss(case.model, prompt(2, LONG)))
    assert "1 parameters" in message
    assert "locked" in message


def test_no_router():
    x = hidden(length=12)
    for routes, part in ((None, "attach"), ("locked", "locked")):
        options = {"mode": "train", "lowering": "eager", "routes": routes}
        compiled = torch.compile(Stack().requires_grad_(False), backend="flux", options=options)
        assert part in refused(OptionError, lambda compiled=compiled: compiled(x))


def test_options():
    assert CompileOptions.parse(None, None).mode == "infer"
    assert CompileOptions.parse({"mode": "train"}, "default").inductor_mode == "default"
    assert CompileOptions.parse({"mode": "train", "routes": "locked"}, None).routes == "locked"
    for mode in ("Train", "", None, 1, "reduce-overhead", ["train"]):
        with pytest.raises(OptionError, match=r"\['infer', 'train'\].*torch.compile"):
            CompileOptions.parse({"mode": mode}, None)
    with pytest.raises(OptionError, match="locked"):
        CompileOptions.parse({"routes": "locked"}, None)


def test_a_layer_without_a_router():
    """Full attention, as its router's owner chose; no column, and no share to miss."""
    case = cases.trainable("llama")
    some = fluxcompile.FluxRouter.from_model(
        case.model, flux_config(), layers=["model.layers.1.self_attn"]
    )
    fluxcompile.attach(case.model, some)
    cases.compiled(case)
    batch = prompt(2, LONG)
    with pytest.warns(fluxcompile.FluxWarning, match="no entry"), soft_routes(some) as soft:
        cases.lm_loss(case.model, batch)
    assert soft.shares().shape == (2, 1)


def test_a_window_within_local():
    """Never routed: its share is the constant 1, and is marked."""
    case = cases.compiled(cases.trainable("mistral", local=WINDOW))
    with soft_routes(case.router) as soft:
        cases.lm_loss(case.model, prompt(2, LONG + 30))
    assert soft.routed.tolist() == [False, False]
    with pytest.raises(RouterError, match="at least one routed layer"):
        soft.shares()


def test_explain_reports_what_training_would_refuse():
    case = cases.trainable("llama")
    batch = prompt(2, LONG, "left")
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
    rows = fluxcompile.explain(case.model, **inputs, options={"mode": "train"}).rows
    assert [row.reason for row in rows] == [SkipReason.CACHE_IN_TRAINING] * 2
    rows = fluxcompile.explain(
        case.model, **inputs, use_cache=False, options={"mode": "train"}
    ).rows
    assert [row.became for row in rows] == ["mixed: full and streaming"] * 2


class TestSettings:
    def test_noise_of_another_shape(self, case):
        for shape in [(2, 2), (3, 2, 2), (2, 3, 2), (1, 2, 2)]:
            noise = torch.zeros(shape)
            with pytest.raises(RouterError, match="noise"), soft_routes(case.router, noise=noise):
                cases.lm_loss(case.model, prompt(2, SHORT))

    def test_noise_of_integers(self, case):
        noise = torch.zeros(2, 2, 2, dtype=torch.int64)
        with pytest.raises(RouterError, match="float32"), soft_routes(case.router, noise=noise):
            cases.lm_loss(case.model, prompt(2, SHORT))

    @pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "1"])
    def test_temperature(self, case, temperature):
        with (
            pytest.raises(RouterError, match="temperature"),
            soft_routes(case.router, temperature=temperature),
        ):
            cases.lm_loss(case.model, prompt(2, SHORT))

    @pytest.mark.parametrize("hardness", [-0.1, 1.5, float("nan"), "1"])
    def test_hardness(self, case, hardness):
        with (
            pytest.raises(RouterError, match="hardness"),
            soft_routes(case.router, hardness=hardness),
        ):
            cases.lm_loss(case.model, prompt(2, SHORT))

    def test_shares_before_a_forward(self, case):
        with soft_routes(case.router) as soft, pytest.raises(RouterError, match=r"layers\.0"):
            soft.shares()

    def test_shares_of_a_layer_that_was_left_out(self, case):
        with soft_routes(case.router) as soft:
            soft.leave((0, 1), torch.ones(2, 2))
            soft.leave((0,), torch.ones(2, 1))
        with pytest.raises(RouterError, match=r"none from \['model.layers.1.self_attn'\]"):
            soft.shares()

    def test_some_layers_are_fixed(self, case):
        with soft_routes(case.router) as soft:
            soft.leave((1,), torch.full((2, 1), 0.25))
            soft.leave((0,), None)
        assert soft.shares().tolist() == [[1.0, 0.25]] * 2
        assert soft.routed.tolist() == [False, True]
