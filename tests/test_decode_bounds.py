"""Key ranges of a decode step against an oracle that counts tokens one by one."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fluxcompile.kernels import ops
from fluxcompile.kernels.decode.bounds import decode_bounds


def oracle(valid, query, dropped, sink, local, window, sparse):
    """The keys one row attends to; ``valid`` one bool a slot, ``query`` the query's slot."""
    seen = [slot for slot, live in enumerate(valid) if live and slot <= query]
    keys = []
    for rank, slot in enumerate(seen):
        if window and slot <= query - window:
            continue
        near = len(seen) - 1 - rank < local
        if not sparse or near or rank + dropped < sink:
            keys.append(slot)
    return keys


def attended(bounds, valid, dense):
    """The keys that ``flux::decode_attention`` reads for one row, by its own definition."""
    low, sink_end, local_start, end = bounds
    return [
        slot
        for slot, live in enumerate(valid)
        if live
        and low <= slot
        and (slot < end if dense else slot < sink_end or local_start <= slot < end)
    ]


def check(rows, query, *, queries=1, dropped=None, given_valid=True, **pattern):
    """Compare all queries of all rows, read densely and sparsely; ``query`` is the first's slot."""
    valid = torch.tensor(rows)
    key = torch.empty(len(rows), 1, len(rows[0]), 4)
    bounds = decode_bounds(
        key,
        valid if given_valid else None,
        None if query is None else torch.tensor([query], dtype=torch.int32),
        None if dropped is None else torch.tensor(dropped),
        queries=queries,
        **pattern,
    )
    assert bounds.dtype == torch.int32
    assert bounds.shape == (len(rows), queries, 4)
    assert bounds.is_contiguous()
    first = len(rows[0]) - queries if query is None else query
    gone = dropped or [0] * len(rows)
    for row, of_queries, missing in zip(rows, bounds.tolist(), gone, strict=True):
        for at, limits in enumerate(of_queries, start=first):
            valid = row if given_valid else [slot <= at for slot in range(len(row))]
            sparse = oracle(valid, at, missing, **pattern)
            dense = oracle(valid, at, missing, **pattern | {"sparse": False})
            assert attended(limits, valid, dense=False) == sparse
            assert attended(limits, valid, dense=True) == dense


@st.composite
def steps(draw):
    capacity = draw(st.integers(1, 24))
    row = st.lists(st.booleans(), min_size=capacity, max_size=capacity)
    rows = draw(st.lists(row, min_size=1, max_size=3))
    window = draw(st.sampled_from([0, 0, 1, 3, 9, 40]))
    dropped = None
    if window and draw(st.booleans()):
        dropped = draw(st.lists(st.integers(0, 12), min_size=len(rows), max_size=len(rows)))
    queries = draw(st.integers(1, min(capacity, 8)))
    return {
        "rows": rows,
        "queries": queries,
        "query": draw(st.one_of(st.none(), st.integers(0, capacity - queries))),
        "dropped": dropped,
        "sink": draw(st.integers(1, 8)),
        "local": draw(st.integers(1, 10)),
        "window": window,
        "sparse": draw(st.booleans()),
    }


@settings(max_examples=300, deadline=None, derandomize=True)
@given(steps())
@example(
    {  # a mask that is true beyond the query, with fewer valid keys than sinks
        "rows": [[True] * 8],
        "queries": 1,
        "query": 2,
        "dropped": None,
        "sink": 5,
        "local": 2,
        "window": 0,
        "sparse": True,
    }
)
def test_random_validity(case):
    check(**case)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(steps())
def test_every_key_valid(case):
    """Without validity every key up to a query counts."""
    check(**case | {"given_valid": False, "dropped": None})


@pytest.mark.parametrize("query", [None, 9])
@pytest.mark.parametrize("reach", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("padding", ["none", "left", "right", "hole"])
def test_around_the_boundary(padding, reach, query):
    """Sink and local meet, touch and leave a gap; padding moves the boundary with it."""
    row = [True] * 12
    if query is not None:
        row[10:] = [False] * 2
    for slot in {"none": (), "left": (0, 1), "right": (8, 9), "hole": (4,)}[padding]:
        row[slot] = False
    live = sum(row)
    pattern = {"sink": 3, "local": live + reach - 3, "window": 0, "sparse": True}
    check([row, row[::-1] if query is None else row], query, **pattern)


def test_a_row_without_a_key():
    check([[False] * 6, [True] * 6], None, sink=2, local=2, window=0, sparse=True)


@pytest.mark.parametrize("dropped", [0, 1, 2, 5])
def test_dropped_tokens_use_up_sinks(dropped):
    rows, pattern = [[True] * 6], {"sink": 2, "local": 3, "window": 6, "sparse": True}
    for queries in (1, 3):
        check(rows, None, queries=queries, dropped=[dropped], **pattern)
        bounds = decode_bounds(
            torch.empty(1, 1, 6, 4),
            torch.tensor(rows),
            None,
            torch.tensor([dropped]),
            queries=queries,
            **pattern,
        )
        assert (bounds[0, :, 1] == max(2 - dropped, 0)).all()


@pytest.mark.parametrize("sparse", [True, False])
def test_the_kernel_reads_just_these(sparse):
    """End to end: a poisoned cache shows any key read beyond the oracle's."""
    generator = torch.Generator().manual_seed(3)
    valid = torch.rand(3, 20, generator=generator) > 0.3
    valid[:, 11] = True
    pattern = {"sink": 3, "local": 4, "window": 0, "sparse": sparse}
    k, v = (torch.full((3, 2, 20, 8), float("nan")) for _ in range(2))
    for row in range(3):
        for slot in oracle(valid[row].tolist(), 11, 0, **pattern):
            k[row, :, slot], v[row, :, slot] = 0.1, 1.0
    bounds = decode_bounds(k, valid, torch.tensor([11], dtype=torch.int32), queries=1, **pattern)
    out = ops.decode_attention(torch.ones(3, 4, 1, 8), k, v, bounds, valid, scale=1.0)
    torch.testing.assert_close(out, torch.ones(3, 1, 4, 8))
