"""The backend by its name, with real Inductor underneath: a few journeys from end to end."""

import pytest
import torch
from transformers import DynamicCache

import fluxcompile
from tests.parity.decide import decide
from tests.parity.harness import (
    all_rows,
    assert_follows,
    assert_same_generation,
    definition_of,
    eager,
    generate,
)
from tests.parity.models import flux_config, prompt, random_router, tiny_model


@pytest.mark.parametrize(
    "lowering", [pytest.param("aot_eager", marks=pytest.mark.slow), "inductor"]
)
def test_mixed_rows_under_a_router(lowering):
    """Padding, rows that differ, growth, a second prompt; DynamicCache."""
    model, twin = tiny_model("qwen3"), tiny_model("qwen3")
    router = random_router(model)
    fluxcompile.attach(model, router)
    # dynamic: one graph of a prompt and one of a decode step, each tens of seconds of Inductor
    model.compile(backend="flux", dynamic=True, options={"lowering": lowering, "strict": True})
    for length in (63, 90):
        given = prompt(4, length, "left")
        full = decide(twin, router, given)
        got = generate(model, given, 4)
        assert fluxcompile.routes(model).fa.tolist() == full.tolist()
        assert_follows(twin, got, given, definition_of(full, router.config))
    eager(model)


@pytest.mark.parametrize(
    "lowering", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_static_cache_under_a_router(lowering):
    """The buffer carries the routes though compiled code writes it in place; then a new prompt."""
    model, twin = tiny_model("llama"), tiny_model("llama")
    router = random_router(model)
    fluxcompile.attach(model, router)
    model.compile(backend="flux", options={"lowering": lowering, "strict": True})
    for seed in (0, 1):
        given = prompt(4, 63, "left", seed=seed)
        full = decide(twin, router, given)
        got = generate(model, given, 4, static=True)
        assert fluxcompile.routes(model).fa.tolist() == full.tolist()
        assert_follows(twin, got, given, definition_of(full, router.config))
    eager(model)


def routed_pair():
    """A model under Inductor and its twin under the cheap lowering, with one router."""
    made = [tiny_model("llama"), tiny_model("llama")]
    router = random_router(made[0])
    for model, lowering in zip(made, ("inductor", "aot_eager"), strict=True):
        fluxcompile.attach(model, router)
        model.compile(backend="flux", options={"lowering": lowering, "strict": True})
    return made


@torch.no_grad()
def last_logits(model, given, cut: tuple[int, ...], cache=None):
    """Logits of the last token of a prompt that comes in pieces of ``cut`` tokens."""
    cache, seen = cache or DynamicCache(config=model.config), 0
    for piece in given.ids.split(cut, dim=1):
        seen += piece.shape[1]
        mask = given.mask[:, :seen]
        out = model(input_ids=piece, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    return out.logits[:, -1]


@pytest.mark.parametrize(
    "cuts",
    [((63,), (90,), (117,), (201,)), ((64,) * 3, (64,) * 4, (64,) * 6)],
    ids=["lengths", "chunks"],
)
def test_inductor_settles(cuts):
    """After two lengths, or three chunks: guarded branches keep no size of the call that compiled
    them, alone or beside a past."""
    model, twin = routed_pair()
    for i_prompt, cut in enumerate(cuts):
        given = prompt(1, sum(cut))
        with torch.compiler.set_stance("fail_on_recompile" if i_prompt > 1 else "default"):
            got = last_logits(model, given, cut)
        torch.testing.assert_close(got, last_logits(twin, given, cut), rtol=1e-4, atol=1e-4)
    eager(model)
    eager(twin)


def test_inductor_settles_on_static_caches_of_their_prompts_sizes():
    """Each mask is a slice of one whose strides are products of the prompt's and cache's sizes."""
    model, twin = routed_pair()
    for batch, length in ((1, 63), (1, 90), (3, 70), (2, 117)):
        given, settled = prompt(batch, length, "left"), batch == 2
        with torch.compiler.set_stance("fail_on_recompile" if settled else "default"):
            got = generate(model, given, 2, static=True)
        assert_same_generation(got, generate(twin, given, 2, static=True))
    eager(model)
    eager(twin)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.slow
def test_sliding_window_full(cache):
    model, given = tiny_model("mistral"), prompt(3, 63, "right")
    expected = generate(model, given, 4, cache == "static")
    model.compile(backend="flux", options={"routes": "full"})
    assert_same_generation(generate(model, given, 4, cache == "static"), expected)
    eager(model)


@pytest.mark.slow
def test_static_pattern():
    model, config, given = tiny_model("llama"), flux_config(), prompt(2, 63, "left")
    options = {"routes": [0, 1], "config": config, "strict": True}
    model.compile(backend="flux", options=options)
    got = generate(model, given, 4)
    assert_follows(tiny_model("llama"), got, given, definition_of(all_rows(2, (0, 1)), config))
    eager(model)
