"""Under a router's control: what it decides, and what is computed then."""

import itertools

import pytest
import torch
from transformers import DynamicCache

import fluxcompile
from tests.parity.decide import decide, margins
from tests.parity.harness import (
    all_rows,
    assert_follows,
    assert_logits,
    compiled,
    definition_of,
    eager,
    forward,
    generate,
)
from tests.parity.models import (
    LOCAL,
    SINK,
    Prompt,
    flux_config,
    forced_router,
    prompt,
    random_router,
    tiny_model,
)
from tests.parity.reference import routed_logits

READABLE = [
    ("llama", "dynamic"),
    ("llama", "static"),
    ("llama-eager", "dynamic"),
    ("qwen3", "dynamic"),
    ("qwen3", "static"),
    ("mistral", "dynamic"),
]
#: by model: a seed whose random router tells the rows of these tests' batches apart
MIXED_SEED = {"llama": 3, "llama-eager": 3, "qwen3": 0, "mistral": 3}


def routed(kind, router_of, dynamic=None, lowering="eager", **fields):
    """A model with a router attached and compiled, its twin in eager mode, and the router."""
    model, twin = tiny_model(kind), tiny_model(kind)
    router = router_of(model, flux_config(**fields))
    fluxcompile.attach(model, router)
    return compiled(model, dynamic, lowering, strict=True), twin, router


def reading(kind):
    def make(model, config):
        return random_router(model, config, MIXED_SEED[kind])

    return make


@pytest.mark.parametrize(
    ("full", "cache"),
    [
        pytest.param(True, "dynamic", id="to-full-dynamic"),
        pytest.param(True, "static", id="to-full-static", marks=pytest.mark.slow),
        pytest.param(False, "dynamic", id="to-sparse-dynamic"),
        pytest.param(False, "static", id="to-sparse-static"),
    ],
)
def test_forced(full, cache):
    made, twin, router = routed("llama", lambda m, c: forced_router(m, full, c))
    for length, new in ((63, 3), (SINK + LOCAL - 3, 7)):
        given = prompt(2, length, "left")
        got = generate(made.model, given, new, cache == "static")
        definition = definition_of(all_rows(2, [full, full]), router.config)
        assert_follows(twin, got, given, definition)
        record = fluxcompile.routes(made.model)
        assert torch.equal(record.fa, definition.full)
        assert record.omega == (0.0 if full else 1.0)


def mixed_cases():
    """Unpadded prompts too: HF then drops the mask and reads only the prompt's part of a buffer."""
    made = []
    for (kind, cache), padding in itertools.product(READABLE, ("left", "right", "ones")):
        also = (("llama", "static", "ones"), ("mistral", "dynamic", "ones"))
        default = padding == "left" or (kind, cache, padding) in also
        marks = [] if default else [pytest.mark.slow]
        made.append(pytest.param(kind, cache, padding, marks=marks))
    return made


@pytest.mark.parametrize(("kind", "cache", "padding"), mixed_cases())
def test_mixed_rows(kind, cache, padding):
    """Rows of one batch decide for themselves, in prefill and in every decode step."""
    made, twin, router = routed(kind, reading(kind))
    mixed = 0
    for length, new in ((90, 4), (SINK + LOCAL - 2, 6)):
        given = prompt(4, length, padding)
        full = decide(twin, router, given)
        assert margins(twin, router, given) > 1e-3, "another seed: this router nearly ties"
        got = generate(made.model, given, new, cache == "static")
        record = fluxcompile.routes(made.model)
        assert record.fa.tolist() == full.tolist()
        assert record.layer_names == tuple(router.layer_names)
        assert_follows(twin, got, given, definition_of(full, router.config))
        mixed += sum(0 < int(column.sum()) < len(column) for column in full.T)
    assert mixed > 0, "another seed: no layer has rows of both kinds"


@torch.no_grad()
def logits_in_steps(model, tokens, steps):
    """Logits of ``tokens`` (ids, validity and positions ``[B, S]``), fed in calls of ``steps``."""
    ids, valid, positions = tokens
    cache, logits, start = DynamicCache(config=model.config), [], 0
    for length in steps:
        now = slice(start, start + length)
        out = model(
            input_ids=ids[:, now],
            attention_mask=valid[:, : now.stop],
            position_ids=positions[:, now],
            past_key_values=cache,
        )
        logits.append(out.logits)
        start = now.stop
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("kind", "padding", "lowering"),
    [
        ("llama", "left", "eager"),
        ("mistral", "left", "eager"),
        ("llama", "left", "aot_eager"),
        pytest.param("llama", "right", "eager", marks=pytest.mark.slow),
        pytest.param("qwen3", "ones", "eager", marks=pytest.mark.slow),
        pytest.param("llama", "left", "inductor", marks=pytest.mark.slow),
    ],
)
def test_steps_of_several_tokens(kind, padding, lowering):
    """A routed prompt and then three tokens at once, as if they had come one by one: as defined."""
    made, twin, router = routed(kind, reading(kind), dynamic=False, lowering=lowering)
    given = prompt(4, 90, padding)
    full = decide(twin, router, given)
    assert any(0 < int(column.sum()) < 4 for column in full.T), "another seed: no mixed layer"
    tokens = given.then(prompt(4, 4, seed=9).ids)
    together = logits_in_steps(made.model, tokens, (90, 3, 1))
    steps = made.reports[1:]
    assert {row.became for report in steps for row in report.rows} == {
        "decode by device-side route"
    }
    assert fluxcompile.routes(made.model).fa.tolist() == full.tolist()
    ids, valid, positions = tokens
    inputs = {"attention_mask": valid, "position_ids": positions, "use_cache": False}
    expected = routed_logits(twin, definition_of(full, router.config), ids, **inputs)
    assert_logits(together, expected, valid)


def test_dense_decode():
    made, twin, router = routed("llama", reading("llama"), decode="dense")
    given = prompt(4, 63, "left")
    got = generate(made.model, given, 4)
    full = decide(twin, router, given)
    assert fluxcompile.routes(made.model).fa.tolist() == full.tolist()
    assert_follows(twin, got, given, definition_of(full, router.config, dense_from=63))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_rows_decide_as_alone(padding):
    made, twin, router = routed("qwen3", reading("qwen3"))
    given = prompt(4, 90, padding)
    with torch.no_grad():
        made.model(input_ids=given.ids, attention_mask=given.mask, position_ids=given.positions)
    together = fluxcompile.routes(made.model).fa.clone()
    for row in range(4):
        alone: Prompt = given.row(row)
        forward(made.model, alone)
        assert fluxcompile.routes(made.model).fa.tolist() == [together[row].tolist()]
        assert decide(twin, router, alone).tolist() == [together[row].tolist()]


@pytest.mark.parametrize(
    "lengths", [(1, 8, 21), pytest.param(range(1, 26), marks=pytest.mark.slow)], ids=str
)
def test_short_prompts_pool_what_there_is(lengths):
    """Around 2 * pool_size = 8 and sink + local = 20: pooled once, decided, and kept."""
    made, twin, router = routed("llama", reading("llama"))
    for length in lengths:
        given = prompt(3, length, "left")
        got = generate(made.model, given, 3)
        full = decide(twin, router, given)
        assert fluxcompile.routes(made.model).fa.tolist() == full.tolist()
        assert_follows(twin, got, given, definition_of(full, router.config))


@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_without_a_mask(use_cache):
    made, twin, router = routed("llama", reading("llama"))
    given = prompt(4, 63, "none")
    got = forward(made.model, given, use_cache=use_cache)
    full = decide(twin, router, given)
    assert fluxcompile.routes(made.model).fa.tolist() == full.tolist()
    expected = routed_logits(twin, definition_of(full, router.config), given.ids)
    assert_logits(got, expected, given.valid)


def test_all_full_is_the_unrouted_compile_bit_for_bit():
    made, _, _ = routed("llama", lambda m, c: forced_router(m, True, c))
    given = prompt(2, 63, "left")
    with_router = forward(made.model, given)
    plain = tiny_model("llama")
    compiled(plain, routes="full")
    assert torch.equal(with_router, forward(plain, given))


def test_untrained_router_is_eager():
    model = tiny_model("mistral")
    given = prompt(2, 63, "left")
    expected = forward(model, given)
    fluxcompile.attach(model, fluxcompile.FluxRouter.from_model(model, flux_config()))
    compiled(model)
    assert_logits(forward(model, given), expected, given.valid)
    assert fluxcompile.routes(model).omega == 0.0
    eager(model)


def test_router_option_without_attach():
    model, twin = tiny_model("llama"), tiny_model("llama")
    router = random_router(model)
    compiled(model, router=router, strict=True)
    given = prompt(4, 63, "left")
    got = generate(model, given, 3)
    full = decide(twin, router, given)
    assert fluxcompile.routes(model).fa.tolist() == full.tolist()
    assert_follows(twin, got, given, definition_of(full, router.config))
