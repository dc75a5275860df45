"""The rewritten sparse graph against a dense graph under the mask that defines it."""

import pytest
import torch
from torch.nn import functional

from fluxcompile.passes.plan import Policy

from .graphs import CONFIG, record

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
