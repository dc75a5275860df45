"""The attention operators on a CPU against their eager definition."""

import pytest
import torch

from fluxcompile.kernels import ops
from fluxcompile.kernels.decode import reference as decode_reference
from fluxcompile.kernels.decode.bounds import decode_bounds

from . import cases

LOW = (torch.bfloat16, torch.float16)
STEPS = (
    *(f"mixed-{padding}" for padding in ("none", "left", "right", "both", "empty", "holes")),
    *("full-300", "full-left", "full-window", "full-window-left"),
    *("mixed-window-both", "mixed-window-softcap-holes", "mixed-softcap-left"),
    *("static-cache-mixed", "static-cache-start", "static-cache-holes", "local-one", "no-sink"),
)
NO_PATTERN = {"sink": 0, "local": 1}
SELECTED = [cases.named(n) for n in ("full-300", "mixed-both", "mixed-holes")]


@pytest.mark.parametrize("case", cases.PREFILL + cases.BIG_PREFILL, ids=cases.name)
def test_prefill_equals_definition(case):
    operands = cases.prefill(case, torch.float32)
    cases.assert_within_bound(operands, operands.run())


@pytest.mark.parametrize("dtype", LOW, ids=cases.name)
@pytest.mark.parametrize("case", SELECTED, ids=cases.name)
def test_prefill_low_precision(case, dtype):
    operands = cases.prefill(case, dtype)
    cases.assert_within_bound(operands, operands.run())


@pytest.mark.parametrize("case", SELECTED, ids=cases.name)
def test_prefill_double_is_exact(case):
    operands = cases.prefill(case, torch.float64)
    error = (operands.run() - operands.reference(torch.float64)).abs().max()
    assert error < 1e-12


@pytest.mark.parametrize("case", cases.DECODE, ids=cases.name)
def test_decode_equals_definition(case):
    operands = cases.decode(case, torch.float32)
    cases.assert_within_bound(operands, operands.run())


@pytest.mark.parametrize("dtype", LOW, ids=cases.name)
@pytest.mark.parametrize("name", ["mixed", "step-3"])
def test_decode_low_precision(name, dtype):
    operands = cases.decode(cases.named(name), dtype)
    cases.assert_within_bound(operands, operands.run())


@pytest.mark.parametrize("queries", [1, 2, 3, 8])
@pytest.mark.parametrize("name", STEPS)
def test_a_decode_step_is_the_end_of_a_prefill(name, queries):
    """The prefill's definition knows masks, not ranges: both sides of a decode step against it."""
    case = cases.at(cases.named(name), queries=queries)
    x = cases.prefill(case, torch.float32)
    pattern = {"window": case.window, "sparse": case.sink is not None}
    pattern |= {"sink": case.sink, "local": case.local} if case.sink is not None else NO_PATTERN
    bounds = decode_bounds(x.k, x.key_valid, x.q_start, queries=queries, **pattern)
    operands = x.q, x.k, x.v, bounds, x.key_valid, x.route
    options = {"scale": x.scale, "softcap": case.softcap}
    cases.assert_within_bound(x, ops.decode_attention(*operands, **options))
    by_ranges = decode_reference.attention(*operands, **options)
    torch.testing.assert_close(by_ranges, x.reference(torch.float32))


def test_decode_of_one_query_at_a_time_is_the_same():
    x = cases.decode(cases.named("step-holes"), torch.float32)
    q, k, v, bounds, *rest = x.operands
    alone = [
        ops.decode_attention(q[:, :, i : i + 1], k, v, bounds[:, i : i + 1], *rest, **x.options)
        for i in range(3)
    ]
    torch.testing.assert_close(x.run(), torch.cat(alone, dim=1), atol=0, rtol=0)


@pytest.mark.parametrize("head_dim", [32, 96, 128, 256])
def test_head_dims(head_dim):
    case = cases.at(cases.named("streaming-300"), head_dim=head_dim)
    operands = cases.prefill(case, torch.float32)
    cases.assert_within_bound(operands, operands.run())


@pytest.mark.parametrize("padding", ["left", "empty", "holes"])
def test_queries_without_keys_give_zeros(padding):
    case = cases.named(f"mixed-{padding}")
    operands = cases.prefill(case, torch.float32)
    out = operands.run()
    no_key_yet = operands.key_valid.cumsum(-1) == 0
    assert no_key_yet.any()
    assert (out[no_key_yet] == 0).all()


def test_streaming_is_full_within_sink_and_local():
    case = cases.at(cases.named("full-300"), sink=100, local=200)
    operands = cases.prefill(case, torch.float32)
    full = ops.full_attention(operands.q, operands.k, operands.v, scale=operands.scale)
    torch.testing.assert_close(operands.run(), full)


def test_padded_row_equals_its_unpadded_run():
    operands = cases.prefill(cases.named("mixed-left"), torch.float32)
    out = operands.run()
    start = operands.bounds[2, 0].item()
    alone = ops.streaming_attention(
        *(x[2:, :, start:] for x in (operands.q, operands.k, operands.v)),
        sink=operands.case.sink, local=operands.case.local, scale=operands.scale,
    )  # fmt: skip
    torch.testing.assert_close(out[2:, start:], alone)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("op", ["full", "streaming"])
def test_unreadable_mask_is_applied_as_it_is(op, rows):
    operands = cases.prefill(cases.named("full-300"), torch.float32)
    q, k, v = operands.q, operands.k, operands.v
    mask = torch.rand(rows, 1, 300, 300) < 0.3
    mask[:, :, 7] = False
    q_start = torch.zeros(1, dtype=torch.int32)
    read = [x.expand(2, *x.shape[1:]).contiguous() for x in ops.read_mask(mask, q_start)[:2]]
    key_valid, bounds = read
    flags = ops.read_mask(mask, q_start)[2]
    assert flags.tolist()[0] is False
    key_mask = bounds, key_valid, flags, mask
    if op == "full":
        out = ops.full_attention(q, k, v, *key_mask, scale=0.125)
    else:
        out = ops.streaming_attention(q, k, v, *key_mask, sink=1, local=1, scale=0.125)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.125)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert (out[:, 7] == 0).all()


def test_no_quadratic_buffer(monkeypatch):
    """Masks are built for a block of queries at a time, in every path."""
    from fluxcompile.kernels import block, blockwise
    from fluxcompile.kernels.streaming import cpu

    sizes = []

    def spy(q, k, v, seen, **options):
        sizes.append(q.shape[2])
        return block.attend(q, k, v, seen, **options)

    monkeypatch.setattr(blockwise, "attend", spy)
    monkeypatch.setattr(cpu, "attend", spy)
    for name in ("mixed-none", "mixed-holes", "full-window"):
        cases.prefill(cases.at(cases.named(name), queries=1000, keys=1000), torch.float32).run()
    assert max(sizes) <= 256
