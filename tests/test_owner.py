"""Compiled code never serves another model's, another layer's or a former router."""

import copy
import gc
import re
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import DynamicCache

import fluxcompile
import fluxcompile.backend
from fluxcompile import FluxConfig, FluxRouter, attach, detach
from fluxcompile.attachment import layer_of
from fluxcompile.errors import FluxWarning
from fluxcompile.owner_guard import Owners, Roles, SameOwner
from fluxcompile.runtime import CompiledGraph
from fluxcompile.soft_routes import soft_routes
from tests.router_models import tiny_llama

SINK, LOCAL, LENGTH = 4, 8, 40


@pytest.fixture(autouse=True)
def unwarned(monkeypatch):
    monkeypatch.setattr(fluxcompile.backend, "_warned", set())


@pytest.fixture
def ids():
    return torch.randint(0, 61, (1, LENGTH))


def router_for(model, letters: str) -> FluxRouter:
    """A router that decides as ``letters`` say, one a layer, whatever it reads."""
    router = FluxRouter.from_model(model, FluxConfig(sink=SINK, local=LOCAL, pool_size=8))
    with torch.no_grad():
        for layer, letter in zip(router.layers, letters, strict=True):
            layer.head[-1].bias[1] = 4.5 if letter == "F" else -4.5
    return router


def llama(letters: str | None, **overrides):
    model = tiny_llama(num_hidden_layers=len(letters or "FF"), initializer_range=0.2, **overrides)
    if letters is not None:
        attach(model, router_for(model, letters))
    return model.requires_grad_(False)


def compile_whole(model, **options):
    model.compile(backend="flux", options={"lowering": "eager", **options})
    return model


def compile_layers(model, **options):
    for layer in model.model.layers:
        layer.compile(backend="flux", options={"lowering": "eager", **options})
    return model


@torch.no_grad()
def routed(model, ids, **inputs) -> str:
    """The letters of the routes that one prompt takes."""
    model(ids, **inputs)
    return "".join("F" if full else "S" for full in fluxcompile.routes(model).fa[0].tolist())


@torch.no_grad()
def logits(model, ids, static: bool = False, **options) -> torch.Tensor:
    """Of a prompt's last token and of four more; ``options`` may allow HF's own compilation."""
    extra = {"cache_implementation": "static"} if static else {}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=5,
        max_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **({"disable_compile": True} | extra | options),
    )
    return torch.stack(out.logits)


def alone(model, letters: str, ids, static: bool = False) -> torch.Tensor:
    """What the model computes with these routes when nothing else was ever compiled."""
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    attach(twin, router_for(twin, letters))
    expected = logits(compile_whole(twin, strict=True), ids, static)
    torch._dynamo.reset()
    return expected


def flux_warnings(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, FluxWarning)]


# Several models


@pytest.mark.parametrize("compiled", [compile_whole, compile_layers])
@pytest.mark.parametrize("use_cache", [False, True])
def test_each_model_has_its_own_router(ids, compiled, use_cache):
    models = {letters: compiled(llama(letters)) for letters in ("FF", "SS", "FS", "SF")}
    for _ in range(2):
        for letters, model in models.items():
            assert routed(model, ids, use_cache=use_cache) == letters


@pytest.mark.parametrize(
    "static", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dynamic", "static"]
)
def test_generations_of_two_models(ids, static):
    first, second = llama("FF"), llama("SS")
    expected = [alone(first, "FF", ids, static), alone(second, "SS", ids, static)]
    assert not torch.allclose(logits(second, ids, static), expected[1]), "eager: all full"
    models = [compile_whole(model) for model in (first, second)]
    for _ in range(2):
        for model, own in zip(models, expected, strict=True):
            torch.testing.assert_close(logits(model, ids, static), own)


@torch.no_grad()
def test_interleaved_steps(ids):
    """Prompt, prompt, token, token, ... of two models, each with a cache of its own."""
    models = [compile_whole(llama(letters), strict=True) for letters in ("FF", "SS")]
    expected = [alone(model, x, ids) for model, x in zip(models, ("FF", "SS"), strict=True)]
    caches = [DynamicCache(config=model.config) for model in models]
    tokens = [ids, ids]
    for step in range(5):
        for turn, model in enumerate(models):
            got = model(tokens[turn], past_key_values=caches[turn]).logits[:, -1]
            torch.testing.assert_close(got, expected[turn][step])
            tokens[turn] = got.argmax(-1, keepdim=True)


def test_explicit_router_serves_several_models(ids):
    models = [llama(None), llama("FF")]
    router = router_for(models[0], "SF")
    for model in models:
        compile_whole(model, router=router)
        assert routed(model, ids) == "SF"


def test_a_copy_runs_full_attention_and_says_why(ids):
    model = compile_whole(llama("SS"))
    assert routed(model, ids) == "SS"
    other = compile_whole(copy.deepcopy(model))
    (message,) = flux_warnings(lambda: routed(other, ids))
    assert "full attention, because no router is attached" in message
    assert "a copy of a model does not take along" in message
    assert routed(other, ids) == "FF"
    assert routed(model, ids) == "SS"


# One model whose router changes


@pytest.mark.parametrize("compiled", [compile_whole, compile_layers])
def test_router_attached_replaced_and_detached_after_compile(ids, compiled):
    model = compiled(llama(None))
    with torch.no_grad():
        full = model(ids).logits
        for letters in ("SS", "SF", "FS"):
            assert not flux_warnings(lambda: attach(model, router_for(model, letters)))  # noqa: B023
            assert routed(model, ids) == letters
        detach(model)
        torch.testing.assert_close(model(ids).logits, full)


@torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True)
def test_where_dynamo_skips_guards_inside_modules(ids):
    models = [compile_whole(llama(None)) for _ in range(2)]
    assert [routed(model, ids) for model in models * 2] == ["FF"] * 4
    attach(models[1], router_for(models[1], "SF"))
    assert [routed(model, ids) for model in models * 2] == ["FF", "SF"] * 2
    attach(models[1], router_for(models[1], "FS"))
    assert [routed(model, ids) for model in models * 2] == ["FF", "FS"] * 2
    detach(models[1])
    assert [routed(model, ids) for model in models * 2] == ["FF"] * 4


@torch._dynamo.config.patch(recompile_limit=3)
def test_many_routers_in_turn_reach_no_recompile_limit(ids):
    model = compile_whole(llama(None))
    for turn in range(torch._dynamo.config.recompile_limit + 4):
        letters = ("SF", "FS")[turn % 2]
        attach(model, router_for(model, letters))
        assert routed(model, ids) == letters


def test_tensors_that_a_model_got_later(ids):
    first, second = compile_whole(llama("SF")), compile_whole(llama("FS"))
    assert [routed(first, ids), routed(second, ids)] == ["SF", "FS"]
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second.load_state_dict(state, assign=True)
    assert [routed(first, ids), routed(second, ids)] == ["SF", "FS"]


def test_layers_that_change_places_keep_their_routers(ids):
    check_changed_places(compile_whole(llama("SF")), ids)


def check_changed_places(model, ids) -> None:
    """``model``, compiled, whose two layers are routed ``"SF"``."""
    assert routed(model, ids, use_cache=False) == "SF"
    model.model.layers = nn.ModuleList(reversed(model.model.layers))
    with torch.no_grad():
        model(ids, use_cache=False)
    routes = fluxcompile.routes(model)
    assert routes.layer_names == ("model.layers.1.self_attn", "model.layers.0.self_attn")
    assert routes.fa.tolist() == [[True, False]]


# One decoder layer at a time


@torch._dynamo.config.patch(recompile_limit=4)
def test_each_layer_has_its_own_router(ids):
    letters = "SFFSFS"  # more layers than recompile_limit
    model = compile_layers(llama(letters), strict=True)
    assert not flux_warnings(lambda: routed(model, ids))
    assert routed(model, ids) == letters
    assert fluxcompile.routes(model).layer_names[5] == "model.layers.5.self_attn"
    torch.testing.assert_close(logits(model, ids), alone(model, letters, ids))


@torch._dynamo.config.patch(accumulated_recompile_limit=3)
def test_the_recompile_limit_is_not_silent(ids):
    model = compile_layers(llama("SFSF"))
    messages = flux_warnings(lambda: routed(model, ids, use_cache=False))
    assert [m for m in messages if re.search("accumulated_recompile_limit .*runs eagerly", m)]


# Training


def test_training_graphs_take_the_tensors_of_their_own_router(ids):
    for letters in ("FF", "SS", "SF"):
        model = compile_whole(llama(letters), mode="train")
        router = fluxcompile.attachment.attachment_of(model).router
        with soft_routes(router) as soft:
            model(ids, use_cache=False)
        assert "".join("S" if share < 0.5 else "F" for share in soft.shares()[0]) == letters
        soft.shares().sum().backward()
        assert all(p.grad is not None for p in router.parameters())


# Lowerings, memory, cost


@pytest.mark.parametrize(
    "lowering", [pytest.param("aot_eager", marks=pytest.mark.slow), "inductor"]
)
def test_lowered(ids, lowering):
    counters.clear()
    models = [compile_layers(llama(letters), lowering=lowering) for letters in ("SF", "FS")]
    for _ in range(2):
        assert [routed(model, ids) for model in models] == ["SF", "FS"]
    if lowering == "inductor":  # equal layers share what Inductor compiled
        assert counters["inductor"]["fxgraph_cache_miss"] <= 1


def compiled_graphs() -> list[CompiledGraph]:
    """Those that are alive in this process."""
    return [x for x in gc.get_objects() if type(x) is CompiledGraph]


@pytest.mark.parametrize("compiled", [compile_whole, compile_layers])
def test_a_model_that_goes_takes_its_code_along(ids, compiled):
    of_other_tests = compiled_graphs()
    first, second = compiled(llama("SF")), compiled(llama("FS"))
    assert [routed(first, ids), routed(second, ids)] == ["SF", "FS"]
    attachment = fluxcompile.attachment.attachment_of(second)
    gone = [weakref.ref(second), weakref.ref(attachment.router), weakref.ref(attachment)]
    held = [weakref.ref(x) for x in compiled_graphs() if x not in of_other_tests]
    del second, attachment
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]
    left = [ref for ref in held if ref() is not None]
    assert len(left) == len(held) // 2
    assert routed(first, ids) == "SF"


def test_the_check_looks_nothing_up_while_nothing_changes(monkeypatch):
    model = llama("SF")
    weight = model.model.layers[1].self_attn.q_proj.weight
    same = SameOwner(weight, Roles())
    owners = Owners((same,))
    assert layer_of(weight) == 1
    monkeypatch.setattr(fluxcompile.owner_guard, "owner_of", None)
    assert same(weight)
    assert owners(None)
    monkeypatch.undo()
    assert not same(model.model.layers[0].self_attn.q_proj.weight)
    assert not same(llama("SF").model.layers[1].self_attn.q_proj.weight)
    assert not same(None)
    assert owners(None)
    attach(model, router_for(model, "SF"))
    assert not owners(None)
