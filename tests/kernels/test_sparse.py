"""The sparse prefills on a CPU against their definitions."""

import pytest
import torch

from fluxcompile.kernels import ops
from fluxcompile.kernels.power.op import block_mask as power_mask

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


def test_power_pattern():
    (mask,) = power_mask(torch.zeros(1, dtype=torch.int64), 320, 320, sink=1, local=1, block=16)[0]
    assert [mask[19, j].item() for j in range(20)] == [
        j in (0, 3, 11, 15, 17, 18, 19) for j in range(20)
    ]


def test_power_is_full_within_sink_and_local():
    case = cases.at(cases.named("full-300"), sink=100, local=200)
    x = cases.prefill(case, torch.float32)
    for block in (16, 128):
        out = ops.power_attention(x.q, x.k, x.v, sink=100, local=200, block=block, scale=x.scale)
        cases.assert_within_bound(x, out)


def test_power_sees_all_that_streaming_sees():
    """With keys outside sink and local made invisible, power attention is streaming attention."""
    offset = torch.tensor([0, 7])
    mask = power_mask(offset, 200, 207, sink=24, local=50, block=16)
    query = offset[:, None] + torch.arange(200)
    key = torch.arange(207)
    near = (key < 24) | (query[..., None] - key < 50)
    streaming = near & (key <= query[..., None])
    chosen = mask[:, 0, torch.arange(200) // 16][..., key // 16]
    assert (chosen | ~streaming).all()
