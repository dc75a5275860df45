"""The backend on a GPU, through Inductor, against eager and the reference on the CPU."""

import pytest
import torch
from transformers import StaticCache

import fluxcompile
from tests.parity.decide import decide
from tests.parity.harness import (
    Generated,
    all_rows,
    assert_follows,
    assert_same_generation,
    definition_of,
    eager,
    generate,
)
from tests.parity.models import Prompt, flux_config, prompt, random_router, tiny_model
from tests.parity.reference import routed_logits

pytestmark = pytest.mark.gpu


def on_gpu(given: Prompt) -> Prompt:
    """The same prompt with its tensors on the GPU."""
    return Prompt(given.ids.cuda(), None if given.mask is None else given.mask.cuda())


def on_cpu(got: Generated) -> Generated:
    return Generated(got.tokens.cpu(), got.logits.cpu())


@pytest.mark.parametrize("static", [False, True], ids=["dynamic-cache", "static-cache"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_full(kind, static):
    model, given = tiny_model(kind), prompt(3, 63, "left")
    expected = generate(model, given, 4, static)
    model.cuda().compile(backend="flux", options={"routes": "full", "strict": True})
    assert_same_generation(on_cpu(generate(model, on_gpu(given), 4, static)), expected)
    eager(model)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic-cache", "static-cache"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_one_row(kind, static):
    """A token's linear layers run in our own kernel, with their norms and sums."""
    model, twin = tiny_model(kind), tiny_model(kind)
    given = prompt(1, 63, "none")
    expected = generate(twin, given, 6, static)
    model.cuda().compile(backend="flux", options={"routes": "full", "strict": True})
    assert_same_generation(on_cpu(generate(model, on_gpu(given), 6, static)), expected)
    eager(model)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic-cache", "static-cache"])
def test_router_with_mixed_rows(static):
    model, twin = tiny_model("qwen3").cuda(), tiny_model("qwen3")
    router = random_router(twin)
    fluxcompile.attach(model, router)
    model.compile(backend="flux", dynamic=not static, options={"strict": True})
    given = prompt(4, 90, "left")
    full = decide(twin, router, given)
    got = on_cpu(generate(model, on_gpu(given), 4, static))
    assert fluxcompile.routes(model).fa.tolist() == full.tolist()
    assert 0 < full.float().mean() < 1
    assert_follows(twin, got, given, definition_of(full, router.config))
    eager(model)


@pytest.mark.parametrize("pattern", [(0, 0), (0, 1)], ids=["sparse", "mixed"])
def test_static_pattern(pattern):
    model, config = tiny_model("llama").cuda(), flux_config()
    given = prompt(2, 300, "none")
    model.compile(backend="flux", options={"routes": pattern, "config": config, "strict": True})
    got = on_cpu(generate(model, on_gpu(given), 4))
    reference = definition_of(all_rows(2, pattern), config)
    assert_follows(tiny_model("llama"), got, given, reference)
    eager(model)


def test_half_precision_stays_near_full_precision():
    """A bf16 prompt of 700 tokens: within twice of what bf16 costs eager."""
    exact, model = tiny_model("llama").cuda(), tiny_model("llama").cuda().bfloat16()
    given = on_gpu(prompt(2, 700, "left"))
    keep = given.mask.bool()
    with torch.no_grad():
        expected = exact(input_ids=given.ids, attention_mask=given.mask).logits[keep]
        eagerly = model(input_ids=given.ids, attention_mask=given.mask).logits[keep]
        compiled = torch.compile(model, backend="flux", options={"routes": "full"})
        got = compiled(input_ids=given.ids, attention_mask=given.mask).logits[keep]
    bound = 2 * (eagerly.float() - expected).abs().max()
    assert (got.float() - expected).abs().max() <= bound


def test_decode_never_waits_for_the_device():
    """A compiled decode step in a static cache, mixed rows: no host synchronisation."""
    model = tiny_model("llama").cuda()
    fluxcompile.attach(model, random_router(model).cuda())
    compiled = torch.compile(model, backend="flux", options={"strict": True})
    cache = StaticCache(config=model.config, max_cache_len=128)
    ids = on_gpu(prompt(4, 63, "none")).ids
    with torch.no_grad():
        compiled(input_ids=ids, past_key_values=cache)
        token = ids[:, -1:]
        for _ in range(3):
            compiled(input_ids=token, past_key_values=cache)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            compiled(input_ids=token, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphs", [False, True], ids=["launches", "cuda-graphs"])
def test_rings_of_fixed_size(graphs):
    """Several prompts in one cache, mixed rows: right tokens, and decode that never waits."""
    model, twin = tiny_model("llama"), tiny_model("llama")
    router = random_router(model)
    fluxcompile.attach(model.cuda(), router.cuda())
    options = {"strict": True, "inductor": {"triton.cudagraphs": graphs}}
    compiled = torch.compile(model, backend="flux", options=options)
    cache = fluxcompile.FluxCache(model, max_length=128)
    for seed in (0, 1, 0):
        cache.reset()
        given = prompt(2, 63, "none", seed=seed)
        ids = given.ids
        with torch.no_grad():
            logits = [compiled(input_ids=ids.cuda(), past_key_values=cache).logits.clone()]
            full = fluxcompile.routes(model).fa.cpu()
            for _ in range(24):
                token = logits[-1][:, -1:].argmax(-1)
                ids = torch.cat((ids, token.cpu()), dim=1)
                logits.append(compiled(input_ids=token, past_key_values=cache).logits.clone())
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                compiled(input_ids=token, past_key_values=cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        got = torch.cat(logits, dim=1).cpu()
        definition = definition_of(full, router.config)
        expected = routed_logits(twin, definition, ids, use_cache=False)
        torch.testing.assert_close(got[:, 62:], expected[:, 62:], atol=1e-3, rtol=1e-3)
