"""Threads that compile and generate at the same time get what they would get alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fluxcompile
from tests.parity.decide import decide, margins
from tests.parity.harness import assert_follows, compiled, definition_of, generate
from tests.parity.models import flux_config, prompt, random_router, tiny_model

THREADS = 2
#: of random routers that decide differently for these prompts, and by a wide margin
SEEDS = (0, 8)


def together(work, count=THREADS) -> list:
    """``work(i)`` in as many threads, started at once; their results, or the first error."""
    barrier = threading.Barrier(count)

    def run(index):
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def routed_model(seed):
    model = tiny_model("llama")
    router = random_router(model, seed=seed)
    fluxcompile.attach(model, router)
    compiled(model, strict=True)
    return model, router


def expect(twin, router, given, got) -> None:
    """Tokens and logits under the routes that an eager run of the router decides on."""
    assert margins(twin, router, given) > 1e-3
    assert_follows(twin, got, given, definition_of(decide(twin, router, given), flux_config()))


def test_models_compiled_at_the_same_time():
    """Each with a router of its own, on one class's code."""
    made = [routed_model(seed) for seed in SEEDS]
    prompts = [prompt(2, 40 + 7 * i, "left", seed=i) for i in range(THREADS)]
    results = together(lambda i: generate(made[i][0], prompts[i], 3))
    twin = tiny_model("llama")
    for (model, router), given, got in zip(made, prompts, results, strict=True):
        expect(twin, router, given, got)
        assert torch.equal(fluxcompile.routes(model).fa, decide(twin, router, given))


def test_generations_of_one_model_interleave():
    """Compiling and running at once: no prompt sees another's routes."""
    model, router = routed_model(SEEDS[0])
    prompts = [prompt(2, 45 + 5 * i, "left", seed=i) for i in range(THREADS)]
    twin = tiny_model("llama")
    assert len({str(decide(twin, router, given)) for given in prompts}) > 1
    for _ in range(2):  # the first round compiles
        results = together(lambda i: generate(model, prompts[i], 4))
        for given, got in zip(prompts, results, strict=True):
            expect(twin, router, given, got)


@pytest.mark.slow
def test_attaching_while_others_generate():
    """A model that gets and loses routers in one thread does not disturb those of the others."""
    made = [routed_model(seed) for seed in SEEDS]
    other, stop = tiny_model("llama"), threading.Event()
    routers = [random_router(other, seed=seed) for seed in (7, 8)]
    prompts = [prompt(2, 50, "left", seed=i) for i in range(2)]

    def work(index):
        if index < 2:
            try:
                return [generate(made[index][0], prompts[index], 3) for _ in range(2)]
            finally:
                stop.set()
        while not stop.is_set():
            fluxcompile.attach(other, routers[0])
            fluxcompile.attach(other, routers[1])
            fluxcompile.detach(other)
        return []

    *results, _ = together(work, 3)
    twin = tiny_model("llama")
    for (_, router), given, generations in zip(made, prompts, results, strict=True):
        for got in generations:
            expect(twin, router, given, got)
