"""The kernels on a real GPU: every dtype and head dim, larger sizes, graphs, no host syncs."""

import pytest
import torch

pytest.importorskip("triton")

from fluxcompile.kernels import ops

from . import cases, gradient_cases, triton_checks

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 96, 128, 256)
MIXED = cases.named("mixed-both")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
@pytest.mark.parametrize("case", triton_checks.PREFILL + cases.BIG_PREFILL, ids=cases.name)
def test_prefill_kernel(case, dtype):
    triton_checks.check_prefill(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
@pytest.mark.parametrize("case", triton_checks.GRADIENTS + cases.BIG_PREFILL, ids=cases.name)
def test_gradient_kernels(case, dtype):
    triton_checks.check_gradients(case, dtype, "cuda")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
def test_gradients_of_head_dims(dtype, head_dim):
    for name in ("mixed-both", "full-300"):
        case = cases.at(cases.named(name), head_dim=head_dim, queries=1000, keys=1000)
        triton_checks.check_gradients(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
@pytest.mark.parametrize("case", gradient_cases.CASES, ids=cases.name)
def test_gradients_of_operator(case, dtype):
    """Whatever the dispatch picks, through autograd: the kernels, or plain torch for holes."""
    x = cases.prefill(case, dtype, "cuda")
    gradient_cases.assert_within_bound(x, gradient_cases.gradients(x, x.run))


def test_gradients_are_deterministic():
    x = cases.prefill(cases.at(MIXED, queries=1000, keys=1000), torch.bfloat16, "cuda")
    first = gradient_cases.gradients(x, x.run)
    for again in range(3):
        for a, b in zip(first, gradient_cases.gradients(x, x.run), strict=True):
            assert torch.equal(a, b), again


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
@pytest.mark.parametrize("case", cases.DECODE, ids=cases.name)
def test_decode_kernel(case, dtype):
    triton_checks.check_decode(case, dtype, "cuda")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
def test_head_dims(dtype, head_dim):
    case = cases.at(MIXED, head_dim=head_dim, queries=1000, keys=1000)
    triton_checks.check_prefill(case, dtype, "cuda")
    for name in ("mixed", "step-3", "step-full-tile", "step-two-tiles"):
        triton_checks.check_decode(cases.at(cases.named(name), head_dim=head_dim), dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
@pytest.mark.parametrize("case", cases.PREFILL, ids=cases.name)
def test_operator(case, dtype):
    """Whatever the dispatch picks: torch's kernels, ours, or the blockwise path."""
    x = cases.prefill(case, dtype, "cuda")
    cases.assert_within_bound(x, x.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
def test_long_prompt(dtype):
    case = cases.at(
        cases.named("mixed-left"), queries=5000, keys=5000, sink=128, local=2048, head_dim=128
    )
    triton_checks.check_prefill(case, dtype, "cuda")


def test_unreadable_mask():
    x = cases.prefill(cases.named("full-300"), torch.bfloat16, "cuda")
    mask = torch.rand(2, 1, 300, 300, device="cuda") < 0.3
    mask[:, :, 7] = False
    key_valid, bounds, flags = ops.read_mask(mask, torch.zeros(1, dtype=torch.int32, device="cuda"))
    assert flags.device.type == "cpu"
    out = ops.full_attention(x.q, x.k, x.v, bounds, key_valid, flags, mask, scale=x.scale)
    k, v = (t.repeat_interleave(2, dim=1) for t in (x.k, x.v))
    expected = torch.nn.functional.scaled_dot_product_attention(x.q, k, v, mask, scale=x.scale)
    expected = expected.transpose(1, 2).clone()
    expected[:, 7] = 0  # no key: ours is zero, torch's kernels disagree with each other
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_attention_never_synchronises(padding):
    """Only reading a mask may: kernels take bounds, position and route on the device."""
    x = cases.prefill(cases.at(MIXED, padding=padding), torch.bfloat16, "cuda")
    names = "mixed-holes-decode", "step-holes"
    steps = [cases.decode(cases.named(name), torch.bfloat16, "cuda") for name in names]
    for operands in (x, *steps):
        operands.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for operands in (x, *steps):
            operands.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["mixed", "mixed-holes-decode", "step-3", "step-holes"])
def test_captured_decode_follows_routes_and_bounds(name):
    """One CUDA graph serves any route and length that its input tensors hold at replay."""
    x = cases.decode(cases.named(name), torch.bfloat16, "cuda")
    x.k.normal_()  # what no row reads now, some row reads later
    x.v.normal_()
    x.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = x.run()
    for route in ((True, True), (False, False), (False, True)):
        for end in (280, 150):
            x.route.copy_(torch.tensor(route))
            queries = x.q.shape[2]
            ends = end + torch.arange(queries, device="cuda", dtype=torch.int32)
            x.query_bounds[..., 3] = ends
            x.query_bounds[..., 2] = ends - 40
            graph.replay()
            cases.assert_within_bound(x, out)


def test_decode_splits_do_not_change_the_result():
    case = cases.at(cases.named("mixed"), keys=300, head_dim=128)
    steps = cases.at(cases.named("step-8"), heads=16, head_dim=128)
    for splits in (1, 2, 7, 64):
        triton_checks.check_decode(case, torch.bfloat16, "cuda", splits=splits)
        triton_checks.check_decode(steps, torch.bfloat16, "cuda", splits=splits)


def test_new_lengths_do_not_recompile():
    from fluxcompile.kernels.streaming.triton import attention_kernel

    def compiled():
        return sum(len(cache[0]) for cache in attention_kernel.device_caches.values())

    def run(n):
        triton_checks.check_prefill(cases.at(MIXED, queries=n, keys=n), torch.bfloat16, "cuda")

    run(300)
    before = compiled()
    for n in (64, 301, 1000, 1024):
        run(n)
    assert compiled() == before
