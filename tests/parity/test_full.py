"""Routes pinned to full: logits and greedy ``generate`` equal eager's."""

import itertools

import pytest
import torch

from tests.parity.harness import (
    assert_logits,
    assert_same_generation,
    compiled,
    forward,
    generate,
)
from tests.parity.models import LOCAL, MODELS, PADDINGS, SINK, flux_config, prompt, tiny_model

LENGTHS = (1, 2, 63, 300)
#: starts short of sink + local and ends past it
GROWING = (SINK + LOCAL - 3, 6)

# A covering subset of models x batch x padding x cache x dynamic; the rest is marked slow.
DEFAULT = {
    ("llama", 3, "left", "dynamic", None): (2, 63),
    ("llama", 3, "right", "static", None): (63, 300),
    ("llama-eager", 3, "left", "static", None): (63,),
    ("llama-eager", 1, "right", "dynamic", True): (63,),
    ("qwen3", 3, "right", "dynamic", None): (63,),
    ("qwen3", 1, "left", "static", True): (2, 63),
    ("qwen3", 1, "ones", "dynamic", False): (63,),
    ("mistral", 3, "left", "dynamic", None): (63,),
}


def cases():
    grid = itertools.product(
        MODELS, (1, 3), PADDINGS[1:], ("dynamic", "static"), (None, True, False)
    )
    made = []
    for case in grid:
        kind, batch, padding, cache, dynamic = case
        name = f"{kind}-batch{batch}-{padding}-{cache}-dynamic_{dynamic}"
        if case in DEFAULT:
            made.append(pytest.param(*case, DEFAULT[case], id=name))
        made.append(pytest.param(*case, LENGTHS, id=f"{name}-all", marks=pytest.mark.slow))
    return made


@pytest.mark.parametrize(("kind", "batch", "padding", "cache", "dynamic", "lengths"), cases())
def test_generate(kind, batch, padding, cache, dynamic, lengths):
    model, static = tiny_model(kind), cache == "static"
    # dynamic=False compiles every length: few steps
    new = 3 if dynamic is False else 4
    runs = [(length, new) for length in lengths] + [GROWING]
    expected = [
        generate(model, prompt(batch, length, padding), steps, static) for length, steps in runs
    ]
    # HF's eager attention and a static cache: generate hands over a ready-made additive mask,
    # which cannot be read. It must be left alone, and say so, but not fail.
    unread = kind == "llama-eager" and static
    made = compiled(model, dynamic, routes="full", config=flux_config(), strict=not unread)
    for (length, steps), answer in zip(runs, expected, strict=True):
        got = generate(model, prompt(batch, length, padding), steps, static)
        assert_same_generation(got, answer)
    assert made.became == ({"left alone"} if unread else {"full", "full decode"})


DEFAULT_FORWARD = {
    ("llama", "none", False, 1),
    ("llama", "right", True, 3),
    ("llama-eager", "none", True, 1),
    ("qwen3", "left", False, 3),
    ("mistral", "none", True, 3),
    ("mistral", "right", False, 1),
}


def forward_cases():
    made = []
    for case in itertools.product(MODELS, PADDINGS, (True, False), (1, 3)):
        marks = () if case in DEFAULT_FORWARD else (pytest.mark.slow,)
        kind, padding, use_cache, batch = case
        name = f"{kind}-{padding}-{'cache' if use_cache else 'no_cache'}-batch{batch}"
        made.append(pytest.param(*case, id=name, marks=marks))
    return made


@pytest.mark.parametrize(("kind", "padding", "use_cache", "batch"), forward_cases())
def test_logits(kind, padding, use_cache, batch):
    """One forward over the prompt, at every valid position."""
    model = tiny_model(kind)
    made = compiled(model, routes="full", config=flux_config(), strict=True)
    for length in LENGTHS:
        given = prompt(batch, length, padding)
        got = forward(model, given, use_cache=use_cache)
        eager_model = tiny_model(kind)
        assert_logits(got, forward(eager_model, given, use_cache=use_cache), given.valid)
    assert made.became == {"full"}


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_given_position_ids(kind):
    """Positions that the caller passes do not disturb the rewrite."""
    model, given = tiny_model(kind), prompt(2, 40, "left")
    expected = forward(model, given, position_ids=given.positions)
    compiled(model, routes="full", strict=True)
    assert_logits(forward(model, given, position_ids=given.positions), expected, given.valid)


def test_without_router_or_routes_it_is_full_attention_and_says_so():
    model, given = tiny_model("llama"), prompt(2, 40, "left")
    expected = generate(model, given, 3)
    made = compiled(model)
    with pytest.warns(Warning, match="no router is attached") as caught:
        got = generate(model, given, 3)
    assert_same_generation(got, expected)
    assert len([w for w in caught if "no router" in str(w.message)]) == 1
    assert made.became <= {"full", "full decode"}


def test_gradients_leave_the_model_alone():
    model, given = tiny_model("llama"), prompt(2, 40)
    model.requires_grad_(True)
    compiled(model, routes="sparse", config=flux_config())
    with pytest.warns(Warning, match="gradients are enabled"):
        got = model(input_ids=given.ids).logits
    got.sum().backward()
    assert torch.isfinite(model.model.layers[0].self_attn.q_proj.weight.grad).all()
    with torch.no_grad():
        assert_logits(got, tiny_model("llama")(input_ids=given.ids).logits, given.valid)
