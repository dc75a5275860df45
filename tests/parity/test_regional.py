"""Decoder layers compiled once for all of their kind: same routes, same numbers as the whole."""

import pytest
import torch

import fluxcompile
from tests.parity.caches import flux_cache, generate_with, untrimmed
from tests.parity.decide import decide
from tests.parity.harness import (
    all_rows,
    assert_follows,
    assert_same_generation,
    definition_of,
    generate,
)
from tests.parity.models import LOCAL, SINK, flux_config, prompt, random_router, tiny_model
from tests.parity.test_router import MIXED_SEED


def routed(kind, layers=6, lowering="eager", **options):
    model, twin = (
        tiny_model(kind, num_hidden_layers=layers),
        tiny_model(kind, num_hidden_layers=layers),
    )
    router = random_router(model, seed=MIXED_SEED[kind])
    fluxcompile.compile(model, router, regional=True, lowering=lowering, strict=True, **options)
    return model, twin, router


DEFAULT = {
    ("llama", "left", "dynamic"),
    ("llama", "left", "static"),
    ("llama", "ones", "static"),
    ("qwen3", "ones", "dynamic"),
}


def mixed_cases():
    kinds = [("llama", "left"), ("llama", "ones"), ("llama", "right"), ("llama-eager", "left"),
             ("qwen3", "left"), ("qwen3", "ones")]  # fmt: skip
    cases = [(*kind, cache) for kind in kinds for cache in ("dynamic", "static")]
    return [
        pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow) for case in cases
    ]


@pytest.mark.parametrize(("kind", "padding", "cache"), mixed_cases())
def test_mixed_rows(kind, padding, cache, lowered):
    """Rows and layers differ in their routes, yet every layer runs the same few graphs."""
    model, twin, router = routed(kind)
    seen = []
    for length, new in ((90, 4), (SINK + LOCAL - 2, 6)):
        given = prompt(4, length, padding)
        full = decide(twin, router, given)
        got = generate(model, given, new, cache == "static")
        record = fluxcompile.routes(model)
        assert record.fa.tolist() == full.tolist()
        assert record.layer_names == tuple(router.layer_names)
        assert_follows(twin, got, given, definition_of(full, router.config))
        seen.append(len(lowered))
    assert seen[0] <= 3  # a prompt, a decode step, and one with its length symbolic


@pytest.mark.parametrize("layers", [2, 12])
def test_the_number_of_layers_does_not_matter(layers, lowered):
    model, _, _ = routed("llama", layers)
    generate(model, prompt(2, 63, "left"), 6)
    assert len(lowered) == 3
    generate(model, prompt(2, 63, "left", seed=1), 6)
    assert len(lowered) == 3


def test_static_routes_make_one_set_of_graphs_a_route(lowered):
    pattern = [0, 1, 1, 0, 0, 1]
    model = tiny_model("llama", num_hidden_layers=6)
    config = flux_config()
    fluxcompile.compile(
        model, regional=True, routes=pattern, config=config, lowering="eager", strict=True
    )
    given = prompt(2, 63, "left")
    got = generate(model, given, 5)
    twin = tiny_model("llama", num_hidden_layers=6)
    assert_follows(twin, got, given, definition_of(all_rows(2, pattern), config))
    record = fluxcompile.routes(model)
    assert record.fa.tolist() == [[bool(x) for x in pattern]] * 2
    assert record.layer_names[5] == "model.layers.5.self_attn"
    assert len(lowered) == 6


def test_all_full_equals_the_model_itself(lowered):
    model, given = tiny_model("qwen3", num_hidden_layers=4), prompt(3, 63, "left")
    expected = generate(model, given, 5)
    fluxcompile.compile(model, regional=True, routes="full", lowering="eager")
    assert_same_generation(generate(model, given, 5), expected)
    assert len(lowered) <= 3


@pytest.mark.parametrize(
    "lowering", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_lowered(lowering):
    model, twin, router = routed("qwen3", lowering=lowering, dynamic=True)
    for length in (63, 90):
        given = prompt(4, length, "left")
        full = decide(twin, router, given)
        got = generate(model, given, 4)
        assert fluxcompile.routes(model).fa.tolist() == full.tolist()
        assert_follows(twin, got, given, definition_of(full, router.config))


def test_every_routed_layer_brings_its_own_tensors(lowered):
    """No router is a constant of a graph."""
    model, _, _ = routed("llama")
    with torch.no_grad():
        model(prompt(2, 63).ids, use_cache=False)
    (gm,) = lowered
    assert not [name for name, _ in gm.named_parameters()]
    inputs = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    assert sum(name.startswith("flux_router") for name in inputs) == 10


@pytest.mark.parametrize(
    ("padding", "trimmed"),
    [("none", (0, 2, 3, 5)), ("left", ())],  # a layer by itself sees a mask, not what made it
)
def test_a_flux_cache_is_trimmed_where_layers_are_sparse(padding, trimmed):
    pattern, new = (0, 1, 0, 0, 1, 0), LOCAL + 13
    model, given = tiny_model("llama", num_hidden_layers=6), prompt(3, 63, padding)
    options = {"routes": pattern, "config": flux_config(), "lowering": "eager", "strict": True}
    fluxcompile.compile(model, regional=True, **options)
    expected = generate_with(model, given, new, untrimmed(model))
    cache = flux_cache(model)
    got = generate_with(model, given, new, cache)
    assert_same_generation(got, expected)
    assert torch.equal(got.tokens, expected.tokens)
    assert cache.memory().trimmed == trimmed


def test_a_router_trims_a_flux_cache_layer_by_layer():
    model, _, _ = routed("llama")
    given, new = prompt(1, 63, "none"), LOCAL + 9
    expected = generate_with(model, given, new, untrimmed(model))
    (sparse,) = (~fluxcompile.routes(model).fa).tolist()
    cache = flux_cache(model)
    got = generate_with(model, given, new, cache)
    assert torch.equal(got.tokens, expected.tokens)
    assert cache.memory().trimmed == tuple(i for i, s in enumerate(sparse) if s)
    assert 0 < sum(sparse) < len(sparse)
