"""Training mode on a GPU: Inductor, the Triton kernels and their backward, against eager."""

import pytest
import torch

from fluxcompile import soft_routes
from tests.parity.models import Prompt, prompt
from tests.training import cases
from tests.training.cases import LONG

pytestmark = pytest.mark.gpu


def on_gpu(given: Prompt) -> Prompt:
    return Prompt(given.ids.cuda(), None if given.mask is None else given.mask.cuda())


def gpu_case(**settings) -> cases.Case:
    case = cases.trainable("qwen3", dtype=torch.float32, overrides={"head_dim": 64}, **settings)
    case.model.cuda()
    case.router.cuda()
    return case


@pytest.mark.parametrize("sparse", ["streaming", "triangle"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_gradients_equal_eager(padding, sparse):
    case = cases.compiled(gpu_case(sparse=sparse, last=5), lowering="inductor", dynamic=True)
    for rows, length in ((2, LONG), (3, 300)):
        batch = on_gpu(prompt(rows, length, padding))
        noise = cases.noise_for(case.router, rows).cuda()
        got = cases.compiled_step(case, batch, noise)
        # Triton multiplies fp32 in TF32 or in three parts; the mixture is no more exact than that.
        cases.assert_same(got, cases.eager_step(case, batch, noise), rtol=2e-2, shares=1e-3)


def test_router_on_another_device():
    case = gpu_case()
    case.router.cpu()
    cases.compiled(case)
    with pytest.raises(Exception, match="the router's device"), soft_routes(case.router):
        cases.lm_loss(case.model, on_gpu(prompt(2, LONG)))
