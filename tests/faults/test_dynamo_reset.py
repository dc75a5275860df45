"""``torch._dynamo.reset()`` throws compiled code away, not what a cache knows of its prompt."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import fluxcompile
from tests.parity.harness import TOLERANCE, compiled, definition_of
from tests.parity.models import flux_config, prompt, random_router, tiny_model
from tests.parity.reference import routed_logits


@pytest.mark.parametrize(
    "static",
    [pytest.param(False, id="dynamic"), pytest.param(True, id="static", marks=pytest.mark.slow)],
)
def test_a_generation_goes_on(static):
    model, twin = tiny_model("llama"), tiny_model("llama")
    fluxcompile.attach(model, random_router(model, seed=0))
    made = compiled(model, strict=True)
    given = prompt(3, 63, "left")
    cache = StaticCache(config=model.config, max_cache_len=80) if static else DynamicCache()
    ids, valid, positions = given.then(torch.tensor([[5, 6]] * 3))
    with torch.no_grad():
        model(given.ids, attention_mask=valid[:, :63], position_ids=positions[:, :63],
              past_key_values=cache)  # fmt: skip
        full = fluxcompile.routes(model).fa
        assert full.any()
        assert not full.all()
        steps = []
        for at in (63, 64):
            torch._dynamo.reset()
            out = model(ids[:, at : at + 1], attention_mask=valid[:, : at + 1],
                        position_ids=positions[:, at : at + 1], past_key_values=cache)  # fmt: skip
            steps.append(out.logits[:, 0])
    assert "decode by device-side route" in made.became
    assert made.graphs == 3
    wanted = routed_logits(twin, definition_of(full, flux_config()), ids, attention_mask=valid,
                           position_ids=positions, use_cache=False)  # fmt: skip
    worst = (torch.stack(steps, 1) - wanted[:, 63:]).abs().max().item()
    assert worst <= TOLERANCE
