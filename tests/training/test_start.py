"""Routers that start with fixed routes for each task: searched for, learnt, and what is refused."""

import functools
from dataclasses import replace

import pytest
import torch

from fluxcompile import FluxRouter, train_router
from fluxcompile.errors import ConfigError
from fluxcompile.training.backbone import attached, compiled, frozen
from fluxcompile.training.batching import collate
from fluxcompile.training.examples import prepare
from fluxcompile.training.language_model import LanguageModel
from fluxcompile.training.multipliers import Multipliers
from fluxcompile.training.route_cost import route_samples
from fluxcompile.training.start import GREEDY, check_start, start_routes
from fluxcompile.training.tasks import BUILT_IN
from fluxcompile.training.trainee import Trainee
from tests.parity.models import forced_router
from tests.training.eager_mixture import Mixture, eager_mixture
from tests.training.test_route_search import single_sample
from tests.training.tiny import CONFIG, QUICK, routes_on, tiny_data, tiny_model

READING = replace(CONFIG, prefix_size=0, suffix_size=32, standardize=True)
OPPOSITE = {"retrieval": [1, 0], "holistic": [0, 1]}
# Not a step that changes anything: what is seen is the start.
STANDING = QUICK | {"config": READING, "max_steps": 1, "learning_rate": 0.0}


def test_routers_take_the_routes_of_the_task_they_read():
    data = tiny_data(64, tokens_tell_tasks=True)
    model = tiny_model()
    router = train_router(model, data[:48], start=OPPOSITE, **STANDING)
    wanted = torch.tensor([OPPOSITE[row["task"]] for row in data[48:]]).bool()
    taken = routes_on(model, router, data[48:]) == wanted
    assert taken.float().mean() > 0.9


def test_greedy_start_has_each_tasks_target(tmp_path):
    settings = STANDING | {"tasks": {"retrieval": 0.5, "holistic": 1.0}, "search_rows": 2}
    data = tiny_data(tokens_tell_tasks=True)
    train_router(tiny_model(), data, start=GREEDY, output_dir=tmp_path, **settings)
    card = (tmp_path / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("| `start` |")]
    assert "'holistic': (0, 0)" in line
    assert "'retrieval': (0, 1)" in line or "'retrieval': (1, 0)" in line
    assert FluxRouter.from_pretrained(tmp_path).layers[0].calibrated


def test_search_knows_where_prompts_end():
    """How likely answers are, by the definition of the mixture."""
    model = tiny_model(initializer_range=0.2)
    router = forced_router(model, False, replace(CONFIG, sparse="triangle", last=5))
    examples = prepare(
        [
            row | {"prompt_length": 30, "labels": [-100] * 30 + row["input_ids"][30:]}
            for row in tiny_data(3)
        ],
        tasks=BUILT_IN,
    )
    batch = collate(examples, 0)
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    with (
        torch.no_grad(),
        eager_mixture(model, Mixture(router, prompt_length=batch["prompt_length"], locked=True)),
    ):
        sparse = model(ids, attention_mask=mask).logits.log_softmax(-1)
    answers = labels[:, 1:] != -100
    likely = sparse[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]  # of what comes next
    expected = 1 - ((likely * answers).sum(1) / answers.sum(1)).exp().mean()
    with attached(model, router), frozen(model):
        language_model = LanguageModel.of(model).checked(model)
        trainee = Trainee(
            model, router, Multipliers([0.5, 1.0], 0.0), language_model=language_model,
            run=compiled(language_model.body, router, lowering="eager"), logits_chunk=64,
        )  # fmt: skip
        (sample,) = trainee.fixed([batch], parts=(1,))
        found = float(sample((0, 0)).mean())
        (sample,) = trainee.fixed([batch | {"prompt_length": mask.sum(1)}], parts=(1,))
        whole = float(sample((0, 0)).mean())
    assert 1 - found == pytest.approx(float(1 - expected), rel=1e-4)
    assert 1 - found != pytest.approx(1 - whole, rel=1e-3)


def test_a_batch_is_run_once_for_routes_and_is_part_of_every_sample():
    model = tiny_model()
    router = forced_router(model, False, CONFIG)
    batches = [collate([example], 0) for example in prepare(tiny_data(5), tasks=BUILT_IN)]
    ran = []

    def counted(ids, *arguments, **settings):
        ran.append(len(ids))
        return run(ids, *arguments, **settings)

    with attached(model, router), frozen(model):
        language_model = LanguageModel.of(model).checked(model)
        run = compiled(language_model.body, router, lowering="eager")
        of = functools.partial(route_samples, router, language_model)
        few, some, every = (
            sample((0, 1)).tolist() for sample in of(counted, batches, 64, (4, 2, 1))
        )
        assert len(ran) == 5
        alone = [of(run, [batch], 64, (1,))[0]((0, 1)).item() for batch in batches]
    assert every == pytest.approx(alone)
    assert (some, few) == (every[::2], every[::4])
    assert len(set(every)) == 5


def test_search_makes_the_cheapest_layers_sparse():
    prices = {"retrieval": [5.0, 1.0, 2.0, 4.0], "holistic": [1.0, 9.0, 8.0, 7.0]}

    def cost_of(task):
        return lambda routes: sum(
            price for price, full in zip(prices[task], routes, strict=True) if not full
        )

    samples = {task: single_sample(cost_of(task)) * 2 for task in prices}
    found = start_routes(GREEDY, {"retrieval": 0.5, "holistic": 0.75}, 4, samples)
    assert found == {"retrieval": (1, 0, 0, 1), "holistic": (0, 1, 0, 0)}


def test_search_believes_many_examples_more_than_a_few():
    few, many = [1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 3.0, 2.0]

    def cost_of(prices):
        return lambda routes: sum(p * (1 - full) for p, full in zip(prices, routes, strict=True))

    samples = {"retrieval": [*single_sample(cost_of(few)), *single_sample(cost_of(many))]}
    assert start_routes(GREEDY, {"retrieval": 0.5}, 4, samples) == {"retrieval": (0, 1, 1, 0)}


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"retrieval": [1, 0]}, r"routes for \['holistic', 'retrieval'\]"),
        (OPPOSITE | {"holistic": [1]}, "2 of 0 and 1"),
        (OPPOSITE | {"holistic": [1, 2]}, "2 of 0 and 1"),
    ],
)
def test_routes_of_other_tasks_or_layers_are_refused(start, message):
    with pytest.raises(ConfigError, match=message):
        check_start(start, ("retrieval", "holistic"), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "beam"}, "'greedy' or routes by task"),
        ({"start": GREEDY, "search_rows": 0}, "search_rows"),
        ({"start": OPPOSITE, "config": CONFIG}, "standardize=True"),
    ],
)
def test_bad_starts_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        train_router(tiny_model(), tiny_data(), **STANDING | changes)


def test_a_given_router_does_not_start_anew():
    model = tiny_model()
    given = FluxRouter.from_model(model, READING)
    with pytest.raises(ConfigError, match="None where router is given"):
        train_router(model, tiny_data(), router=given, start=GREEDY, **STANDING | {"config": None})
