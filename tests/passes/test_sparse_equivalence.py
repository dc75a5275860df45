"""The rewritten sparse graph against a dense graph under the mask that defines it."""

import pytest
import torch
from torch.nn import functional

from fluxcompile.passes.plan import Policy

from .graphs import CONFIG, op_counts, record

BATCH, HEADS, DIM = 2, 4, 8


def definition(valid, queries, start, window):
    """Causal, valid, windowed; and sink or local by rank among the valid keys."""
    batch, keys = valid.shape
    seen = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    for row in range(batch):
        rank = valid[row].long().cumsum(0) - 1
        for query in range(queries):
            place = query + start
            here = int(rank[min(place, keys - 1)])
            for key in range(min(place + 1, keys)):
                near = int(rank[key]) < CONFIG.sink or here - int(rank[key]) < CONFIG.local
                inside = not window or key > place - window
                seen[row, 0, query, key] = bool(valid[row, key]) and near and inside
    return seen


def padding(kind, keys):
    valid = torch.ones(BATCH, keys, dtype=torch.bool)
    if kind == "left":
        valid[1, :3] = False
    elif kind == "right":
        valid[1, keys - 4 :] = False
    elif kind == "holes":
        valid[1, [2, 5, 6]] = False
    elif kind == "empty":
        valid[1] = False
    return valid


PROMPTS = {  # queries, keys, key index of the first query, window
    "prompt": (14, 14, 0, 0),
    "chunk": (6, 14, 8, 0),
    "static-cache": (6, 20, 4, 0),
    "window": (14, 14, 0, 7),
    "narrow-window": (14, 14, 0, 5),
}
#: a ready-made mask is sparse too where it is causal and ends with the last key
CASES = [(name, False) for name in PROMPTS] + [("prompt", True), ("chunk", True)]


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes", "empty"])
@pytest.mark.parametrize(
    ("prompt", "given"), CASES, ids=[f"{n}-{'given' if given else 'read'}" for n, given in CASES]
)
def test_sparse_prefill(prompt, given, kind):
    queries, keys, start, window = PROMPTS[prompt]

    def mask_of(valid):
        i, j = torch.arange(queries)[:, None] + start, torch.arange(keys)
        mask = (j <= i)[None, None] & valid[:, None, None, :]
        return mask & (j > i - window)[None, None] if window else mask

    def attend(q, k, v, mask):
        mask = mask if given else mask_of(mask)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    q = torch.randn(BATCH, HEADS, queries, DIM)
    k, v = (torch.randn(BATCH, HEADS, keys, DIM) for _ in range(2))
    valid = padding(kind, keys)
    recorded = record(attend, q, k, v, mask_of(valid) if given else valid)
    result = recorded.rewrite(Policy.SPARSE)
    (site,) = result.sites
    (got,) = recorded.run(result.gm)
    assert site.became == "streaming"
    seen = definition(valid, queries, start, window)
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    some = seen.any(-1)  # a query without a key has no defined result; ours is zero
    some = some.expand(got.shape[:3])
    torch.testing.assert_close(got[some], expected[some], atol=2e-5, rtol=2e-5)
    assert not got[~some].any()


KEYS = 20  # of a cache that has grown by the step's queries


def step(queries, valid, window=0, given=False):
    """The graph of ``queries`` tokens on a growing cache; what it attends from, to, and may see."""
    start = KEYS - queries

    def mask_of(valid):
        i, j = torch.arange(queries)[:, None] + start, torch.arange(KEYS)
        mask = (j <= i)[None, None] & valid[:, None, None, :]
        return mask & (j > i - window)[None, None] if window else mask

    def attend(past_k, past_v, q, k, v, mask):
        k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        mask = mask if given else mask_of(mask)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), k, v

    past = [torch.randn(BATCH, HEADS, start, DIM) for _ in range(2)]
    new = [torch.randn(BATCH, HEADS, queries, DIM) for _ in range(3)]
    recorded = record(attend, *past, *new, mask_of(valid) if given else valid)
    k, v = (torch.cat(parts, dim=2) for parts in zip(past, new[1:], strict=True))
    return recorded, (new[0], k, v), definition(valid, queries, start, window)


def attention(q, k, v, seen):
    """Attention under ``seen``; zeros where a query sees no key."""
    some = seen.any(-1, keepdim=True)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen | ~some)
    return out.where(some, 0.0)


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes", "empty"])
@pytest.mark.parametrize("window", [0, 7, 5])
@pytest.mark.parametrize("queries", [1, 3, 8])
def test_sparse_decode(queries, window, kind):
    recorded, qkv, seen = step(queries, padding(kind, KEYS), window)
    result = recorded.rewrite(Policy.SPARSE)
    (site,) = result.sites
    assert site.became == "streaming decode"
    got = recorded.run(result.gm)[0]
    torch.testing.assert_close(got, attention(*qkv, seen), atol=2e-5, rtol=2e-5)


def test_routes_of_a_step_are_read_on_the_device():
    """Three tokens of two rows, one dense and one sparse, and the other way round."""
    valid = padding("left", KEYS)
    recorded, qkv, sparse = step(3, valid)
    dense = valid[:, None, None, :] & (torch.arange(KEYS) < torch.arange(18, 21)[:, None])
    result = recorded.rewrite(Policy.ROUTER)
    assert result.sites[0].became == "decode by device-side route"
    assert not {"cond", "route_rows.default"} & set(op_counts(result.gm))
    for full in ([True, False], [False, True]):
        routes = torch.tensor(full)
        got = result.gm(*recorded.inputs, routes[:, None])[0]
        expected = attention(*qkv, dense.where(routes[:, None, None, None], sparse))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("queries", "given"), [(9, False), (3, True)], ids=["too many", "mask read at run time"]
)
def test_a_chunk_that_is_no_decode_step(queries, given):
    recorded, qkv, seen = step(queries, padding("left", KEYS), given=given)
    result = recorded.rewrite(Policy.SPARSE)
    assert result.sites[0].became == "streaming"
    got = recorded.run(result.gm)[0]
    torch.testing.assert_close(got, attention(*qkv, seen), atol=2e-5, rtol=2e-5)
