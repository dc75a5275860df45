"""Tiny models under random static routes, by layer and by row, against the eager definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

import fluxcompile
from tests.parity.decide import margins
from tests.parity.harness import (
    assert_follows,
    assert_logits,
    compiled,
    definition_of,
    forward,
    generate,
)
from tests.parity.models import MODELS, WINDOW, flux_config, prompt, random_router, tiny_model
from tests.parity.reference import routed_logits

#: a decision by less could fall either way in fp32
CLEAR = 1e-3


@dataclass(frozen=True)
class Situation:
    """A model, its routes, and a prompt; ``routes`` None for a random router's, row by row."""

    kind: str
    heads: tuple[int, int]
    routes: tuple[int, ...] | None
    router: int
    decode: str
    sink: int
    local: int
    batch: int
    length: int
    padding: str
    new: int

    def model(self):
        heads, kv_heads = self.heads
        return tiny_model(
            self.kind,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=16,
            hidden_size=16 * heads,
        )


@st.composite
def situations(draw) -> Situation:
    kv_heads = draw(st.integers(1, 2))
    return Situation(
        kind=draw(st.sampled_from(MODELS)),
        heads=(kv_heads * draw(st.integers(1, 3)), kv_heads),
        routes=draw(st.none() | st.tuples(*[st.integers(0, 1)] * 2)),
        router=draw(st.integers(0, 99)),
        decode=draw(st.sampled_from(["sparse", "dense"])),
        sink=draw(st.integers(1, 6)),
        local=draw(st.integers(1, WINDOW - 1)),
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 70)),
        padding=draw(st.sampled_from(["none", "ones", "left", "right"])),
        new=draw(st.sampled_from([0, 0, 3])),
    )


def check(situation: Situation) -> str:
    """What routed it, once its logits and tokens are found to be right."""
    torch._dynamo.reset()
    s, twin, model = situation, situation.model(), situation.model()
    config = flux_config(decode=s.decode, sink=s.sink, local=s.local)
    given = prompt(s.batch, s.length, s.padding)
    options = {}
    if s.routes is None:
        router = random_router(model, config, s.router)
        if margins(twin, router, given) < CLEAR:
            return "too close to call"
        fluxcompile.attach(model, router)
    else:
        options = {"routes": s.routes, "config": config}
    made = compiled(model, strict=True, **options)
    with torch.no_grad():
        got = generate(model, given, s.new) if s.new else forward(model, given, use_cache=False)
    if 0 in (s.routes or ()) and s.length > s.sink + s.local:
        assert "streaming" in made.became, made.became
    full = fluxcompile.routes(model).fa.expand(s.batch, -1)
    if s.routes is not None:
        assert full.tolist() == [[bool(x) for x in s.routes]] * s.batch
    definition = definition_of(full, config, s.length if s.new and s.decode == "dense" else None)
    if s.new:
        assert_follows(twin, got, given, definition)
    else:
        wanted = routed_logits(
            twin, definition, given.ids, attention_mask=given.mask, use_cache=False
        )
        assert_logits(got, wanted, given.valid)
    mixed = bool(full.any(0).ne(full.all(0)).any())
    return "static" if s.routes is not None else "mixed rows" if mixed else "router"


def test_models(campaign):
    campaign.run(check, examples=3, situation=situations())
    assert campaign.seen["static"]
