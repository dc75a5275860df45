"""How often the backend compiles: decode settles after two tokens, prefill after two lengths."""

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import fluxcompile
from tests.parity.harness import compiled, forward
from tests.parity.models import LOCAL, SINK, flux_config, prompt, random_router, tiny_model

MODES = ("router", "full", "sparse")


def in_mode(kind: str, mode: str):
    model = tiny_model(kind)
    if mode == "router":
        fluxcompile.attach(model, random_router(model))
        return compiled(model, strict=True)
    return compiled(model, routes=mode, config=flux_config(), strict=True)


class FailOnRecompile(BaseStreamer):
    """Forbids any further compilation once ``after`` tokens have been generated."""

    def __init__(self, after: int = 2) -> None:
        self.tokens, self.after = -1, after  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        if self.tokens == self.after:
            torch.compiler.set_stance("fail_on_recompile")

    def end(self) -> None:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_decode_compiles_no_more_after_the_second_token(kind, mode, cache):
    """Across sink + local too: the prompt is shorter, the end is beyond."""
    made = in_mode(kind, mode)
    static = {"cache_implementation": "static"} if cache == "static" else {}
    given = prompt(1, SINK + LOCAL - 6)
    streamer = FailOnRecompile(after=3)  # prefill gives the first token, decode two more
    try:
        made.model.generate(
            given.ids,
            attention_mask=given.mask,
            max_new_tokens=20,
            do_sample=False,
            disable_compile=True,
            streamer=streamer,
            **static,
        )
    finally:
        torch.compiler.set_stance("default")
    assert streamer.tokens == 20


@pytest.mark.parametrize(
    "use_cache", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["cache", "no_cache"]
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", ["short", "long"])
def test_three_prefill_lengths_compile_at_most_twice(side, mode, use_cache):
    made = in_mode("llama", mode)
    lengths = (11, 14, 19) if side == "short" else (41, 57, 90)
    for length in lengths:
        forward(made.model, prompt(2, length, "left"), use_cache=use_cache)
    assert made.graphs <= 2


def test_both_sides_of_the_boundary_are_two_graphs_once_lengths_are_dynamic():
    made = in_mode("llama", "router")
    for length in (41, 57):
        forward(made.model, prompt(2, length, "left"))
    long = made.graphs
    for length in (11, 14, 90, 19, 120):
        forward(made.model, prompt(2, length, "left"))
    assert made.graphs <= long + 1


def test_static_cache_prefill_lengths():
    """A static cache of one size serves prompts of every length with two prefill graphs a side."""
    from transformers import StaticCache

    made = in_mode("llama", "router")
    cache = StaticCache(config=made.model.config, max_cache_len=128)
    counts = []
    for length in (41, 57, 70, 90):
        cache.reset()
        given = prompt(2, length, "left")
        with torch.no_grad():
            made.model(input_ids=given.ids, attention_mask=given.mask, past_key_values=cache)
        counts.append(made.graphs)
    assert counts[-1] == counts[-2], counts
