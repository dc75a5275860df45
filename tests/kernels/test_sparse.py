"""The sparse prefills on a CPU against their definitions."""

import pytest
import torch

from . import cases, sparse_cases

LOW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    "case",
    [*sparse_cases.PREFILL, *sparse_cases.BIG_PREFILL, sparse_cases.SHARED],
    ids=cases.name,
)
def test_equals_definition(case):
    operands = sparse_cases.prefill(case, torch.float32)
    cases.assert_within_bound(operands, operands.run())


@pytest.mark.parametrize("dtype", LOW, ids=cases.name)
@pytest.mark.parametrize("mode", sparse_cases.MODES)
def test_low_precision(mode, dtype):
    (case,) = sparse_cases.named(mode, "mixed-both")
    operands = sparse_cases.prefill(case, dtype)
    cases.assert_within_bound(operands, operands.run())


@pytest.mark.parametrize("mode", sparse_cases.MODES)
def test_double_is_exact(mode):
    for case in sparse_cases.named(mode, "mixed-both", "static-cache-odd"):
        operands = sparse_cases.prefill(case, torch.float64)
        error = (operands.run() - operands.reference(torch.float64)).abs().max()
        assert error < 1e-12


@pytest.mark.parametrize("mode", sparse_cases.MODES)
def test_padded_row_equals_its_unpadded_run(mode):
    (case,) = sparse_cases.named(mode, "mixed-left")
    padded = sparse_cases.prefill(case, torch.float32)
    out = padded.run()
    start = padded.bounds[2, 0].item()
    q, k, v = (x[2:, :, start:] for x in (padded.q, padded.k, padded.v))
    blocks = -(-q.shape[2] // case.block)
    extra = [mask[2:, :, :blocks, :blocks] for mask in padded.extra]
    op = getattr(sparse_cases.ops, f"{mode}_attention")
    torch.testing.assert_close(out[2:, start:], op(q, k, v, *extra, **padded.options))
    assert (out[2:, :start] == 0).all()
