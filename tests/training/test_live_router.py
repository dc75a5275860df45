"""A router whose tensors come from outside: the same logits, the same decisions as inference."""

import pytest
import torch

import fluxcompile.kernels.ops  # noqa: F401  registers torch.ops.flux
from fluxcompile.layer_router import LayerRouter
from fluxcompile.live_router import LiveLogits, row_logits, tensor_names
from fluxcompile.pooling import Pooling
from fluxcompile.router_pooling import full_attention_rows

POOLING = Pooling(3, 3)


class Extended(LayerRouter):
    """With a buffer, and a parameter of the module itself."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        self.gain = torch.nn.Parameter(torch.full((head_dim,), 2.0))
        self.register_buffer("mean", torch.full((head_dim,), 0.1))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return super().forward((pooled - self.mean) * self.gain)


def randomised(router: LayerRouter) -> LayerRouter:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return router


def picked_tokens(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(64, 6, generator=generator)
    picked = torch.randn(64, 2, 6, 8, generator=generator).to(dtype)
    return picked, weight / weight.sum(dim=1, keepdim=True)


def tensors_of(router: LayerRouter) -> list[torch.Tensor]:
    named = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    return [named[name] for name in tensor_names(router)]


@pytest.mark.parametrize("kind", [LayerRouter, Extended])
def test_same_logits_and_gradients(kind):
    router = randomised(kind(8))
    live, tensors = LiveLogits(kind(8), POOLING), tensors_of(router)
    expected, got = row_logits(router, *picked_tokens(), POOLING), live(*picked_tokens(), *tensors)
    assert torch.equal(got, expected)
    parameters = list(router.parameters())
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), parameters),
        torch.autograd.grad(expected.sin().sum(), parameters),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_it_owns_nothing():
    live = LiveLogits(Extended(8), POOLING)
    assert not [*live.parameters(), *live.buffers(), *live.children()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decides_as_inference_does(dtype):
    router = randomised(LayerRouter(8))
    picked, weight = picked_tokens(dtype)
    with torch.no_grad():  # centred, so that the rows differ
        middle = (row_logits(router, picked, weight, POOLING) @ torch.tensor([1.0, -1.0])).median()
        router.head[-1].bias.add_(torch.tensor([0.0, 1.0]) * middle)
    parameters = [p.detach() for p in router.parameters()]
    inferred = torch.ops.flux.route_rows(picked, weight, parameters[0::2], parameters[1::2])
    assert torch.equal(full_attention_rows(row_logits(router, picked, weight, POOLING)), inferred)
    assert inferred.unique().numel() == 2
