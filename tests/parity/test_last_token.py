"""Prompts whose last logits alone are read: same logits, caches, routes and tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import fluxcompile
from fluxcompile.passes.last_token import NOTE
from tests.families.families import FAMILIES
from tests.parity.caches import LOCAL, SINK, flux_cache, generate_with, untrimmed
from tests.parity.harness import (
    TOLERANCE,
    assert_same_generation,
    compiled,
    eager,
    generate,
)
from tests.parity.models import (
    flux_config,
    forced_router,
    prompt,
    random_router,
    tiny_model,
)

CAPACITY = 96
#: tokens of each call on one cache
CHUNKS = (40, 23)


@torch.no_grad()
def last_logits(model, given, cache=None, chunks=CHUNKS):
    """``[B, V]`` of each call's last token."""
    logits, seen = [], 0
    for ids in given.ids[:, : sum(chunks)].split(chunks, dim=1):
        before, seen = seen, seen + ids.shape[1]
        out = model(
            input_ids=ids,
            attention_mask=given.valid[:, :seen],
            position_ids=given.positions[:, before:seen],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
        assert out.logits.shape[1] == 1
        logits.append(out.logits[:, -1])
    return torch.stack(logits)


def new_cache(model, kind):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=CAPACITY)
    return DynamicCache(config=model.config) if kind == "dynamic" else None


def kept(cache):
    layers = [] if cache is None else cache.layers
    return [x for layer in layers for x in (layer.keys, layer.values)]


def assert_close(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE


def asked_last(made) -> set[bool]:
    """Of the calls of several tokens, whether the last layer had one query."""
    last = [report.rows[-1] for report in made.reports]
    return {NOTE in row.notes for row in last if row.query_shape[2] != 1}


@pytest.fixture
def without_the_pass(monkeypatch):
    def switch():
        torch._dynamo.reset()
        monkeypatch.setattr("fluxcompile.passes.pipeline.read_last_token", lambda *_: 0)

    return switch


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


FULL = [
    ("Llama", "dynamic", "left", None),
    slow("Llama", "static", "right", None),
    slow("Llama", "none", "ones", False),
    ("Qwen3", "dynamic", "right", True),
    slow("Qwen3", "none", "left", None),
    slow("Gemma 2", "dynamic", "left", None),
    slow("Gemma 3", "dynamic", "right", None),
    slow("Phi-3", "dynamic", "left", None),
    slow("GPT-NeoX", "dynamic", "left", None),
    slow("GPT-2", "dynamic", "ones", None),
    slow("Mixtral", "dynamic", "left", None),
]


@pytest.mark.parametrize(("name", "cache", "padding", "dynamic"), FULL)
def test_full(name, cache, padding, dynamic):
    family = next(family for family in FAMILIES if family.name == name)
    model, given = family.make(), prompt(2, sum(CHUNKS), padding)
    chunks = (sum(CHUNKS),) if cache == "none" else CHUNKS
    theirs, ours = new_cache(model, cache), new_cache(model, cache)
    expected = last_logits(model, given, theirs, chunks)
    made = compiled(model, dynamic, routes="full", config=flux_config(), strict=True)
    assert_close(last_logits(model, given, ours, chunks), expected)
    # Experts mix the rows of a batch, and so does what GPT-2 projects with.
    assert asked_last(made) == {name not in ("Mixtral", "GPT-2")}
    if padding == "ones":  # eager attention gives keys of padding other values
        assert_close(kept(ours), kept(theirs))


ROUTED = [
    ("llama", "dynamic", "left", "router", "streaming"),
    slow("llama", "static", "left", "router", "streaming"),
    ("qwen3", "dynamic", "right", "router", "triangle"),
    slow("llama-eager", "dynamic", "left", "sparse", "streaming"),
    slow("llama", "none", "ones", "sparse", "triangle"),
    slow("llama", "dynamic", "ones", "router", "power"),
    ("mistral", "none", "left", "sparse", "streaming"),
]


@pytest.mark.parametrize(("kind", "cache", "padding", "routes", "sparse"), ROUTED)
def test_as_without_the_pass(kind, cache, padding, routes, sparse, without_the_pass):
    model, config = tiny_model(kind), flux_config(sparse=sparse)
    if routes == "router":
        fluxcompile.attach(model, random_router(model, config))
    given = prompt(3, sum(CHUNKS), padding)
    chunks = (sum(CHUNKS),) if cache == "none" else CHUNKS

    def run():
        made = compiled(model, routes=routes, config=config, strict=True)
        held = new_cache(model, cache)
        logits = last_logits(model, given, held, chunks)
        return made, logits, kept(held), fluxcompile.routes(model).fa

    made, logits, keys, full = run()
    without_the_pass()
    plain, expected, expected_keys, expected_full = run()
    assert asked_last(made) == {sparse != "power"}
    assert asked_last(plain) == {False}
    assert made.became == plain.became
    assert torch.equal(full, expected_full)
    assert_close(logits, expected)
    assert all(torch.equal(a, b) for a, b in zip(keys, expected_keys, strict=True))


@pytest.mark.parametrize("sparse", ["streaming", slow("triangle")])
@pytest.mark.parametrize("batch", [1, slow(2)])
def test_routed_and_lowered_without_a_mask(batch, sparse):
    """Full attention could be PyTorch's here: of one query it must not be, as AOTAutograd
    compares the strides of both branches."""
    model, config = tiny_model("llama"), flux_config(sparse=sparse)
    fluxcompile.attach(model, forced_router(model, full=True, config=config))
    given = {"input_ids": prompt(batch, sum(CHUNKS), "none").ids, "logits_to_keep": 1}
    with torch.no_grad():
        expected = tiny_model("llama")(**given).logits
        made = compiled(model, config=config, strict=True, lowering="aot_eager")
        got = model(**given).logits
    assert_close(got, expected)
    assert asked_last(made) == {True}
    assert made.became == {f"routed: full or {sparse}"}


def test_retrieval_reads_blocks():
    model = tiny_model("llama")
    config = flux_config(retrieval="xattention", block=16, stride=4)
    fluxcompile.attach(model, random_router(model, config))
    made = compiled(model, config=config, strict=True)
    last_logits(model, prompt(2, sum(CHUNKS), "left"), DynamicCache(config=model.config))
    assert asked_last(made) == {False}


@pytest.mark.parametrize("lowering", ["eager", slow("aot_eager")])
@pytest.mark.parametrize(("static", "padding"), [(False, "left"), (True, "right")])
def test_generate(static, padding, lowering):
    model, given = tiny_model("llama"), prompt(3, 63, padding)
    expected = generate(model, given, 4, static)
    made = compiled(model, routes="full", config=flux_config(), strict=True, lowering=lowering)
    assert_same_generation(generate(model, given, 4, static), expected)
    assert asked_last(made) == {True}


@pytest.mark.parametrize("room", [slow(None), CAPACITY], ids=["growing", "fixed"])
@pytest.mark.parametrize("padding", [slow("ones"), "left"])
def test_a_flux_cache(room, padding):
    """The prompt's keys are those that a trimmed layer starts from."""
    model, given = tiny_model("llama", num_hidden_layers=3), prompt(3, 63, padding)
    made = compiled(model, routes=(1, 0, 0), config=flux_config(), strict=True)
    expected = generate_with(model, given, 24, untrimmed(model))
    cache = flux_cache(model, room)
    assert_same_generation(generate_with(model, given, 24, cache), expected)
    assert cache.memory().trimmed == (1, 2)
    assert True in asked_last(made)


def test_a_flux_cache_takes_chunks(without_the_pass):
    """On rings all queries stay: the first chunk alone has one."""
    model, given = tiny_model("llama"), prompt(2, sum(CHUNKS), "left")

    def run():
        made = compiled(model, routes=(1, 0), config=flux_config(), strict=True)
        return made, last_logits(model, given, flux_cache(model))

    made, logits = run()
    without_the_pass()
    assert_close(logits, run()[1])
    assert asked_last(made) == {True, False}
    assert CHUNKS[0] > SINK + LOCAL


def test_all_hidden_states_are_read():
    model, given = tiny_model("llama"), prompt(2, 40, "left")
    inputs = {"input_ids": given.ids, "attention_mask": given.mask, "logits_to_keep": 1}
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        made = compiled(model, routes="full", config=flux_config(), strict=True)
        got = model(**inputs, output_hidden_states=True)
    assert asked_last(made) == {False}
    assert_close([got.logits], [expected.logits])
    assert len(got.hidden_states) == len(expected.hidden_states)
    eager(model)


def test_explain_says_so():
    model, given = tiny_model("llama"), prompt(2, 40, "left")
    inputs = {"attention_mask": given.mask, "logits_to_keep": 1}
    report = fluxcompile.explain(model, given.ids, **inputs, options={"routes": "full"})
    assert [row.notes for row in report.rows] == [(), (NOTE,)]
    assert report.rows[-1].why == NOTE
