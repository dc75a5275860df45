"""Which graphs are handed to Inductor with CUDA graphs on. That they run is for a GPU to show."""

import torch
from transformers import StaticCache

import fluxcompile
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


def test_known_routes_are_handed_on_as_they_came():
    """A decode step's own outputs are a CUDA graph's, which the next step overwrites."""
    model = tiny_model("llama")
    fluxcompile.attach(model, random_router(model))
    compiled = torch.compile(model, backend="flux", options={"lowering": "eager"})
    cache = StaticCache(config=model.config, max_cache_len=64)
    ids = prompt(2, 30, "none").ids
    with torch.no_grad():
        compiled(input_ids=ids, past_key_values=cache)
        first = fluxcompile.kept_routes.kept(cache.layers[0].keys).full
        compiled(input_ids=ids[:, -1:], past_key_values=cache)
    assert fluxcompile.kept_routes.kept(cache.layers[0].keys).full is first
