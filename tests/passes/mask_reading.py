"""What the tests of mask recovery share: masks as models write them, and a way to read them."""

import torch
from torch import fx
from torch.nn import functional

from fluxcompile.passes.graph_util import hint
from fluxcompile.passes.plan import Policy
from fluxcompile.passes.site import CausalMask

from .graphs import record

B, S = 2, 10
LOWEST = torch.finfo(torch.float32).min


def places(queries, keys, start=0):
    """Query and key indices ``[Sq, 1]`` and ``[1, Skv]``; query 0 is at key ``start``."""
    return torch.arange(queries)[:, None] + start, torch.arange(keys)[None, :]


def causal(q, k, start=0):
    i, j = places(q.shape[2], k.shape[2], start)
    return (j <= i)[None, None]


def sdpa(q, k, v, mask):
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def read(attend, *operands, dynamic=False, policy=Policy.FULL):
    """The one site, after checking its mask against the real one, and the rewrite's numbers."""
    recorded = record(attend, *operands, dynamic=dynamic)
    (site,) = recorded.sites()
    if isinstance(site.mask, CausalMask) and site.attn_mask is not None:
        check_expression(recorded, site)
    result = recorded.rewrite(policy)
    if policy is Policy.FULL:
        recorded.check(result)
    return result.sites[0]


class _Values(fx.Interpreter):
    """Runs a graph and keeps what every node gave, as it was before later changes in place."""

    def __init__(self, gm):
        super().__init__(gm, garbage_collect_values=False)

        self.seen = {}

    def run_node(self, n):
        value = super().run_node(n)
        self.seen[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def check_expression(recorded, site):
    """The recovered mask equals the real one at every position."""
    gm = site.output.graph.owning_module
    values = _Values(gm)
    inputs = [x.clone() if isinstance(x, torch.Tensor) else hint(x) for x in recorded.inputs]
    with torch.no_grad():
        values.run(*inputs)
    batch, _, queries, keys = (*map(hint, site.q_shape[:3]), hint(site.k_shape[2]))
    mask, symbols = site.mask, {}
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if isinstance(size, torch.SymInt):
                symbols[size.node.expr] = hint(size)
    symbols |= {symbol: int(values.seen[node]) for symbol, node in mask.scalars}
    offset = keys - queries if mask.offset is None else int(mask.offset.subs(symbols))
    i, j = places(queries, keys, offset)
    expected = (j <= i) & ((j > i - mask.window) if mask.window else True)
    heads = values.seen[site.attn_mask].shape[1] if values.seen[site.attn_mask].dim() == 4 else 1
    expected = expected.expand(batch, heads, queries, keys)
    if mask.valid is not None:
        first = int(mask.valid_offset.subs(symbols))
        valid = values.seen[mask.valid][:, first : first + keys]
        expected = expected & valid[:, None, None, :]
    actual = values.seen[site.attn_mask]
    actual = actual if actual.dtype == torch.bool else actual == 0
    assert torch.equal(actual.expand(batch, heads, queries, keys), expected)


def padding(batch=B, keys=S):
    """Left padding in row 0, right padding and a hole in row 1; every first query keeps a key."""
    valid = torch.ones(batch, keys, dtype=torch.long)
    valid[0, :0] = 0
    valid[-1, keys - 3 :] = 0
    valid[-1, 2] = 0
    return valid


def gathered(q, k, valid, shift=0):
    """Hugging Face's form: ``valid[batch, key]`` read by index tensors."""
    batch = torch.arange(q.shape[0])[:, None, None, None]
    key = (torch.arange(k.shape[2]) + shift)[None, None, None, :]
    return valid[batch, key]
