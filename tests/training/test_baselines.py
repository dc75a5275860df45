"""Static routes from data, on models made so that the right answer is known."""

from dataclasses import replace

import pytest
import torch

from fluxcompile.errors import ConfigError, DataError, TrainingError
from fluxcompile.evaluation import AsUser, Prompt
from fluxcompile.training import baselines
from fluxcompile.training.baselines import (
    entropy_routes,
    greedy_routes,
    matrix_entropies,
    random_routes,
)
from fluxcompile.training.examples import prepare
from fluxcompile.training.patterns import PatternLoss
from fluxcompile.training.tasks import BUILT_IN
from tests.training.tiny import CONFIG, tiny_data, tiny_model


def test_random_routes_have_the_number_asked_for():
    routes = random_routes(12, 5, seed=3)
    assert routes.count(0) == 5
    assert len(routes) == 12
    assert routes == random_routes(12, 5, seed=3)
    assert len({random_routes(12, 5, seed=seed) for seed in range(20)}) > 10
    assert random_routes(3, 0) == (1, 1, 1)
    for impossible in (-1, 4):
        with pytest.raises(ConfigError, match="sparse_layers"):
            random_routes(3, impossible)


def test_entropy_of_states_that_are_known():
    model = tiny_model()
    inputs = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
        )
    prompt = torch.arange(3, 23)
    found = matrix_entropies(model, [prompt])
    for hidden, entropy in zip(inputs, found, strict=True):
        unit = torch.nn.functional.normalize(hidden[0].double(), dim=-1)
        values = torch.linalg.eigvalsh(unit @ unit.T / 20).clamp(min=1e-12)
        expected = -(values * values.log()).sum() / torch.tensor(20.0).log()
        assert entropy == pytest.approx(expected.item(), abs=1e-6)
    same = matrix_entropies(model, [torch.full((20,), 7)])
    assert same[0] == pytest.approx(0, abs=1e-6), "one direction only"


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)], ids=["few tokens", "many tokens"])
def test_entropy_is_the_limit_of_matrix_based_renyi_entropies(shape):
    states = torch.randn(shape) * torch.rand(shape[1])
    kernel = states.double() @ states.double().T
    norms = kernel.diagonal().sqrt()
    matrix = kernel / (norms[:, None] * norms) / len(states)
    values = torch.linalg.eigvalsh(matrix).clamp(min=0)

    def renyi(alpha: float) -> float:
        return float((values**alpha).sum().log() / (1 - alpha) / torch.tensor(min(shape)).log())

    entropy = baselines._entropy(states)
    assert renyi(1 + 1e-5) < entropy < renyi(1 - 1e-5)
    assert renyi(1 - 1e-5) - renyi(1 + 1e-5) < 1e-4
    assert baselines._entropy(torch.eye(12)) == pytest.approx(1)
    assert baselines._entropy(7 * states) == pytest.approx(entropy)


def test_entropy_routes_take_the_least_first():
    model = tiny_model(num_hidden_layers=4)
    data = tiny_data(4)
    entropies = matrix_entropies(model, [torch.tensor(row["input_ids"]) for row in data])
    least = min(range(4), key=entropies.__getitem__)
    routes = entropy_routes(model, data, sparse_layers=1)
    assert [layer for layer in range(4) if not routes[layer]] == [least]
    assert entropy_routes(model, data, sparse_layers=4) == (0, 0, 0, 0)
    with pytest.raises(DataError):
        entropy_routes(model, [], sparse_layers=1)


@pytest.fixture
def losses():
    """Loss of a three-layer model under a pattern, and its examples."""
    model = tiny_model(num_hidden_layers=3, initializer_range=0.2)
    examples = prepare(tiny_data(3), tasks=BUILT_IN)
    with PatternLoss.of(model, CONFIG, lowering="eager") as loss:
        yield model, loss, examples


def test_every_pattern_is_one_compile_and_the_right_loss(losses):
    model, loss, examples = losses
    with torch.no_grad():
        expected = sum(
            model(example.input_ids[None], labels=example.labels[None]).loss for example in examples
        )
    assert loss((1, 1, 1), examples) == pytest.approx(float(expected) / 3, rel=1e-5)
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    patterns = [(0, 1, 1), (1, 0, 1), (0, 0, 0)]
    values = {pattern: loss(pattern, examples) for pattern in patterns}
    assert len(set(values.values())) == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiles


def test_pattern_equals_a_static_compile(losses):
    model, loss, examples = losses
    found = loss((0, 1, 0), examples)
    model.compile(
        backend="flux", options={"routes": (0, 1, 0), "config": CONFIG, "lowering": "eager"}
    )
    with torch.no_grad():
        total = sum(
            float(model(e.input_ids[None], labels=e.labels[None], use_cache=False).loss)
            for e in examples
        )
    assert found == pytest.approx(total / 3, rel=1e-5)


@pytest.mark.parametrize(
    "fields", [{"sparse": "triangle", "last": 5}, {"decode": "dense"}], ids=str
)
def test_pattern_knows_where_prompts_end(fields):
    """The loss of answers is what a user gets, who decodes them."""
    model, config = (
        tiny_model(num_hidden_layers=3, initializer_range=0.2),
        replace(CONFIG, **fields),
    )
    rows = [
        row | {"prompt_length": 30, "labels": [-100] * 30 + row["input_ids"][30:]}
        for row in tiny_data(3)
    ]
    with AsUser.of(model, routes=(0, 1, 0), config=config, lowering="eager") as run:
        asked = [Prompt(tuple(row["input_ids"][:30]), tuple(row["input_ids"][30:])) for row in rows]
        expected = float(run(asked).loss.mean())
    with PatternLoss.of(model, config, lowering="eager") as loss:
        found = loss((0, 1, 0), prepare(rows, tasks=BUILT_IN))
        whole = [row | {"prompt_length": len(row["input_ids"])} for row in rows]
        other = loss((0, 1, 0), prepare(whole, tasks=BUILT_IN))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(other, rel=1e-4)


def test_greedy_takes_the_cheapest_layer_each_time():
    model = tiny_model(num_hidden_layers=3, initializer_range=0.2)
    data = tiny_data(3)
    examples = prepare(data, tasks=BUILT_IN)
    routes = greedy_routes(model, data, sparse_layers=2, config=CONFIG, lowering="eager")
    assert routes.count(0) == 2
    singles, pairs = [(0, 1, 1), (1, 0, 1), (1, 1, 0)], [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    with PatternLoss.of(model, CONFIG, lowering="eager") as loss:
        first = min(singles, key=lambda routes: loss(routes, examples))
        allowed = [pair for pair in pairs if pair[first.index(0)] == 0]
        assert routes == min(allowed, key=lambda routes: loss(routes, examples))


def test_greedy_refuses_what_it_cannot_run():
    model = tiny_model()
    with pytest.raises(ConfigError, match="from 0 to 2"):
        greedy_routes(model, tiny_data(2), sparse_layers=3)
    with pytest.raises(DataError, match="2177"):
        greedy_routes(model, tiny_data(2), sparse_layers=1)
    model.compile(backend="flux")
    with pytest.raises(TrainingError, match="compile"):
        greedy_routes(model, tiny_data(2), sparse_layers=1, config=CONFIG)
