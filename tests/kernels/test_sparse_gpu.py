"""The sparse prefills on a real GPU: the operators, every dtype, larger sizes, no host syncs."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from . import cases, sparse_cases, sparse_checks

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(case, dtype):
    x = sparse_cases.prefill(case, dtype, "cuda")
    cases.assert_within_bound(x, x.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
@pytest.mark.parametrize(
    "case",
    [*sparse_cases.PREFILL, *sparse_cases.BIG_PREFILL, sparse_cases.SHARED],
    ids=cases.name,
)
def test_operator(case, dtype):
    run(case, dtype)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
@pytest.mark.parametrize("mode", sparse_cases.MODES)
def test_head_dims(mode, dtype, head_dim):
    for block in (64, 128):
        (case,) = sparse_cases.named(mode, "mixed-1000")
        run(replace(case, head_dim=head_dim, block=block), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
@pytest.mark.parametrize("mode", sparse_cases.MODES)
def test_long_prompt(mode, dtype):
    (case,) = sparse_cases.named(mode, "mixed-left")
    run(
        replace(
            case, queries=5000, keys=5000, head_dim=128, block=128, stride=16, threshold=0.7,
            sink=128, local=1024, last=128,
        ),
        dtype,
    )  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in sparse_cases.named("xattention")
        + sparse_cases.named("xattention", "1000", "mixed-1000")
        if c.padding != "holes"
    ],
    ids=cases.name,
)
def test_xattention_chooses_the_defined_blocks(case):
    for slab in (1 << 26, 3000):
        sparse_checks.check_choice(case, "cuda", slab=slab)


@pytest.mark.parametrize("name", ["mixed-none", "mixed-left", "static-cache"])
@pytest.mark.parametrize("mode", sparse_cases.MODES)
def test_never_synchronises(mode, name):
    (case,) = sparse_cases.named(mode, name)
    x = sparse_cases.prefill(case, torch.bfloat16, "cuda")
    args = (x.q, x.k, x.v, *x.extra, *x.key_mask, x.route)
    op = getattr(sparse_cases.ops, f"{mode}_attention")
    op(*args, **x.options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*args, **x.options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
