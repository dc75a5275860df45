"""``flux::project_row``: its definition, what it refuses, and the kernel on a GPU."""

import pytest
import torch
from torch.nn import functional

from fluxcompile.errors import KernelError
from fluxcompile.kernels import ops

from . import cases, row_cases


def test_definition():
    x, weights, biases, norm, eps, added, _ = row_cases.operands(
        row_cases.Case(24, (5, 5), bias=True, norm=True, added=True)
    )[:7]
    added = torch.cat([added, added], -1)[..., :10]
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm
    first, second = (functional.linear(normed, w, b) for w, b in zip(weights, biases, strict=True))
    beside = ops.project_row(x, weights, biases, norm, eps, added)
    torch.testing.assert_close(beside, torch.cat([first, second], -1) + added)
    gated = ops.project_row(x, weights, biases, norm, eps, added[..., :5], True)
    torch.testing.assert_close(gated, first.sigmoid() * first * second + added[..., :5])


def replaced(**changes):
    names = ("x", "weights", "biases", "norm", "eps", "added", "gated")
    given = dict(zip(names, row_cases.operands(row_cases.Case(24, (5, 5))), strict=True))
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 1, 24)}, "one row"),
        ({"x": torch.zeros(1, 24, dtype=torch.float64)}, "one row"),
        ({"weights": []}, "1 to 3"),
        ({"weights": [torch.zeros(5, 24)], "gated": True}, "two when gated"),
        ({"weights": [torch.zeros(5, 24), torch.zeros(4, 24)], "gated": True}, r"weights\[1\]"),
        ({"weights": [torch.zeros(5, 23)]}, r"weights\[0\]"),
        ({"biases": [torch.zeros(5)]}, "none or 2"),
        ({"biases": [torch.zeros(5), torch.zeros(6)]}, r"biases\[1\]"),
        ({"norm": torch.zeros(23)}, "norm"),
        ({"added": torch.zeros(1, 1, 5)}, "added"),
        ({"weights": [torch.zeros(5, 24, dtype=torch.float16)]}, r"weights\[0\]"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(KernelError, match=message):
        ops.project_row(**replaced(**changes))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=cases.name)
@pytest.mark.parametrize("case", row_cases.SMALL + row_cases.LARGE, ids=str)
def test_kernel(case, dtype):
    row_cases.check(ops.project_row, row_cases.operands(case, dtype, "cuda"))


@pytest.mark.gpu
def test_kernel_waits_for_its_token():
    """Behind kernels that it may overlap, many times over."""
    case = row_cases.Case(4096, (4096,), norm=True, added=True)
    x, *rest = row_cases.operands(case, torch.bfloat16, "cuda")
    expected = x
    for _ in range(40):
        expected = ops.project_row(expected, *rest)
        torch.cuda.synchronize()
    for _ in range(20):
        got = x
        for _ in range(40):
            got = ops.project_row(got, *rest)
        assert torch.equal(got, expected)
