"""A model that is cast, moved, copied or pickled after ``attach`` and compilation."""

import copy
import pickle
import warnings

import pytest
import torch

import fluxcompile
from fluxcompile.errors import FluxWarning
from tests.parity.decide import decide, margins
from tests.parity.harness import assert_logits, definition_of, forward
from tests.parity.models import flux_config, prompt, random_router, tiny_model
from tests.parity.reference import routed_logits

GIVEN = prompt(3, 63, "left")


@pytest.fixture
def model():
    model = tiny_model("llama")
    return fluxcompile.compile(model, random_router(model, seed=0), lowering="eager", strict=True)


def expected(model, router):
    full = decide(model, router, GIVEN)
    assert margins(model, router, GIVEN) > 1e-3
    inputs = {"attention_mask": GIVEN.mask, "use_cache": False}
    return full, routed_logits(model, definition_of(full, flux_config()), GIVEN.ids, **inputs)


def check(model, router, twin):
    full, wanted = expected(twin, router)
    assert_logits(forward(model, GIVEN, use_cache=False), wanted, GIVEN.valid)
    assert torch.equal(fluxcompile.routes(model).fa, full)


def test_there_and_back(model):
    """Parameters get new memory: what was compiled serves them, or is compiled anew."""
    router, twin = random_router(model, seed=0), tiny_model("llama")
    check(model, router, twin)
    model.to(torch.float64).to(torch.float32)
    check(model, router, twin)


def test_another_dtype(model):
    """Router arithmetic stays in fp32 whatever the model computes in."""
    router, twin = random_router(model, seed=0), tiny_model("llama").double()
    check(model, router, tiny_model("llama"))
    model.to(torch.float64)
    full = decide(tiny_model("llama"), router, GIVEN)
    logits = forward(model, GIVEN, use_cache=False)
    assert logits.dtype == torch.float64
    assert torch.equal(fluxcompile.routes(model).fa, full)
    wanted = routed_logits(twin, definition_of(full, flux_config()), GIVEN.ids,
                           attention_mask=GIVEN.mask, use_cache=False)  # fmt: skip
    assert_logits(logits, wanted, GIVEN.valid)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_low_precision_still_routes(model, dtype):
    forward(model, GIVEN, use_cache=False)
    model.to(dtype)
    logits = forward(model, GIVEN, use_cache=False)
    assert logits.dtype == dtype
    assert not logits.isnan().any()
    assert not fluxcompile.routes(model).fa.all()


def test_new_weights_in_the_old_parameters(model):
    """What ``load_state_dict`` puts in is computed with."""
    router = random_router(model, seed=0)
    check(model, router, tiny_model("llama"))
    other = tiny_model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    model.load_state_dict(other.state_dict())
    check(model, router, other)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_of_a_compiled_model(model, copied):
    """It is the plain model, and becomes a routed one by being compiled; the first stays one."""
    router, twin = random_router(model, seed=0), tiny_model("llama")
    check(model, router, twin)
    other = copied(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FluxWarning)
        plain = forward(other, GIVEN, use_cache=False)
    assert_logits(plain, forward(twin, GIVEN, use_cache=False), GIVEN.valid)
    assert fluxcompile.routes(other) is None
    fluxcompile.compile(other, router, lowering="eager", strict=True)
    check(other, router, twin)
    check(model, router, twin)
