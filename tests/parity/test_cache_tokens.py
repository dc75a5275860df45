"""A trimmed cache changes no token: several turns of the ring, against a cache that keeps all."""

from __future__ import annotations

import pytest
import torch

import fluxcompile
from tests.parity.caches import (
    FIXED,
    GROWING,
    ROOM,
    flux_cache,
    generate_with,
    one_kind_each,
    untrimmed,
)
from tests.parity.decide import decide
from tests.parity.harness import (
    all_rows,
    assert_follows,
    assert_same_generation,
    compiled,
    definition_of,
    eager,
    forward,
)
from tests.parity.models import (
    LOCAL,
    PADDINGS,
    SINK,
    flux_config,
    prompt,
    random_router,
    tiny_model,
)
from tests.parity.test_semantics import unlike_prompts

NEW = 2 * LOCAL + 13  # the ring comes round more than twice
PATTERN = (0, 1, 0)


def three_layers(kind: str):
    return tiny_model(kind, num_hidden_layers=3)


@pytest.mark.parametrize("max_length", FIXED)
@pytest.mark.parametrize(
    "padding", [p if p == "left" else pytest.param(p, marks=pytest.mark.slow) for p in PADDINGS]
)
@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_same_tokens_by_a_static_pattern(kind, padding, max_length):
    model, given = three_layers(kind), prompt(3, 63, padding)
    made = compiled(model, routes=PATTERN, config=flux_config(), strict=True)
    expected = generate_with(model, given, NEW, untrimmed(model))
    cache = flux_cache(model, max_length)
    got = generate_with(model, given, NEW, cache)
    assert_same_generation(got, expected)
    assert torch.equal(got.tokens, expected.tokens)
    assert cache.memory().trimmed == (0, 2)
    assert "decode of a trimmed ring" in made.became
    assert_follows(
        three_layers(kind), got, given, definition_of(all_rows(3, PATTERN), flux_config())
    )


@pytest.mark.parametrize(
    ("length", "max_length"),
    [
        *one_kind_each(SINK, SINK + LOCAL + 1),
        pytest.param(1, None, id="1-growing", marks=pytest.mark.slow),
        pytest.param(1, ROOM, id="1-fixed", marks=pytest.mark.slow),
    ],
)
def test_short_prompts_grow_into_the_ring(length, max_length):
    model, given = tiny_model("llama"), prompt(2, length, "left")
    compiled(model, routes=(0, 1), config=flux_config(), strict=True)
    cache = flux_cache(model, max_length)
    got = generate_with(model, given, NEW, cache)
    assert cache.memory().trimmed == (0,)
    definition = definition_of(all_rows(2, (0, 1)), flux_config())
    assert_follows(tiny_model("llama"), got, given, definition)


@pytest.mark.parametrize("max_length", GROWING)
@pytest.mark.parametrize(
    ("length", "router_seed"), [(63, 2), pytest.param(14, 1, marks=pytest.mark.slow)]
)
def test_a_layer_is_trimmed_where_all_rows_are_sparse(length, router_seed, max_length):
    """Routers decide, rows differ; layers that some row reads in full keep every token."""
    model, twin = three_layers("qwen3"), three_layers("qwen3")
    router = random_router(model, seed=router_seed)
    fluxcompile.attach(model, router)
    compiled(model, strict=True)
    seen = set()
    for batch, seed in ((1, 0), (2, 1), (4, 0)):
        given = prompt(batch, length, "left", seed=seed)
        full = decide(twin, router, given)
        cache = flux_cache(model, max_length)
        got = generate_with(model, given, NEW if batch == 1 else LOCAL, cache)
        assert_follows(twin, got, given, definition_of(full, router.config))
        assert fluxcompile.routes(model).fa.tolist() == full.tolist()
        sparse = tuple((~full).all(0).nonzero().flatten().tolist())
        assert cache.memory().trimmed == sparse
        seen.add(sparse)
    assert len(seen) > 1, "another seed: the same layers are sparse in every prompt"


@pytest.mark.parametrize("max_length", FIXED)
@pytest.mark.parametrize(
    "lowering", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_lowered(lowering, max_length):
    """Mixed rows under a router, and the backend by its name."""
    model, twin = three_layers("qwen3"), three_layers("qwen3")
    router = random_router(model, seed=2)
    fluxcompile.attach(model, router)
    model.compile(backend="flux", dynamic=True, options={"lowering": lowering, "strict": True})
    given, full = some_layers_sparse_in_all_rows(twin, router)
    cache = flux_cache(model, max_length)
    got = generate_with(model, given, NEW, cache)
    assert_follows(twin, got, given, definition_of(full, router.config))
    assert cache.memory().trimmed == tuple((~full).all(0).nonzero().flatten().tolist())
    eager(model)


def some_layers_sparse_in_all_rows(twin, router):
    """A padded batch whose rows differ in some layers and agree on sparse in others."""
    for seed in range(40):
        given = prompt(2, 63, "left", seed=seed)
        full = decide(twin, router, given)
        if (~full).all(0).any() and (full[0] != full[1]).any():
            return given, full
    raise AssertionError("another router: no such batch")


@pytest.mark.parametrize(
    "mode",
    ["triangle", *(pytest.param(m, marks=pytest.mark.slow) for m in ("power", "xattention"))],
)
def test_other_sparse_prefills_decode_by_the_same_ring(mode):
    config = flux_config(sparse=mode, block=16, stride=4, last=5)
    model, given = tiny_model("llama"), prompt(2, 90, "left")
    compiled(model, routes=(0, 1), config=config, strict=True)
    expected = generate_with(model, given, NEW, untrimmed(model))
    cache = flux_cache(model)
    assert_same_generation(generate_with(model, given, NEW, cache), expected)
    assert cache.memory().trimmed == (0,)


def test_inference_mode():
    """Rings are written in later calls whatever mode they were made in."""
    model, given = tiny_model("llama"), prompt(2, 63)
    compiled(model, routes=(0, 1), config=flux_config(), strict=True)
    expected = forward(model, given, past_key_values=untrimmed(model))
    cache = flux_cache(model)
    with torch.inference_mode():
        got = forward(model, given, past_key_values=cache)
    torch.testing.assert_close(got, expected)
    token = got[:, -1:].argmax(-1)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.no_grad()):
        with mode:
            logits = model(input_ids=token, past_key_values=cache).logits
        assert torch.isfinite(logits).all()
    assert cache.get_seq_length() == 66


def test_decoder_layers_compiled_one_by_one():
    model, twin = three_layers("llama"), three_layers("llama")
    router = random_router(model)
    fluxcompile.attach(model, router)
    for layer in model.model.layers:
        layer.compile(backend="flux", options={"lowering": "eager", "strict": True})
    for given, full in unlike_prompts(twin, router):
        cache = flux_cache(model)
        got = generate_with(model, given, LOCAL + 3, cache)
        assert_follows(twin, got, given, definition_of(full, router.config))
        assert cache.memory().trimmed == tuple((~full[0]).nonzero().flatten().tolist())
