"""Sharded matrices against whole ones, in a single process; test_processes.py has two."""

import pytest
import torch
from torch import nn

from fluxcompile.errors import TrainingError
from fluxcompile.training import sharding
from fluxcompile.training.peer_memory import Neighbours
from fluxcompile.training.sharding import ShardedLinear, sharded
from tests.training.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [False, True])
def test_sharded_linear_is_the_linear_it_replaces(bias):
    original = nn.Linear(5, 7, bias=bias).requires_grad_(False)
    layer = ShardedLinear(original, Neighbours((0,), 0), CPU)
    x = torch.randn(2, 3, 5, requires_grad=True)
    other = x.detach().clone().requires_grad_(True)
    weight = torch.randn(2, 3, 7)
    (layer(x) * weight).sum().backward()
    (original(other) * weight).sum().backward()
    torch.testing.assert_close(layer(x), original(x))
    torch.testing.assert_close(x.grad, other.grad)
    torch.library.opcheck(
        torch.ops.flux_training.sharded_linear, (x, layer.weight, layer.key, 7, False)
    )
    layer.release()


def test_pieces_of_uneven_size_make_the_whole():
    whole = torch.arange(15.0)
    pieces = [whole[:8], torch.cat([whole[8:], torch.zeros(1)])]
    weight = sharding._Weight(pieces, torch.Size([3, 5]))
    assert torch.equal(weight.whole(CPU), whole.view(3, 5))


def test_a_model_gets_its_modules_back():
    model = tiny_model().requires_grad_(False)
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    ids = torch.randint(3, 61, (1, 12))
    expected = model(ids).logits
    with sharded(model, model.model, CPU):
        assert sum(isinstance(module, ShardedLinear) for module in model.modules()) == 14
        torch.testing.assert_close(model(ids).logits, expected)
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before
    assert sharding._weights == {}
    with pytest.raises(TrainingError, match="shard_backbone"), sharded(model, nn.Linear(2, 2), CPU):
        pass
