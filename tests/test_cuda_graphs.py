"""Which graphs are handed to Inductor with CUDA graphs on. That they run is for a GPU to show."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import fluxcompile
from fluxcompile import kept_routes
from tests.parity.models import prompt, random_router, tiny_model


def test_decode_steps_are_captured_and_prompts_are_not(monkeypatch):
    captured = []

    def compile_fx(gm, inputs, config_patches=None):
        captured.append(config_patches["triton.cudagraphs"])
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model = tiny_model("llama")
    fluxcompile.attach(model, random_router(model))
    compiled = torch.compile(model, backend="flux", mode="reduce-overhead")
    cache = StaticCache(config=model.config, max_cache_len=64)
    ids = prompt(2, 30, "none").ids
    with torch.no_grad():
        compiled(input_ids=ids, past_key_values=cache)
        assert captured == [False]
        for _ in range(2):
            compiled(input_ids=ids[:, -1:], past_key_values=cache)
    assert captured == [False, True]


CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
    "flux": lambda model: fluxcompile.FluxCache(model, max_length=64),
}


@pytest.mark.parametrize("kind", CACHES)
def test_known_routes_are_handed_on_as_they_came(monkeypatch, kind):
    """A step does not put them together again: its outputs would be a CUDA graph's, which the next
    step overwrites."""
    returned = []

    def lower(gm, *_):
        outputs = next(iter(reversed(gm.graph.nodes))).args[0]
        returned.append([node.target for node in outputs].count(torch.stack))
        return gm.forward

    monkeypatch.setattr("fluxcompile.backend.lower", lower)
    model = tiny_model("llama")
    fluxcompile.attach(model, random_router(model))
    compiled = torch.compile(model, backend="flux", options={"lowering": "eager"})
    cache = CACHES[kind](model)
    ids = prompt(2, 30, "none").ids
    with torch.no_grad():
        compiled(input_ids=ids, past_key_values=cache)
        assert returned == [1]
        first = fluxcompile.routes(model).fa
        found = []
        for _ in range(2):
            compiled(input_ids=ids[:, -1:], past_key_values=cache)
            kept = next(filter(None, (kept_routes.kept(layer.keys) for layer in cache.layers)))
            assert torch.equal(kept.full, first[:, list(kept.layers)])
            found.append(kept.full)
    assert found[0] is found[1]
    assert not any(returned[1:])
    assert returned[1:]
