"""Regional compilation: which layers share a graph, and who must not be served by it."""

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

import fluxcompile
from fluxcompile import FluxConfig, FluxRouter, OptionError, attach, detach
from fluxcompile.attachment import attachment_of
from fluxcompile.one_layer_cache import OneLayerCache, view_of
from tests.test_owner import (
    alone,
    check_changed_places,
    compiled_graphs,
    flux_warnings,
    llama,
    logits,
    routed,
    router_for,
)


@pytest.fixture
def ids():
    return torch.randint(0, 61, (1, 40))


def regional(model, *router, **options):
    return fluxcompile.compile(model, *router, regional=True, lowering="eager", **options)


def test_as_the_whole_model(ids, lowered):
    letters = "SFFSFS"
    model = llama(letters)
    expected = alone(model, letters, ids)
    lowered.clear()
    assert not flux_warnings(lambda: regional(model, strict=True))
    torch.testing.assert_close(logits(model, ids), expected)
    assert fluxcompile.routes(model).layer_names[5] == "model.layers.5.self_attn"
    assert len(lowered) == 3


def test_each_model_has_its_own_router(ids):
    models = {letters: regional(llama(letters)) for letters in ("FF", "SS", "FS", "SF")}
    for _ in range(2):
        for letters, model in models.items():
            assert routed(model, ids) == letters


def test_router_attached_replaced_and_detached(ids):
    model = regional(llama(None))
    with torch.no_grad():
        full = model(ids).logits
        for letters in ("SS", "SF", "FS"):
            attach(model, router_for(model, letters))
            assert routed(model, ids) == letters
        detach(model)
        torch.testing.assert_close(model(ids).logits, full)


def test_layers_that_change_places_keep_their_routers(ids):
    check_changed_places(regional(llama("SF")), ids)


@pytest.mark.parametrize("static", [None, [0, 1]], ids=["router", "static"])
def test_tensors_that_a_model_got_later(ids, static):
    model = regional(llama("SF"), routes=static)
    assert routed(model, ids) == "SF"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert routed(model, ids) == "SF"


def test_a_router_for_some_layers(ids, lowered):
    model = llama("FFFF")
    names = ("model.layers.1.self_attn", "model.layers.3.self_attn")
    router = FluxRouter(FluxConfig(sink=4, local=8, pool_size=8), layer_names=names, head_dim=16)
    with torch.no_grad():
        for layer in router.layers:
            layer.head[-1].bias[1] = -4.5
    regional(model, router)
    assert routed(model, ids) == "SS"
    assert fluxcompile.routes(model).layer_names == names
    assert len(lowered) == 2  # with a router and without


@torch.no_grad()
def test_interleaved_generations_of_one_model(ids):
    """Prompt, prompt, token, token, ... each with a cache, and routes, of its own."""
    model = llama("SFS")
    others = torch.randint(0, 61, (1, 40))
    expected = [alone(model, "SFS", x) for x in (ids, others)]
    regional(model, strict=True)
    caches = [DynamicCache(), DynamicCache(config=model.config)]
    tokens = [ids, others]
    for step in range(5):
        for turn in range(2):
            out = model(tokens[turn], past_key_values=caches[turn]).logits[:, -1]
            torch.testing.assert_close(out, expected[turn][step])
            tokens[turn] = out.argmax(-1, keepdim=True)


@torch.no_grad()
def test_a_reordered_cache_has_lost_its_routes(ids):
    model = regional(llama("SS"))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    cache.reorder_cache(torch.tensor([0]))
    messages = flux_warnings(lambda: model(ids[:, :1], past_key_values=cache))
    assert any("the key/value cache has no routes" in m for m in messages)


@torch.no_grad()
def test_a_cache_filled_layer_by_layer_does_not_serve_the_whole_model(ids):
    """Its routes are kept a layer at a time: those that the whole model's graph finds are said."""
    model = regional(llama("SS"))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    fluxcompile.compile(model, lowering="eager")
    messages = flux_warnings(lambda: model(ids[:, :1], past_key_values=cache))
    assert any("or by other compiled code" in m for m in messages)


def gemma(layers: int = 6) -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=61,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Gemma3ForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_layers_that_differ_have_their_own_graphs(ids, lowered, static):
    model = gemma()
    expected = logits(model, ids, static)
    regional(model, routes="full")
    torch.testing.assert_close(logits(model, ids, static), expected, atol=2e-5, rtol=1e-5)
    assert len(lowered) <= 2 * 3
    before = len(lowered)
    logits(model, ids, static)
    assert len(lowered) == before


def test_routed_layers_that_differ(ids, lowered):
    """A window's mask comes from outside of the layer, so such a layer runs full."""
    model = gemma()
    expected = alone(model, "FFFSFF", ids)
    lowered.clear()
    regional(model, router_for(model, "SFFSSF"))
    torch.testing.assert_close(logits(model, ids), expected, atol=2e-5, rtol=1e-5)
    assert len(lowered) <= 2 * 3
    assert str(fluxcompile.routes(model)).startswith("row 0: FFFSFF")


def test_hidden_states_can_be_asked_for(ids):
    model = llama("FSF")
    with torch.no_grad():
        fluxcompile.compile(model, lowering="eager")
        whole = model(ids, output_hidden_states=True).hidden_states
        regional(model)
        one_by_one = model(ids, output_hidden_states=True).hidden_states
    assert len(whole) == len(one_by_one) == 4
    for a, b in zip(whole, one_by_one, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients(ids):
    model = regional(llama("SS").requires_grad_(True))
    model(ids, use_cache=False).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_from_regional_to_whole_and_back(ids):
    model = regional(llama("SF"))
    assert routed(model, ids) == "SF"
    fluxcompile.compile(model, lowering="eager")
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)
    assert routed(model, ids) == "SF"
    regional(model)
    assert routed(model, ids) == "SF"


def test_again_with_the_same_settings_compiles_nothing(ids, lowered):
    model = regional(llama("SF"))
    routed(model, ids)
    before = len(lowered)
    regional(model)
    assert routed(model, ids) == "SF"
    assert len(lowered) == before


def test_explain(ids):
    model = regional(llama("SF"))
    rows = fluxcompile.explain(model, ids).rows
    assert [row.path for row in rows] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_a_model_that_goes_takes_its_code_along(ids):
    model = regional(llama("SF"))
    of_other_tests = compiled_graphs()
    assert routed(model, ids) == "SF"
    attachment = attachment_of(model)
    gone = [weakref.ref(x) for x in (model, attachment.router, attachment)]
    held = [weakref.ref(x) for x in compiled_graphs() if x not in of_other_tests]
    assert held
    del model, attachment
    gc.collect()
    assert [ref() for ref in (*gone, *held)] == [None] * (3 + len(held))


def test_refusals():
    with pytest.raises(OptionError, match="regional: expected None, False or True"):
        fluxcompile.compile(llama("SF"), regional="layers")
    alone_in_it = nn.Module()
    alone_in_it.self_attn = llama(None).model.layers[0].self_attn
    with pytest.raises(OptionError, match=r"attentions inside of an nn\.ModuleList"):
        regional(alone_in_it)


class OwnCache(DynamicCache):
    def update(self, *args, **kwargs):
        return super().update(*args, **kwargs)


def test_which_caches_are_seen_layer_by_layer():
    cache = DynamicCache()
    view = view_of(cache, 1)
    assert isinstance(view, OneLayerCache)
    assert len(cache.layers) == 2
    keys = torch.zeros(1, 2, 3, 4)
    view.update(keys, keys, 1)
    assert view.get_seq_length(1) == 3
    own = OwnCache()
    assert view_of(own, 0) is own
