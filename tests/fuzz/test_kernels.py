"""The operators' CPU implementations on random operands, against their eager definitions."""

import pytest
import torch
from hypothesis import strategies as st

from fluxcompile.kernels import ops
from fluxcompile.kernels.decode.bounds import decode_bounds
from fluxcompile.kernels.xattention import cpu as xattention_cpu
from tests.kernels import cases, sparse_cases

DTYPES = st.sampled_from([torch.float32] * 3 + [torch.bfloat16, torch.float16])
PADDINGS = st.sampled_from(["none", "left", "right", "both", "empty", "holes"])


@st.composite
def prefills(draw, mode: str = "") -> cases.Case:
    """A prefill of up to 90 keys: the whole prompt, a chunk, or a part of a static cache."""
    keys, batch = draw(st.integers(1, 90)), draw(st.integers(1, 3))
    queries = draw(st.one_of(st.just(keys), st.integers(1, keys)))
    padding, q_start = draw(PADDINGS), None
    if queries < keys and draw(st.booleans()):
        padding, q_start = (
            draw(st.sampled_from(["tail", "holes"])),
            draw(st.integers(0, keys - queries)),
        )
    kv_heads = draw(st.integers(1, 3))
    fields = {
        "queries": queries,
        "keys": keys,
        "batch": batch,
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.integers(1, 4)),
        "head_dim": draw(st.sampled_from([16, 32, 64])),
        "padding": padding,
        "q_start": q_start,
        "window": draw(st.sampled_from([0, 0, 1, 7, 40])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 3.0])),
        "route": draw(st.none() | st.tuples(*[st.booleans()] * batch)),
        "sink": draw(st.integers(0, 12)),
        "local": draw(st.integers(1, 40)),
    }
    if not mode:
        if draw(st.integers(0, 3)) == 0:
            fields |= {"sink": None, "local": None, "route": None}
        return cases.Case("fuzzed", **fields)
    stride = draw(st.sampled_from([4, 8, 16]))
    options = {"last": draw(st.integers(1, 40)), "block": 16, "stride": stride}
    return sparse_cases.SparseCase("fuzzed", mode=mode, **(fields | options))


def check_prefill(case: cases.Case, dtype: torch.dtype) -> str:
    operands = cases.prefill(case, dtype)
    cases.assert_within_bound(operands, operands.run())
    return "full" if case.sink is None else "streaming"


def check_sparse(case: sparse_cases.SparseCase, dtype: torch.dtype) -> str:
    operands = sparse_cases.prefill(case, dtype)
    cases.assert_within_bound(operands, operands.run())
    return case.mode


def check_chosen_blocks(case: sparse_cases.SparseCase) -> str:
    """In fp32 only: elsewhere rounding decides which of two blocks of one mass is taken."""
    x = sparse_cases.sharpened(sparse_cases.prefill(case, torch.float32))
    options = {name: value for name, value in x.options.items() if name != "softcap"}
    found = xattention_cpu.block_mask(x.q, x.k, x.bounds, x.q_start, x.route, **options)
    assert torch.equal(found, sparse_cases.chosen_by_definition(x))
    return "some left out" if not found.all() else "all taken"


def check_decode(case: cases.Case, queries: int, dtype: torch.dtype) -> str:
    """The end of a prefill, in steps of a few tokens."""
    case = cases.at(case, queries=min(queries, case.queries))
    x = cases.prefill(case, dtype)
    sparse = case.sink is not None
    pattern = {"sink": case.sink, "local": case.local} if sparse else {"sink": 0, "local": 1}
    pattern |= {"window": case.window, "sparse": sparse}
    bounds = decode_bounds(x.k, x.key_valid, x.q_start, queries=case.queries, **pattern)
    operands = x.q, x.k, x.v, bounds, x.key_valid, x.route
    out = ops.decode_attention(*operands, scale=x.scale, softcap=case.softcap)
    cases.assert_within_bound(x, out)
    return "decoded"


def test_prefill(campaign):
    campaign.run(check_prefill, examples=120, case=prefills(), dtype=DTYPES)
    assert campaign.seen["full"]
    assert campaign.seen["streaming"]


@pytest.mark.parametrize("mode", ["block_sparse", "power", "triangle"])
def test_sparse_modes(campaign, mode):
    campaign.run(check_sparse, examples=60, case=prefills(mode), dtype=DTYPES)


def test_xattention_blocks(campaign):
    without_holes = prefills("xattention").filter(lambda case: case.padding != "holes")
    campaign.run(check_chosen_blocks, examples=40, case=without_holes)
    assert campaign.seen["some left out"]


def test_decode(campaign):
    queries = st.sampled_from([1, 1, 2, 3, 8])
    campaign.run(check_decode, examples=120, case=prefills(), queries=queries, dtype=DTYPES)
