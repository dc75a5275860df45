"""Training the model under its router's hard routes, and under static ones."""

import pytest
import torch

import fluxcompile
from fluxcompile import RouterError, soft_routes
from tests.parity.models import prompt
from tests.training import cases
from tests.training.cases import LONG


def gradients(model, batch):
    model.zero_grad()
    cases.lm_loss(model, batch).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def eager_gradients(case, batch, **settings):
    mixture = cases.Mixture(case.router, **settings)
    before, case.model._compiled_call_impl = case.model._compiled_call_impl, None
    with cases.eager_mixture(case.model, mixture):
        found = gradients(case.model, batch)
    case.model._compiled_call_impl = before
    return found, mixture.shares()


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("sparse", "decode"), [("streaming", "sparse"), ("streaming", "dense"), ("triangle", "sparse")]
)
def test_gradients_reach_the_model_and_not_the_router(sparse, decode, lowering):
    case = cases.trainable("qwen3", sparse=sparse, decode=decode, last=5)
    case.model.requires_grad_(True)
    cases.compiled(case, routes="locked", lowering=lowering)
    batch = prompt(4, LONG, "left", seed=2)
    prompts = torch.tensor([LONG - 4, LONG - 9, 12, 10_000])
    expected, hard = eager_gradients(case, batch, locked=True, prompt_length=prompts)
    assert 0 < hard.mean() < 1, "every row takes the same route: nothing told apart"
    with soft_routes(case.router, prompt_length=prompts) as soft:
        found = gradients(case.model, batch)
    assert torch.equal(soft.shares(), hard)
    assert not soft.shares().requires_grad
    assert all(p.grad is None for p in case.router.parameters())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


def test_the_router_is_live():
    """Other router weights are followed without a recompile."""
    case = cases.trainable("llama")
    cases.compiled(case, routes="locked")
    batch = prompt(2, LONG, "left")
    cases.lm_loss(case.model, batch)
    with torch.compiler.set_stance("fail_on_recompile"):
        for share in (0.0, 1.0):
            with torch.no_grad():
                for layer in case.router.layers:
                    layer.head[-1].weight.zero_()
                    layer.head[-1].bias.copy_(torch.tensor([1 - share, share]))
            with soft_routes(case.router) as soft:
                cases.lm_loss(case.model, batch)
            assert (soft.shares() == share).all()


@pytest.mark.parametrize("sparse", ["streaming", "triangle"])
@pytest.mark.parametrize("routes", ["full", "sparse", [1, 0]], ids=str)
def test_static_routes(routes, sparse):
    """No router takes part; the model trains under the pattern."""
    case = cases.trainable("llama", sparse=sparse, last=5)
    case.model.requires_grad_(True)
    pattern = {"full": [1, 1], "sparse": [0, 0]}.get(routes, routes) if isinstance(
        routes, str
    ) else routes  # fmt: skip
    with torch.no_grad():
        for layer, full in zip(case.router.layers, pattern, strict=True):
            layer.head[-1].weight.zero_()
            layer.head[-1].bias.copy_(torch.tensor([1.0 - full, float(full)]))
    batch = prompt(2, LONG, "left")
    expected, _ = eager_gradients(case, batch, locked=True)
    fluxcompile.detach(case.model)
    cases.compiled(case, routes=routes, config=case.router.config)
    found = gradients(case.model, batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)
    with soft_routes(case.router) as soft:
        cases.lm_loss(case.model, batch)
    with pytest.raises(RouterError, match="shares"):
        soft.shares()
