"""The sparse prefills on a CPU against their definitions."""

import pytest
import torch

from fluxcompile.kernels import ops
from fluxcompile.kernels.power.op import block_mask as power_mask
from fluxcompile.kernels.xattention import cpu as xattention_cpu

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


@pytest.mark.parametrize("mode", sparse_cases.MODES)
def test_unreadable_mask_is_applied_as_it_is(mode):
    (case,) = sparse_cases.named(mode, "300")
    x = sparse_cases.prefill(case, torch.float32)
    mask = torch.rand(2, 1, 300, 300) < 0.3
    mask[:, :, 7] = False
    key_valid, bounds, flags = ops.read_mask(mask, torch.zeros(1, dtype=torch.int32))
    route = torch.tensor([True, False])
    op = getattr(ops, f"{mode}_attention")
    out = op(x.q, x.k, x.v, *x.extra, bounds, key_valid, flags, mask, None, route, **x.options)
    full = ops.full_attention(x.q, x.k, x.v, bounds, key_valid, flags, mask, scale=x.scale)
    torch.testing.assert_close(out, full)
    assert (out[:, 7] == 0).all()


def test_only_chosen_blocks_are_gathered(monkeypatch):
    """And only one block of queries at a time."""
    from fluxcompile.kernels.block import attend
    from fluxcompile.kernels.block_sparse import cpu

    sizes = []

    def spy(q, k, v, seen, **options):
        sizes.append((q.shape[2], k.shape[2]))
        return attend(q, k, v, seen, **options)

    monkeypatch.setattr(cpu, "attend", spy)
    x = cases.prefill(cases.named("full-1000"), torch.float32)
    q, k, v = (t[:1] for t in (x.q, x.k, x.v))
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[0, 0, 12, [1, 5]] = True
    ops.block_sparse_attention(q, k, v, mask, block=64, scale=x.scale)
    assert sizes == [(64, 128)]


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


@pytest.mark.parametrize(
    "case",
    [c for c in sparse_cases.named("xattention") if c.padding != "holes"],
    ids=cases.name,
)
def test_xattention_chooses_the_defined_blocks(case, monkeypatch):
    monkeypatch.setattr(xattention_cpu, "_ENTRIES", 1000)  # several slabs of query blocks
    x = sparse_cases.sharpened(sparse_cases.prefill(case, torch.float32))
    options = {name: value for name, value in x.options.items() if name != "softcap"}
    mask = xattention_cpu.block_mask(x.q, x.k, x.bounds, x.q_start, x.route, **options)
    assert torch.equal(mask, sparse_cases.chosen_by_definition(x))


def test_xattention_threshold():
    """Sink and diagonal always; then by mass; the earlier of equals; nothing without mass."""
    mass = torch.tensor([1.0, 2, 4, 2, 0, 1])
    always = torch.tensor([True, False, False, False, False, True])

    def chosen(threshold):
        return xattention_cpu.choose(mass, always, threshold).nonzero().flatten().tolist()

    assert chosen(0.2) == [0, 5]
    assert chosen(0.21) == [0, 2, 5]
    assert chosen(0.61) == [0, 1, 2, 5]
    assert chosen(1.0) == [0, 1, 2, 3, 5]


def test_xattention_finds_a_needle():
    """One far key that the last queries are made for: its block is chosen, the answer is close."""
    x = cases.prefill(
        cases.at(cases.named("full-300"), batch=1, keys=512, queries=512), torch.float32
    )
    q, k, v = x.q.clone(), x.k * 0.1, x.v
    needle = torch.randn(64)
    k[:, :, 160:176] = needle
    q[:, :, 496:] = needle
    options = {"stride": 4, "threshold": 0.5, "block": 16, "scale": x.scale}
    mask = xattention_cpu.block_mask(q, k, None, None, None, window=0, **options)
    assert mask[..., 31, 10].all()
    assert mask[..., 31, :].sum(-1).max() <= 4
    out = ops.xattention_attention(q, k, v, **options)
    full = ops.full_attention(q, k, v, scale=x.scale)
    torch.testing.assert_close(out[:, 496:], full[:, 496:], atol=0.02, rtol=0)


def test_xattention_is_full_for_two_blocks_and_for_all_mass():
    x = cases.prefill(cases.named("full-300"), torch.float32)
    for block, threshold in ((128, 1.0), (16, 1.0)):
        out = ops.xattention_attention(
            x.q, x.k, x.v, stride=16, threshold=threshold, block=block, scale=x.scale
        )
        cases.assert_within_bound(x, out)
    q, k, v = (t[:, :, :250] for t in (x.q, x.k, x.v))
    out = ops.xattention_attention(q, k, v, stride=16, threshold=0.01, block=128, scale=x.scale)
    torch.testing.assert_close(out, ops.full_attention(q, k, v, scale=x.scale))
