"""Training with decoder layers compiled one by one: equal ones share a graph, and nothing else."""

import pytest
import torch

import fluxcompile
from fluxcompile import FluxRouter, soft_routes, train_router
from fluxcompile.errors import RewriteError
from tests.parity.models import prompt
from tests.training import cases
from tests.training.cases import LONG
from tests.training.tiny import QUICK, largest_difference, tiny_data, tiny_model


def regional(case: cases.Case, **options) -> cases.Case:
    torch._dynamo.reset()
    fluxcompile.compile(case.model, regional=True, mode="train", lowering="eager", **options)
    return case


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("llama", {"sparse": "triangle", "last": 5}),
        ("llama", {"decode": "dense"}),
    ],
    ids=["llama", "qwen3", "triangle", "dense decode"],
)
def test_loss_shares_and_gradients(kind, config, padding):
    case = cases.trainable(kind, **config)
    batch, noise = prompt(3, LONG, padding), cases.noise_for(case.router, 3)
    lengths = torch.tensor([LONG - 9, LONG - 12, LONG - 10])
    settings = {"prompt_length": lengths, "hardness": 0.3}
    expected = cases.eager_step(case, batch, noise, **settings)
    got = cases.compiled_step(regional(case), batch, noise, **settings)
    cases.assert_same(got, expected)


def test_equal_layers_share_graphs(lowered):
    """The first layer gets no gradient from below: two graphs, however many layers there are."""
    for layers in (3, 6):
        case = cases.trainable(overrides={"num_hidden_layers": layers})
        batch, noise = prompt(2, LONG, "none"), cases.noise_for(case.router, 2)
        expected = cases.eager_step(case, batch, noise)
        lowered.clear()
        cases.assert_same(cases.compiled_step(regional(case), batch, noise), expected)
        assert len(lowered) == 2


def test_windows_are_refused():
    """A layer by itself sees its window as a mask alone, and sparse attention of that is unsaid."""
    case = regional(cases.trainable("mistral"))
    with (
        soft_routes(case.router),
        pytest.raises(RewriteError, match="compile the model as a whole"),
    ):
        cases.lm_loss(case.model, prompt(2, LONG, "none"))


def test_routes_can_be_locked():
    case = cases.trainable("llama")
    batch = prompt(2, LONG, "none")
    logits = []
    for compile_case in (cases.compiled, regional):
        compile_case(case, routes="locked")
        with soft_routes(case.router) as soft, torch.no_grad():
            logits.append(case.model(batch.ids, use_cache=False).logits)
            assert soft.shares().unique().tolist() in ([0, 1], [0], [1])
        case.model._compiled_call_impl = None
    torch.testing.assert_close(*logits)


def test_train_router_by_regions():
    """The same router as from the whole model's graph; distilled, as the teacher is the model."""
    found = []
    for folder in ("whole", "regions"):
        settings = {"distillation": 1.0, "hardness": 1.0, "regional": folder == "regions", **QUICK}
        found.append(train_router(tiny_model(), tiny_data(), **settings))
    new = FluxRouter.from_model(tiny_model(), QUICK["config"])
    assert largest_difference(found[0], new) > 1e-4
    assert largest_difference(*found) < 1e-6
