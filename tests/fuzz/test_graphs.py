"""Attention however it is written: rewritten and equal, or left alone and equal."""

import pytest
import torch

from fluxcompile.passes.plan import Policy
from tests.fuzz.attend import Attend
from tests.fuzz.definition import attention, visible
from tests.fuzz.writings import CHANGES, QUIRKS, Writing, writings
from tests.passes.graphs import CONFIG, record

REACH = CONFIG.sink, CONFIG.local
#: of outputs of order one; in low precision, of rounding the scores and the weights
TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2, "float16": 1e-2}


def operands(writing: Writing) -> list:
    """q, k, v as projections leave them, and the valid keys; the first query sees itself."""
    w, dtype = writing, getattr(torch, writing.dtype)
    heads = (w.heads, w.kv_heads, w.kv_heads)
    q, k, v = (torch.randn(w.batch, w.length, n, w.head_dim).to(dtype) for n in heads)
    if w.padding == "none":
        return [q, k, v, None]
    valid = torch.ones(w.batch, w.length, dtype=torch.bool)
    cut = w.length // 3
    if w.padding == "left":
        valid[-1, :cut] = False
    elif w.padding == "right":
        valid[-1, w.length - cut :] = False
    else:
        valid[-1, 1::3] = False
    return [q, k, v, valid]


def expected(writing: Writing, inputs: list, sparse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, S, H * D]`` by definition, and where a query sees something."""
    w, (q, k, v, valid) = writing, inputs
    if valid is None:
        valid = torch.ones(w.batch, w.length, dtype=torch.bool)
    seen = visible(valid, w.length, w.window, REACH if sparse else None)
    softcap = 0.0 if w.product == "sdpa" else w.softcap
    out = attention(*(x.transpose(1, 2) for x in (q, k, v)), seen, w.scale, softcap)
    return out.transpose(1, 2).flatten(2), seen.any(-1)


def assert_close(got: torch.Tensor, wanted: torch.Tensor, some: torch.Tensor, dtype: str) -> None:
    error = (got.double() - wanted)[some].abs().max().item()
    assert error <= TOLERANCE[dtype], f"error {error:.3g}, allowed {TOLERANCE[dtype]}"


def check(writing: Writing) -> str:
    """What became of it, once that is found to be right."""
    inputs = operands(writing)
    if writing.dynamic:  # batch and length, as models have it: heads are written in their code
        for x in inputs[:3] + [x for x in inputs[3:] if x is not None]:
            torch._dynamo.maybe_mark_dynamic(x, (0, 1))
    recorded = record(Attend(writing), *inputs, dynamic=None)
    full, some = expected(writing, inputs, sparse=False)
    known = writing.quirk in ("", "weights-returned", "softmax-by-hand", *CHANGES)
    if known:
        assert_close(recorded.run()[0], full, some, writing.dtype)
    else:
        full = recorded.run()[0].double()
    for policy in (Policy.FULL, Policy.SPARSE):
        result = recorded.rewrite(policy)
        assert len(result.sites) <= 1
        rewritten = bool(result.sites) and result.sites[0].skip is None
        wanted = full
        if policy is Policy.SPARSE and rewritten:
            wanted, some = expected(writing, inputs, sparse=True)
        assert_close(recorded.run(result.gm)[0], wanted, some, writing.dtype)
    if rewritten:
        return "rewritten"
    if not result.sites:
        return "not seen"
    assert result.sites[0].became == "left alone"
    return f"left alone ({result.sites[0].skip.reason.name})"


def test_graphs(campaign):
    campaign.run(check, examples=60, writing=writings())
    assert campaign.share("rewritten") >= 0.9, str(campaign)


def test_changes_in_place(campaign):
    changed = writings().map(lambda w: Writing(**(w.__dict__ | {"quirk": "query-changed"})))
    campaign.run(check, examples=6, writing=changed)


@pytest.mark.parametrize("quirk", QUIRKS)
def test_what_must_be_left_alone(campaign, quirk):
    """The share above is none of wishful reading."""
    base = {"product": "matmul", "scaling": "mul", "scale": 0.5, "softcap": 0.0, "masks": "fill"}
    base |= {"blocked": "lowest", "quirk": quirk, "dropout": "none", "dtype": "float32"}
    odd = writings().map(lambda w: Writing(**(w.__dict__ | base)))
    campaign.run(check, examples=2, writing=odd)
    assert campaign.share("rewritten") == 0
