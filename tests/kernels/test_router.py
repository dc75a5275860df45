"""``flux::route_rows`` against the router module itself."""

import pytest
import torch

from fluxcompile.errors import KernelError
from fluxcompile.kernels import ops

from . import cases, router_cases

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
@pytest.mark.parametrize("width", [16, 64, 96, 128, 256])
def test_decides_as_the_module(width, dtype, device):
    x = router_cases.operands(16, 3, 200, width, dtype, device)
    route = router_cases.check(ops.route_rows, x)
    assert route.any()
    assert not route.all(), "both decisions must occur"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 32, 200, 128), (2, 1, 1, 64), (1, 9, 7, 64)], ids=str)
def test_shapes(shape, device):
    router_cases.check(ops.route_rows, router_cases.operands(*shape, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_not_a_number_means_full_attention(device):
    picked, weight, matrices, biases = router_cases.operands(device=device)
    picked[1, 0, 0, 0] = float("nan")
    biases[-1].copy_(torch.tensor([100.0, 0.0]))  # otherwise sparse
    route = ops.route_rows(picked, weight, matrices, biases)
    assert route.tolist() == [False, True, False, False]


@pytest.mark.parametrize("device", DEVICES)
def test_equal_logits_mean_sparse(device):
    picked, weight, matrices, biases = router_cases.operands(device=device)
    matrices[-1].zero_()
    biases[-1].zero_()
    assert not ops.route_rows(picked, weight, matrices, biases).any()


@pytest.mark.parametrize("device", DEVICES)
def test_strides_of_the_model(device):
    """Tokens first in memory, as a projection leaves them."""
    picked, *rest = router_cases.operands(device=device)
    tokens_first = picked.transpose(1, 2).contiguous().transpose(1, 2)
    router_cases.check(ops.route_rows, (tokens_first, *rest))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(6, 48, 16), (2, 8192, 128), (7, 1152, 64)], ids=str)
def test_features(shape, device):
    x = router_cases.feature_operands(*shape, device=device)
    route = router_cases.check(ops.route_features, x)
    assert 0 < route.sum() < len(route), "both decisions must occur"


@pytest.mark.parametrize("device", DEVICES)
def test_a_feature_that_is_no_number_means_full_attention(device):
    features, matrices, biases = router_cases.feature_operands(device=device)
    features[1, 5] = float("nan")
    biases[-1].copy_(torch.tensor([1e6, 0.0]))
    assert ops.route_features(features, matrices, biases).tolist() == [False, True] + 4 * [False]


def test_refuses_features():
    features, matrices, biases = router_cases.feature_operands()
    with pytest.raises(KernelError, match=r"features: expected float32 \[B, F\].*\[48\]"):
        ops.route_features(features[0], matrices, biases)
    with pytest.raises(KernelError, match=r"encoder\.0\.weight.*\[128, 47\].*\[128, 48\]"):
        ops.route_features(features[:, 1:], matrices, biases)
    with pytest.raises(KernelError, match=r"layers.*5.*0 and 5"):
        ops.route_features(features, [], biases)


def test_refuses():
    picked, weight, matrices, biases = router_cases.operands()
    with pytest.raises(KernelError, match=r"picked tokens.*expected \[B, H, T, D\]"):
        ops.route_rows(picked[0], weight, matrices, biases)
    with pytest.raises(KernelError, match=r"token_weight.*\[4, 20\].*\[4, 19\]"):
        ops.route_rows(picked, weight[:, 1:], matrices, biases)
    with pytest.raises(KernelError, match=r"encoder\.2\.weight.*\[32, 128\].*\[128, 32\]"):
        ops.route_rows(picked, weight, [matrices[0], matrices[1].T, *matrices[2:]], biases)
    with pytest.raises(KernelError, match=r"head\.4\.bias.*float32.*float64"):
        ops.route_rows(picked, weight, matrices, [*biases[:-1], biases[-1].double()])
    with pytest.raises(KernelError, match=r"layers.*5.*4 and 5"):
        ops.route_rows(picked, weight, matrices[:-1], biases)


@pytest.mark.gpu
def test_never_synchronises():
    x = router_cases.operands(device="cuda")
    ops.route_rows(*x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.route_rows(*x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
