"""``flux::project_rows``: its definition, what it refuses, and the kernel on a GPU."""

import pytest
import torch
from torch.nn import functional

from fluxcompile.errors import KernelError
from fluxcompile.kernels import ops

from . import cases, row_cases


@pytest.mark.parametrize("tokens", [1, 3])
def test_definition(tokens):
    case = row_cases.Case(24, (5, 4), bias=True, norm=True, tokens=tokens)
    dtype = torch.float32 if tokens == 1 else torch.float16
    x, weights, biases, norm, eps, *_ = row_cases.operands(case, dtype)
    normed = functional.rms_norm(x, norm.shape, norm, eps)
    first, second = (functional.linear(normed, w, b) for w, b in zip(weights, biases, strict=True))
    both = ops.project_rows(x, weights, biases, norm, eps)
    assert torch.equal(both[: first.numel()].view(first.shape), first)
    assert torch.equal(both[first.numel() :].view(second.shape), second)
    one = ops.project_rows(x, weights[:1], biases[:1], norm, eps, first)
    assert torch.equal(one, first + first)
    gated = ops.project_rows(x, [weights[0]] * 2, [biases[0]] * 2, norm, eps, first, True)
    assert torch.equal(gated, first + functional.silu(first) * first)


def replaced(**changes):
    names = ("x", "weights", "biases", "norm", "eps", "added", "gated")
    given = dict(zip(names, row_cases.operands(row_cases.Case(24, (5, 5))), strict=True))
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 24, dtype=torch.float64)}, "bf16, fp16 or fp32"),
        ({"x": torch.zeros(())}, "bf16, fp16 or fp32"),
        ({"weights": []}, "1 to 3"),
        ({"weights": [torch.zeros(5, 24)], "gated": True}, "two when gated"),
        ({"weights": [torch.zeros(5, 24), torch.zeros(4, 24)], "gated": True}, r"weights\[1\]"),
        ({"weights": [torch.zeros(5, 23)]}, r"weights\[0\]"),
        ({"biases": [torch.zeros(5)]}, "none or 2"),
        ({"biases": [torch.zeros(5), torch.zeros(6)]}, r"biases\[1\]"),
        ({"norm": torch.zeros(23)}, "norm"),
        ({"added": torch.zeros(1, 1, 10)}, "one, or two gated"),
        ({"added": torch.zeros(1, 1, 6), "gated": True}, "added"),
        ({"weights": [torch.zeros(5, 24, dtype=torch.float16)]}, r"weights\[0\]"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(KernelError, match=message):
        ops.project_rows(**replaced(**changes))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=cases.name)
@pytest.mark.parametrize("case", row_cases.SMALL + row_cases.LARGE, ids=str)
def test_kernel(case, dtype):
    row_cases.check(ops.project_rows, row_cases.operands(case, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.name)
@pytest.mark.parametrize("case", row_cases.FEW + row_cases.LARGE_FEW, ids=str)
def test_kernel_of_few_rows(case, dtype):
    row_cases.check(ops.project_rows, row_cases.operands(case, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "dtype"), [(0, "bfloat16"), (17, "bfloat16"), (2, "float32")])
def test_other_numbers_of_rows(tokens, dtype):
    case = row_cases.Case(64, (48, 32), bias=True, norm=True, tokens=tokens)
    x = row_cases.operands(case, getattr(torch, dtype), "cuda")
    torch.testing.assert_close(ops.project_rows(*x), row_cases.definition(*x))


@pytest.mark.gpu
def test_kernel_waits_for_its_token():
    """Behind kernels that it may overlap, many times over."""
    case = row_cases.Case(4096, (4096,), norm=True, added=True)
    x, *rest = row_cases.operands(case, torch.bfloat16, "cuda")
    expected = x
    for _ in range(40):
        expected = ops.project_rows(expected, *rest)
        torch.cuda.synchronize()
    for _ in range(20):
        got = x
        for _ in range(40):
            got = ops.project_rows(got, *rest)
        assert torch.equal(got, expected)
