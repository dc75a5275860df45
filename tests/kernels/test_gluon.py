"""The Hopper kernels' results, and that their groups of warps never wait for each other in vain."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from fluxcompile.kernels.block_sparse import reference

from . import cases, gluon_on_cpu, sparse_cases
from .test_hopper import SERVED, assert_right, served

STREAMING = tuple(f"streaming.{name}" for name in ("hopper_tiles", "hopper"))
_NAMES = (
    *STREAMING,
    *(f"block_sparse.{name}" for name in ("flow", "long", "short", "hopper")),
)
NARROW_AND_WIDE = pytest.mark.parametrize("head_dim", [64, 128])
ORDERS = pytest.mark.parametrize("seed", range(4))


@pytest.fixture
def kernels():
    """Modules by the last two words of their names, run by `gluon_on_cpu`."""
    names = [f"fluxcompile.kernels.{name}" for name in _NAMES]
    return dict(zip(_NAMES, gluon_on_cpu.load(*names), strict=True))


def check(kernels, case, dtype=torch.float16, seed=0, **options):
    with gluon_on_cpu.order(seed):
        assert_right(kernels["streaming.hopper"], cases.prefill(case, dtype), **options)


@NARROW_AND_WIDE
@pytest.mark.parametrize("case", SERVED, ids=cases.name)
def test_equals_definition(kernels, case, head_dim):
    check(kernels, cases.at(case, head_dim=head_dim))


@ORDERS
@NARROW_AND_WIDE
@pytest.mark.parametrize("ahead", [False, True])
def test_any_order(kernels, head_dim, ahead, seed):
    for name in ("mixed-none", "full-left", "static-cache-mixed"):
        case = cases.at(cases.named(name), head_dim=head_dim)
        check(kernels, case, torch.bfloat16, seed, ahead=ahead)


@NARROW_AND_WIDE
@pytest.mark.parametrize("case", filter(served, sparse_cases.named("triangle")), ids=cases.name)
def test_dense_last_queries(kernels, case, head_dim):
    """Of a triangle: streaming, but for the last queries of each row's valid keys."""
    x = sparse_cases.prefill(replace(case, head_dim=head_dim), torch.float16)
    assert_right(kernels["streaming.hopper"], x, last=case.last)


def lists_of(q, k, block_mask, bounds, q_start, route, *, block, window):
    """What `block_lists` gives, from what a query block sees: full blocks first, partial last."""
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    mask = block_mask.expand(batch, -1, -1, -1)
    rows, key_blocks = mask.shape[:3], mask.shape[3]
    lists = torch.full(mask.shape, -1, dtype=torch.int16)
    counts = torch.zeros(2 * rows.numel() + 1, dtype=torch.int32)[:-1].view(*rows, 2)
    first = keys - queries if q_start is None else int(q_start)
    for row in torch.cartesian_prod(*map(torch.arange, rows)).tolist():
        start, end = (0, keys) if bounds is None else bounds[row[0]].tolist()
        dense = route is not None and bool(route[row[0]])
        low = max(first, start) + row[2] * block
        position = torch.arange(low, min(low + block, first + queries))[:, None]
        for j in range(key_blocks):
            key = start + j * block + torch.arange(block)
            seen = (key <= position) & (key < end)
            if window:
                seen &= key > position - window
            if seen.any() and (dense or mask[(*row, j)]):
                full = int(seen.all())
                count = counts[(*row, 1 - full)]
                lists[(*row, int(count) if full else key_blocks - 1 - int(count))] = j
                count += 1
    return lists, counts


SPARSE = tuple(
    replace(case, block=128)
    for case in sparse_cases.named("block_sparse")
    + sparse_cases.named("block_sparse", "1000", "mixed-1000")
    if served(case)
)


@NARROW_AND_WIDE
@pytest.mark.parametrize("rows", ["short", "long"])
@pytest.mark.parametrize("case", SPARSE, ids=cases.name)
def test_block_sparse_equals_definition(kernels, monkeypatch, case, rows, head_dim):
    x = sparse_cases.prefill(replace(case, head_dim=head_dim), torch.float16)
    monkeypatch.setattr(kernels["block_sparse.hopper"], "block_lists", lists_of)
    out = kernels["block_sparse.hopper"].attention(
        x.q, x.k, x.v, x.block_mask, x.needed_bounds, x.q_start, x.route,
        window=case.window, scale=x.scale, launch=kernels[f"block_sparse.{rows}"].launch,
    )  # fmt: skip
    cases.assert_within_bound(x, out)


@ORDERS
@NARROW_AND_WIDE
def test_block_sparse_in_any_order(kernels, monkeypatch, head_dim, seed):
    """Many tiles a program, with empty, short and full lists."""
    torch.manual_seed(seed)
    q = torch.randn(1, 1000, 4, head_dim).half().transpose(1, 2)
    k, v = torch.randn(2, 1, 2, 1000, head_dim).half()
    mask = torch.rand(1, 4, 8, 8) < torch.linspace(0, 1, 8)[:, None]
    options = {"scale": head_dim**-0.5, "window": 0}
    exact = reference.attention(q, k, v, mask, block=128, **options)
    monkeypatch.setattr(kernels["block_sparse.hopper"], "block_lists", lists_of)
    for rows in ("short", "long"):

        def launch(operands, blocks, sizes, constants, sms, rows=rows):
            kernels[f"block_sparse.{rows}"].launch(operands, blocks, sizes, constants, 3)

        with gluon_on_cpu.order(seed):
            out = kernels["block_sparse.hopper"].attention(
                q, k, v, mask, None, None, None, **options, launch=launch
            )
        torch.testing.assert_close(out.float(), exact, atol=5e-3, rtol=5e-3, msg=rows)


def test_what_waits_in_vain_is_found(kernels, monkeypatch):
    """A block's place that is never given back."""
    hopper = kernels["streaming.hopper"]
    monkeypatch.setattr(hopper.mbarrier, "arrive", lambda *_, **__: None)
    with pytest.raises(gluon_on_cpu.Deadlock, match=r"program \(0,\): 3 groups wait"):
        check(kernels, cases.named("full-300"))


def test_what_is_overwritten_too_early_is_found(kernels, monkeypatch):
    """A block's values that are given back before they have been used."""
    hopper = kernels["streaming.hopper"]

    def hasty(problem, channels, n_read, values, b_read):
        hopper.mbarrier.arrive(channels.v_free.index(n_read % problem.STAGES), count=1)
        gluon_on_cpu.pause()
        return hopper.warpgroup_mma_wait(0, deps=[values, b_read])[0]

    monkeypatch.setattr(hopper, "_values_done", hasty)
    case = cases.at(cases.named("full-1000"), head_dim=128, batch=1)

    def try_orders():
        for seed in range(20):
            check(kernels, case, seed=seed)

    with pytest.raises(AssertionError, match="full-1000"):
        try_orders()
