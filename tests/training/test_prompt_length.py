"""Training rows hold prompt and answer: the router reads the prompt, as it does at inference."""

import pytest
import torch

import fluxcompile
from fluxcompile import RouterError, soft_routes
from tests.parity.models import Prompt, prompt
from tests.parity.test_router_features import OPTIONS
from tests.training import cases
from tests.training.cases import LONG, SHORT

CHOSEN = {"paper": {}} | {name: OPTIONS[name] for name in ("separate", "each head", "all")}


def calibrated(fields, **settings):
    """Not yet compiled; standardised features have means and deviations that show."""
    case = cases.trainable("llama", **settings, **fields)
    generator = torch.Generator().manual_seed(4)
    for buffer in case.router.buffers():
        buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return case


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("fields", CHOSEN.values(), ids=CHOSEN)
def test_shares_and_gradients(fields, padding):
    case = cases.compiled(calibrated(fields))
    batch, noise = prompt(3, LONG, padding), cases.noise_for(case.router, 3)
    prompts = torch.tensor([3, 9, 10_000])  # shorter than an end, longer than the row
    got = cases.compiled_step(case, batch, noise, prompts)
    cases.assert_same(got, cases.eager_step(case, batch, noise, prompt_length=prompts))
    whole = cases.compiled_step(case, batch, noise)
    cases.assert_same(whole, cases.eager_step(case, batch, noise))
    assert ((whole.shares - got.shares)[:2].abs() > 1e-4).all()


def test_it_is_an_input():
    """Other lengths, or none, without a recompile; rows, too."""
    case = cases.compiled(cases.trainable("llama"), dynamic=True)
    cases.compiled_step(case, prompt(2, LONG, "left"), None)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows, lengths in ((2, [5, 20]), (2, None), (3, [9, 5, 30]), (3, None)):
            batch = prompt(rows, LONG + rows, "left")
            prompts = None if lengths is None else torch.tensor(lengths)
            got = cases.compiled_step(case, batch, None, prompts)
            cases.assert_same(got, cases.eager_step(case, batch, None, prompt_length=prompts))


@pytest.mark.parametrize("length", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("fields", CHOSEN.values(), ids=CHOSEN)
def test_training_routes_are_those_of_inference(fields, length):
    """Prompt with answer and a prompt length in training, the prompt alone at inference."""
    answer = 11
    case = calibrated(fields, dtype=torch.float32)
    whole = prompt(4, length + answer, "none")
    asked = Prompt(whole.ids[:, :length], torch.ones(4, length, dtype=torch.int64))
    cases.compiled(case, routes="locked")
    with soft_routes(case.router, prompt_length=torch.full((4,), length)) as soft, torch.no_grad():
        case.model(whole.ids, use_cache=False)
        trained = soft.shares().bool()
    torch._dynamo.reset()
    case.model.compile(backend="flux", options={"lowering": "eager"})
    with torch.no_grad():
        case.model(asked.ids, attention_mask=asked.mask)
    assert torch.equal(fluxcompile.routes(case.model).fa, trained)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (torch.tensor([3]), r"prompt_length \[batch\]: expected \[2\], got \[1\]"),
        ([3, 4], r"prompt_length \[batch\]: expected \[2\], got list"),
        (torch.tensor([3.0, 4.0]), "prompt_length dtype: expected int64, got torch.float32"),
    ],
    ids=["shape", "list", "dtype"],
)
def test_refused(length, message):
    case = cases.compiled(cases.trainable("llama"))
    with soft_routes(case.router, prompt_length=length), pytest.raises(RouterError, match=message):
        cases.lm_loss(case.model, prompt(2, SHORT, "none"))
