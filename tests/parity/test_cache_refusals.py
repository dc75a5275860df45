"""Where routes are not known everything is kept; what has been dropped is never read as if not."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import LlamaConfig

import fluxcompile
from tests.parity.caches import KINDS, ROOM, flux_cache, generate_with, untrimmed
from tests.parity.harness import assert_same_generation, compiled, eager, forward, generate
from tests.parity.models import flux_config, forced_router, prompt, tiny_model


def test_an_eager_model_keeps_everything():
    model, given = tiny_model("llama"), prompt(2, 63, "left")
    expected = generate(model, given, 8)
    for max_length in (None, ROOM):
        cache = flux_cache(model, max_length)
        assert_same_generation(generate_with(model, given, 8, cache), expected)
        assert cache.memory().trimmed == ()
        assert cache.memory().share == 1.0


@pytest.mark.parametrize("max_length", KINDS)
def test_no_router_keeps_everything_and_says_so(max_length):
    model, given = tiny_model("llama"), prompt(2, 63, "left")
    expected = generate(model, given, 8)
    compiled(model)
    cache = flux_cache(model, max_length)
    with pytest.warns(fluxcompile.FluxWarning, match="no router"):
        got = generate_with(model, given, 8, cache)
    assert_same_generation(got, expected)
    assert cache.memory().trimmed == ()


@pytest.mark.parametrize(
    ("options", "why", "max_length"),
    [
        ({"routes": "full", "config": flux_config()}, None, None),
        ({"routes": "full", "config": flux_config()}, None, ROOM),
        ({"routes": "sparse", "config": flux_config(decode="dense")}, 'decode is "dense"', None),
        ({"routes": "sparse", "config": flux_config(local=12)}, "read 4 sink and 12 local", ROOM),
        ({"routes": "sparse", "config": flux_config(sink=5)}, "read 5 sink and 16 local", None),
    ],
    ids=["full, growing", "full, fixed", "dense decode", "other local", "other sink"],
)
def test_nothing_is_dropped_that_may_be_read(options, why, max_length):
    model, given = tiny_model("llama"), prompt(2, 63, "left")
    compiled(model, **options, strict=True)
    expected = generate_with(model, given, 9, untrimmed(model))
    cache = flux_cache(model, max_length)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", fluxcompile.FluxWarning)
        got = generate_with(model, given, 9, cache)
    assert_same_generation(got, expected)
    assert cache.memory().trimmed == ()
    said = [str(w.message) for w in caught if w.category is fluxcompile.FluxWarning]
    assert len(said) == (0 if why is None else 1), said
    assert all("keeps every token" in message and why in message for message in said)


def test_gradients_leave_the_cache_alone():
    model, given = tiny_model("llama").requires_grad_(True), prompt(2, 63)
    compiled(model, routes="sparse", config=flux_config())
    cache = flux_cache(model)
    with pytest.warns(fluxcompile.FluxWarning, match="gradients are enabled"):
        model(input_ids=given.ids, past_key_values=cache).logits.sum().backward()
    assert cache.memory().trimmed == ()


def test_eager_attention():
    """Softmax written out: masks are added to scores, and rings are read all the same."""
    model, given = tiny_model("llama-eager"), prompt(2, 63, "left")
    compiled(model, routes=(0, 1), config=flux_config(), strict=True)
    expected = generate_with(model, given, 9, untrimmed(model))
    cache = flux_cache(model)
    assert_same_generation(generate_with(model, given, 9, cache), expected)
    assert cache.memory().trimmed == (0,)


def test_a_model_with_windows_keeps_its_own_layers():
    model, given = tiny_model("mistral"), prompt(2, 63, "left")
    compiled(model, routes="sparse", config=flux_config())
    expected = generate_with(model, given, 9, untrimmed(model))
    cache = flux_cache(model)
    assert_same_generation(generate_with(model, given, 9, cache), expected)
    assert cache.memory().trimmed == ()


@pytest.mark.parametrize("max_length", KINDS)
def test_an_eager_model_cannot_read_a_trimmed_cache(max_length):
    model, given = tiny_model("llama"), prompt(2, 63)
    compiled(model, routes="sparse", config=flux_config(), strict=True)
    cache = flux_cache(model, max_length)
    forward(model, given, past_key_values=cache)
    eager(model)
    with pytest.raises(fluxcompile.KernelError, match='backend "flux"'):
        forward(model, prompt(2, 1), past_key_values=cache)


@pytest.mark.parametrize(
    "options",
    [
        {"routes": "full", "config": flux_config()},
        {"routes": "sparse", "config": flux_config(local=12)},
        {"routes": "sparse", "config": flux_config(decode="dense")},
        {},
    ],
    ids=["full", "other local", "dense decode", "no router"],
)
def test_a_model_with_other_routes_cannot_read_a_trimmed_cache(options):
    model, given = tiny_model("llama"), prompt(2, 63)
    compiled(model, routes="sparse", config=flux_config(), strict=True)
    cache = flux_cache(model)
    forward(model, given, past_key_values=cache)
    compiled(model, **options)
    with pytest.raises(Exception, match="its cache keeps"):
        forward(model, prompt(2, 1), past_key_values=cache)


@pytest.mark.parametrize("max_length", KINDS)
@torch.no_grad()
def test_a_mask_that_forgets_the_padding_is_an_error(max_length):
    model, given = tiny_model("llama"), prompt(2, 63, "left")
    compiled(model, routes="sparse", config=flux_config(), strict=True)
    cache = flux_cache(model, max_length)
    forward(model, given, past_key_values=cache)
    with pytest.raises(fluxcompile.KernelError, match="attention_mask"):
        model(input_ids=given.ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_full_fixed_cache_is_an_error():
    model, given = tiny_model("llama"), prompt(2, 63)
    compiled(model, routes=(0, 1), config=flux_config(), strict=True)
    cache = flux_cache(model, 65)
    forward(model, given, past_key_values=cache)
    for _ in range(2):
        model(input_ids=given.ids[:, :1], past_key_values=cache)
    with pytest.raises(fluxcompile.KernelError, match="max_length"):
        model(input_ids=given.ids[:, :1], past_key_values=cache)
    with pytest.raises(fluxcompile.CacheError, match="at most FluxCache"):
        forward(model, given, past_key_values=flux_cache(model, 62))


def test_pattern_comes_from_the_router():
    model = tiny_model("llama")
    assert fluxcompile.FluxCache(model.config).pattern.local == fluxcompile.FluxConfig().local
    fluxcompile.attach(model, forced_router(model, False, flux_config(sink=3, local=9)))
    pattern = fluxcompile.FluxCache(model).pattern
    assert (pattern.sink, pattern.local, pattern.spare) == (3, 9, 64)
    router = forced_router(model, False, flux_config(sink=2, local=8))
    pattern = fluxcompile.FluxCache(model.config, router, local=7).pattern
    assert (pattern.sink, pattern.local) == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sink": 0}, "sink: expected an int >= 1"),
        ({"local": True}, "local: expected an int >= 1"),
        ({"spare": -1}, "spare: expected an int >= 0"),
        ({"max_length": 4, "sink": 4}, "max_length: expected an int >= 5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(fluxcompile.CacheError, match=message):
        fluxcompile.FluxCache(LlamaConfig(num_hidden_layers=1), **arguments)


def test_not_a_model():
    with pytest.raises(fluxcompile.CacheError, match="transformers model"):
        fluxcompile.FluxCache(torch.nn.Linear(2, 2))


def test_a_compiled_wrapper_will_do():
    model = tiny_model("llama")
    fluxcompile.attach(model, forced_router(model, False, flux_config(sink=3)))
    assert fluxcompile.FluxCache(torch.compile(model, backend="eager")).pattern.sink == 3


@pytest.mark.parametrize(
    "max_length", [None, pytest.param(ROOM, id="fixed", marks=pytest.mark.slow)]
)
def test_layouts_run_out(monkeypatch, max_length):
    """Past a number of sets of trimmed layers, one that has been compiled is used."""
    monkeypatch.setattr("fluxcompile.rings.MAX_LAYOUTS", 1)
    model = tiny_model("llama", num_hidden_layers=3)
    made = compiled(model, strict=True)
    given, trimmed, graphs = prompt(1, 63), [], []
    for sparse in ((2,), (1,), (1, 2)):
        fluxcompile.attach(model, a_router_for(model, sparse))
        cache = flux_cache(model, max_length)
        expected = generate_with(model, given, 6, untrimmed(model))
        with warnings.catch_warnings():
            warnings.simplefilter("error", fluxcompile.FluxWarning)
            assert_same_generation(generate_with(model, given, 6, cache), expected)
        trimmed.append(cache.memory().trimmed)
        graphs.append(made.graphs)
        fluxcompile.detach(model)
    assert trimmed == [(2,), (), (2,)]


def a_router_for(model, sparse):
    router = forced_router(model, full=True)
    with torch.no_grad():
        for layer in sparse:
            router.layers[layer].head[-1].bias.copy_(torch.tensor([9.0, 0.0]))
    return router
