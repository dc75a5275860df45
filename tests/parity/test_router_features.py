"""Routers that read more than the paper's: the compiled model decides as the eager definition."""

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import fluxcompile
from tests.parity.decide import decide, margins
from tests.parity.harness import assert_follows, compiled, definition_of, generate
from tests.parity.models import LOCAL, SINK, flux_config, prompt, random_router, tiny_model

OPTIONS = {
    "unequal ends": {"prefix_size": 6, "suffix_size": 2},
    "end alone": {"prefix_size": 0, "suffix_size": 5},
    "separate": {"segments": "separate"},
    "each head": {"heads": "each"},
    "standardised": {"standardize": True},
    "all": {
        "prefix_size": 5,
        "suffix_size": 3,
        "segments": "separate",
        "heads": "each",
        "standardize": True,
    },
}


def standardising_router(model, config, seed):
    """Random, with random means and deviations where it has any."""
    router = random_router(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in router.layers:
        for buffer in layer.buffers():
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return router


def models(fields, seed=3, **options):
    model, twin = tiny_model("llama"), tiny_model("llama")
    router = standardising_router(model, flux_config(**fields), seed)
    fluxcompile.attach(model, router)
    return compiled(model, strict=True, **options), twin, router


def mixed_cases():
    """What is read does not depend on the cache, only where a prompt ends does."""
    made = []
    for name in OPTIONS:
        made.append(pytest.param(name, "dynamic"))
        marks = () if name in ("end alone", "all") else pytest.mark.slow
        made.append(pytest.param(name, "static", marks=marks))
    return made


@pytest.mark.parametrize(("name", "cache"), mixed_cases())
def test_mixed_rows(name, cache):
    made, twin, router = models(OPTIONS[name])
    mixed = 0
    for length, padding in ((90, "left"), (SINK + LOCAL - 14, "right")):
        given = prompt(4, length, padding)
        full = decide(twin, router, given)
        assert margins(twin, router, given) > 1e-3, "another seed: this router nearly ties"
        got = generate(made.model, given, 3, cache == "static")
        assert fluxcompile.routes(made.model).fa.tolist() == full.tolist()
        assert_follows(twin, got, given, definition_of(full, router.config))
        mixed += sum(0 < int(column.sum()) < len(column) for column in full.T)
    assert mixed > 0, "another seed: no layer has rows of both kinds"


def test_lowered():
    """AOTAutograd traces through the features: the graph's arguments survive it."""
    made, twin, router = models(OPTIONS["all"], lowering="aot_eager")
    given = prompt(4, 90, "left")
    generate(made.model, given, 1)
    assert fluxcompile.routes(made.model).fa.tolist() == decide(twin, router, given).tolist()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor():
    made, twin, router = models(OPTIONS["all"], lowering="inductor")
    given = prompt(4, 90, "left")
    generate(made.model, given, 1)
    assert fluxcompile.routes(made.model).fa.tolist() == decide(twin, router, given).tolist()


def test_ends_of_the_options_and_features_of_the_router():
    """The numbers of tokens may be overridden, as ``pool_size`` may; what is read of them not."""
    given = prompt(4, 90, "left")
    model, twin = tiny_model("llama"), tiny_model("llama")
    router = random_router(model)
    fluxcompile.attach(model, router)
    shorter = flux_config(suffix_size=2)
    compiled(model, config=shorter)
    generate(model, given, 1)
    router.config = shorter
    assert fluxcompile.routes(model).fa.tolist() == decide(twin, router, given).tolist()
    for field, value in {"segments": "separate", "heads": "each", "standardize": True}.items():
        torch._dynamo.reset()
        model.compile(
            backend="flux",
            options={"lowering": "eager", "config": flux_config(**{field: value})},
        )
        with pytest.raises(BackendCompilerFailed, match=f"FluxConfig.{field} of the options"):
            model(given.ids, attention_mask=given.mask)
