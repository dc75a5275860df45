"""A growing cache has the same memory order from the first call on, so decode compiles once."""

import pytest
import torch
from transformers import DynamicCache

from tests.parity.harness import eager, forward
from tests.parity.models import flux_config, prompt, tiny_model


@pytest.mark.parametrize(
    "routes",
    [pytest.param("full", id="full", marks=pytest.mark.slow), pytest.param((0, 1), id="mixed")],
)
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_new_cache_is_contiguous(lowering, routes):
    model, given = tiny_model("llama"), prompt(2, 63, "left")
    options = {"routes": routes, "config": flux_config(), "lowering": lowering}
    expected, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    logits = forward(model, given, past_key_values=expected)
    model.compile(backend="flux", options=options)
    got = forward(model, given, past_key_values=cache)
    for layer in cache.layers:
        assert layer.keys.is_contiguous()
        assert layer.values.is_contiguous()
    if routes == "full":
        torch.testing.assert_close(got[:, -1], logits[:, -1], atol=5e-5, rtol=1e-4)
        valid = given.valid.bool()
        torch.testing.assert_close(
            cache.layers[0].keys.transpose(1, 2)[valid],
            expected.layers[0].keys.transpose(1, 2)[valid],
        )
    eager(model)
