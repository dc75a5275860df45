"""Steps of few tokens whose linear layers run as ``flux::project_rows``, as they do on a GPU."""

import copy
import functools

import pytest
import torch
import transformers

import fluxcompile
from fluxcompile.passes import pipeline
from fluxcompile.passes.project_rows import project_rows

from .harness import assert_same_generation, eager, generate
from .models import prompt, tiny_model


@pytest.fixture
def launches(monkeypatch):
    """The pass for CPUs too; how many launches it made of each graph."""
    counts = []

    def on_cpu(gm):
        counts.append(project_rows(gm, devices=("cpu",)))
        return counts[-1]

    monkeypatch.setattr(pipeline, "project_rows", functools.wraps(project_rows)(on_cpu))
    return counts


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_generates_the_same(kind, launches):
    """Launches of a layer: q, k and v; o; gate and up; down."""
    model, twin = tiny_model(kind), tiny_model(kind)
    given = prompt(1, 30, "none")
    expected = generate(twin, given, 5)
    options = {"routes": "full", "lowering": "aot_eager"}
    model.compile(backend="flux", options=options)
    assert_same_generation(generate(model, given, 5), expected)
    layers = model.config.num_hidden_layers
    assert max(launches) == 4 * layers + 1, "and the vocabulary's"
    eager(model)


def test_layer_by_layer(launches):
    """Compiled by regions all layers run one graph; the vocabulary's product is in none."""
    model, twin = tiny_model("llama"), tiny_model("llama")
    given = prompt(1, 30, "none")
    expected = generate(twin, given, 5)
    fluxcompile.compile(model, routes="full", regional=True, lowering="aot_eager")
    assert_same_generation(generate(model, given, 5), expected)
    assert max(launches) == 4
    eager(model)


@pytest.mark.slow
def test_through_inductor(launches):
    model, twin = tiny_model("llama"), tiny_model("llama")
    given = prompt(1, 30, "none")
    expected = generate(twin, given, 5)
    model.compile(backend="flux", options={"routes": "full"})
    assert_same_generation(generate(model, given, 5), expected)
    assert max(launches) == 4 * model.config.num_hidden_layers + 1
    eager(model)


@pytest.mark.slow
def test_batches_of_any_size(launches):
    """One graph for all, from the second size on, no further from exact than eager is."""
    model, twin = (tiny_model("llama").bfloat16() for _ in range(2))
    exact = copy.deepcopy(twin).double()
    model.compile(backend="flux", options={"routes": "full", "lowering": "aot_eager"})
    graphs = []
    for batch in (4, 8, 3, 20):
        ids = prompt(batch, 30, "none").ids
        ours, eagers, expected = (step(one, ids) for one in (model, twin, exact))
        assert (ours - expected).norm() < 1.5 * (eagers - expected).norm()
        graphs.append(len(launches))
    assert max(launches) == 4 * model.config.num_hidden_layers + 1
    assert graphs[1] == graphs[-1]
    eager(model)


@torch.no_grad()
def step(model, ids):
    """Logits of a token after a prompt, in fp64."""
    cache = transformers.DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    return model(ids[:, -1:], past_key_values=cache, use_cache=True).logits.double()
