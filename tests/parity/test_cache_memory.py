"""What a trimmed layer forgets is given back, and ``memory()`` says so."""

from __future__ import annotations

import gc

import pytest
import torch

import fluxcompile
from tests.parity.caches import KINDS, ROOM, SLOTS, flux_cache, generate_with, untrimmed
from tests.parity.harness import compiled, forward
from tests.parity.models import LOCAL, SINK, flux_config, forced_router, prompt, tiny_model
from tests.parity.test_compile_counts import FailOnRecompile

KV_HEADS, HEAD_DIM, FLOAT = 2, 64, 4


def bytes_for(tokens: int, batch: int = 2) -> int:
    return 2 * batch * KV_HEADS * HEAD_DIM * FLOAT * tokens


def tensors_of(length: int) -> int:
    """Living tensors that hold keys or values of so many tokens."""
    gc.collect()
    shape = (2, KV_HEADS, length, HEAD_DIM)
    kept = (x for x in gc.get_objects() if isinstance(x, torch.Tensor))
    return sum(type(x) is torch.Tensor and tuple(x.shape) == shape for x in kept)


@pytest.mark.parametrize("routed", ["static", "router"])
@pytest.mark.parametrize("max_length", KINDS)
@torch.no_grad()
def test_full_keys_and_values_are_gone(max_length, routed):
    model, given = tiny_model("llama"), prompt(2, 157)
    if routed == "router":
        fluxcompile.attach(model, forced_router(model, full=False))
        compiled(model, strict=True)
    else:
        compiled(model, routes="sparse", config=flux_config(), strict=True)
    cache = flux_cache(model, max_length)
    before = tensors_of(157)
    forward(model, given, past_key_values=cache)
    assert tensors_of(157) == before
    for layer in cache.layers:
        for kv in (layer.keys, layer.values):
            assert kv.shape == (2, KV_HEADS, SLOTS, HEAD_DIM)
            assert kv.untyped_storage().nbytes() == kv.numel() * FLOAT
    memory = cache.memory()
    assert memory.trimmed == (0, 1)
    assert memory.layers == (bytes_for(SLOTS),) * 2
    assert memory.untrimmed == (bytes_for(max_length or 157),) * 2
    assert memory.total == 2 * bytes_for(SLOTS)
    assert "2 of 2 layers trimmed" in str(memory)


def test_the_share_that_a_long_prompt_leaves():
    """128K tokens, three of four layers sparse: 0.28 of the memory at most, reckoned as memory()
    does for a cache in proportion."""
    model, given = tiny_model("llama", num_hidden_layers=4), prompt(1, 1000)
    scale = 131072 / 1000
    config = flux_config(sink=round(128 / scale), local=round(2048 / scale))
    compiled(model, routes=(0, 1, 0, 0), config=config, strict=True)
    cache = fluxcompile.FluxCache(model, sink=config.sink, local=config.local, spare=1)
    forward(model, given, past_key_values=cache)
    assert cache.memory().share <= 0.28


def test_an_empty_cache_holds_nothing():
    memory = flux_cache(tiny_model("llama")).memory()
    assert (memory.total, memory.total_untrimmed, memory.share) == (0, 0, 1.0)
    assert memory.trimmed == ()


def test_a_growing_cache_stays_in_its_rings():
    model, given = tiny_model("llama"), prompt(2, 63)
    compiled(model, routes=(0, 1), config=flux_config(), strict=True)
    cache = flux_cache(model)
    generate_with(model, given, 9, cache)
    rings = [kv.data_ptr() for kv in (cache.layers[0].keys, cache.layers[0].values)]
    generate_with(model, prompt(2, 80), 2, cache)
    assert rings == [kv.data_ptr() for kv in (cache.layers[0].keys, cache.layers[0].values)]
    assert cache.memory().layers[0] == bytes_for(SLOTS)
    assert cache.memory().layers[1] == bytes_for(81)


@pytest.mark.parametrize("max_length", KINDS)
def test_decode_compiles_no_more_after_the_second_token(max_length):
    model = tiny_model("llama")
    compiled(model, routes=(0, 1), config=flux_config(), strict=True)
    streamer = FailOnRecompile(after=3)
    try:
        cache = flux_cache(model, max_length)
        generate_with(model, prompt(1, 63), 12, cache, streamer=streamer)
    finally:
        torch.compiler.set_stance("default")
    assert streamer.tokens == 12


def addresses(cache) -> list[int]:
    tensors = [t for x in cache.layers for t in (x.keys, x.values, x.counts, x.seen)]
    return [tensor.data_ptr() for tensor in tensors]


def test_a_fixed_cache_stays_where_it_is():
    """Decoding, reset, the next prompts: the same memory, and no new graph but for the first prompt
    that has rings to use again."""
    model = tiny_model("llama")
    made = compiled(model, routes=(0, 1), config=flux_config(), strict=True)
    cache = flux_cache(model, ROOM)
    answers, where, graphs = [], [], []
    for seed in (0, 1, 0):
        given = prompt(2, 63, "left", seed=seed)
        answers.append(generate_with(model, given, 5, cache).tokens)
        where.append(addresses(cache))
        graphs.append(made.graphs)
        cache.reset()
        assert cache.get_seq_length() == 0
    assert where[0] == where[1] == where[2]
    assert graphs[0] + 1 == graphs[1] == graphs[2]
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(
        answers[1], generate_with(model, prompt(2, 63, "left", seed=1), 5, untrimmed(model)).tokens
    )
    assert SINK + LOCAL < 63
