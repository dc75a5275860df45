"""Routes pinned to sparse, or to a fixed pattern: equal to the reference's explicit mask."""

import itertools

import pytest
import torch

from tests.parity.harness import (
    all_rows,
    assert_follows,
    assert_logits,
    compiled,
    definition_of,
    forward,
    generate,
)
from tests.parity.models import LOCAL, MODELS, SINK, WINDOW, flux_config, prompt, tiny_model
from tests.parity.reference import RoutedDefinition, routed_logits

LENGTHS = (1, 2, 63, 300)
#: (length, new tokens) that start short of sink + local and end past it
GROWING = (SINK + LOCAL - 3, 8)

DEFAULT = {
    ("llama", "right", "static", "sparse", (0, 0)),
    ("llama", "left", "dynamic", "dense", (0, 1)),
    ("llama-eager", "right", "dynamic", "sparse", (0, 1)),
    ("qwen3", "left", "static", "sparse", (1, 0)),
    ("qwen3", "right", "static", "dense", (0, 0)),
    ("qwen3", "ones", "dynamic", "sparse", (0, 0)),
    ("mistral", "left", "dynamic", "sparse", (0, 0)),
}


def cases():
    grid = itertools.product(
        MODELS,
        ("ones", "left", "right"),
        ("dynamic", "static"),
        ("sparse", "dense"),
        ((0, 0), (0, 1), (1, 0)),
    )
    made = []
    for case in grid:
        kind, padding, cache, decode, pattern = case
        if cache == "static" and kind in ("llama-eager", "mistral"):
            continue  # their ready-made masks cannot be read: test_unreadable_mask_is_full
        name = f"{kind}-{padding}-{cache}-decode_{decode}-{pattern[0]}{pattern[1]}"
        if case in DEFAULT:
            made.append(pytest.param(*case, (63,), id=name))
        made.append(pytest.param(*case, LENGTHS, id=f"{name}-all", marks=pytest.mark.slow))
    return made


def options_for(pattern):
    return "sparse" if pattern == (0, 0) else pattern


@pytest.mark.parametrize(("kind", "padding", "cache", "decode", "pattern", "lengths"), cases())
def test_generate(kind, padding, cache, decode, pattern, lengths):
    model, static = tiny_model(kind), cache == "static"
    config = flux_config(decode=decode)
    made = compiled(model, routes=options_for(pattern), config=config, strict=True)
    for length, new in [*((length, 3) for length in lengths), GROWING]:
        given = prompt(3, length, padding)
        got = generate(model, given, new, static)
        dense_from = length if decode == "dense" else None
        definition = definition_of(all_rows(3, pattern), config, dense_from)
        model_reference = tiny_model(kind)
        assert_follows(model_reference, got, given, definition)
    assert "streaming" in made.became
    assert ("streaming decode" in made.became) == (decode == "sparse")


@pytest.mark.parametrize("padding", ["left", "ones"])
def test_fixed_lengths_past_the_window(padding):
    """One query's window then holds every key that is left, and is no part of the mask."""
    made = compiled(tiny_model("mistral"), dynamic=False, routes="sparse", config=flux_config())
    length = WINDOW + 20
    given = prompt(3, length, padding)
    got = generate(made.model, given, 3)
    # Without padding nothing that the graph is given says how many tokens are gone.
    dense_from = length if padding == "ones" else None
    definition = definition_of(all_rows(3, (0, 0)), flux_config(), dense_from)
    assert_follows(tiny_model("mistral"), got, given, definition)
    expected = {"full decode"} if padding == "ones" else {"streaming decode"}
    assert made.became == {"streaming"} | expected


DEFAULT_FORWARD = {("llama", "left", True), ("mistral", "right", True), ("qwen3", "none", False)}


def forward_cases():
    made = []
    for case in itertools.product(MODELS, ("none", "left", "right"), (True, False)):
        marks = () if case in DEFAULT_FORWARD else (pytest.mark.slow,)
        name = f"{case[0]}-{case[1]}-{'cache' if case[2] else 'no_cache'}"
        made.append(pytest.param(*case, id=name, marks=marks))
    return made


@pytest.mark.parametrize(("kind", "padding", "use_cache"), forward_cases())
def test_logits(kind, padding, use_cache):
    """One forward, every valid position, with an odd pattern."""
    model, config = tiny_model(kind), flux_config(sink=1, local=8)
    compiled(model, routes="sparse", config=config, strict=True)
    definition = definition_of(all_rows(3, (0, 0)), config)
    for length in (2, 9, 10, 63, 130):
        given = prompt(3, length, padding)
        got = forward(model, given, use_cache=use_cache)
        expected = routed_logits(tiny_model(kind), definition, given.ids, attention_mask=given.mask)
        assert_logits(got, expected, given.valid)


@pytest.mark.parametrize("kind", ["mistral", "llama-eager"])
def test_unreadable_mask_is_full(kind):
    """``generate`` with a static cache hands these models a ready-made mask with more in it than
    causality and validity: full attention from beginning to end, whatever was asked for."""
    model, given = tiny_model(kind), prompt(3, 70, "left")
    expected = definition_of(all_rows(3, (1, 1)), flux_config())
    compiled(model, routes="sparse", config=flux_config())
    got = generate(model, given, 6, static=True)
    assert_follows(tiny_model(kind), got, given, expected)


@pytest.mark.parametrize("padding", ["ones", "left"])
def test_window_within_local_needs_no_sparse_attention(padding):
    """A layer whose own window is no wider than the local one runs as it is."""
    model, given = tiny_model("mistral", sliding_window=12), prompt(3, 70, padding)
    config = flux_config()
    made = compiled(model, routes="sparse", config=config, strict=True)
    got = generate(model, given, 5)
    assert made.became <= {"full", "full decode"}
    assert_follows(
        tiny_model("mistral", sliding_window=12),
        got,
        given,
        definition_of(all_rows(3, (1, 1)), config),
    )


def test_mixed_layer_types():
    """Sliding and full layers in one model, each with its own kind of cache."""
    fields = {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    model, config = tiny_model("qwen3", **fields), flux_config()
    compiled(model, routes=[0, 0, 1], config=config, strict=True)
    for length in (20, 63):
        given = prompt(3, length, "left")
        got = generate(model, given, 3)
        definition = definition_of(all_rows(3, (0, 0, 1)), config)
        assert_follows(tiny_model("qwen3", **fields), got, given, definition)


def test_dynamic_false():
    model, config, given = tiny_model("llama"), flux_config(), prompt(2, 40, "left")
    compiled(model, dynamic=False, routes="sparse", config=config, strict=True)
    got = generate(model, given, 3)
    assert_follows(tiny_model("llama"), got, given, definition_of(all_rows(2, (0, 0)), config))


def test_holes_in_the_mask():
    """Validity with holes in the middle: distances count valid tokens."""
    model, config = tiny_model("llama"), flux_config(sink=2, local=8)
    given = prompt(2, 60)
    given.mask[0, 10:20] = 0
    given.mask[1, 1::3] = 0
    compiled(model, routes="sparse", config=config, strict=True)
    got = forward(model, given)
    definition = RoutedDefinition(torch.zeros(2, 2, dtype=torch.bool), 2, 8)
    expected = routed_logits(tiny_model("llama"), definition, given.ids, attention_mask=given.mask)
    assert_logits(got, expected, given.valid)
    assert_follows(tiny_model("llama"), generate(model, given, 5), given, definition)
