"""A prompt whose last logits are read: what its last layer computes for one token, and what not."""

import pytest
import torch
from torch.nn import functional

from fluxcompile.config import FluxConfig
from fluxcompile.passes import branch_attention
from fluxcompile.passes.emit import UnknownSize
from fluxcompile.passes.graph_util import as_expr, op_name, value_of
from fluxcompile.passes.last_token import NOTE
from fluxcompile.passes.plan import Policy
from fluxcompile.passes.site import GivenMask

from . import hugging_face as hf
from .graphs import CONFIG, SDPA, Layer, Stack, eager_softmax, hidden, record

LONG = FluxConfig(sink=128, local=2048)


def noted(result):
    return [NOTE in site.notes for site in result.sites]


def same(recorded, result):
    """Logits agree, and what the cache keeps of the first layer, which no route reaches."""
    for got, expected in zip(recorded.run(result.gm), recorded.run(), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        if expected.shape[-1:] == (61,):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def rows_of_linears(gm):
    """Tokens of each linear layer, in order."""
    linears = [node for node in gm.graph.nodes if op_name(node) == "linear"]
    return [value_of(node).shape[1] for node in linears]


PROMPTS = [
    ("llama", "sdpa", "dynamic", False, None),
    ("llama", "sdpa", "dynamic", True, True),
    ("llama", "eager", "dynamic", True, None),
    ("llama", "sdpa", "static", True, None),
    ("llama", "sdpa", "static", False, True),
    ("llama", "sdpa", "none", True, None),
    ("qwen3", "sdpa", "dynamic", True, None),
    ("qwen3", "eager", "none", False, None),
    ("mistral", "sdpa", "dynamic", False, None),
    ("mistral", "eager", "dynamic", True, None),
]


@pytest.mark.parametrize(("family", "attention", "cache", "padded", "dynamic"), PROMPTS)
def test_the_last_layer_of_a_prompt(family, attention, cache, padded, dynamic):
    recorded = hf.prefill(family, attention, cache, padded, dynamic)
    result = recorded.rewrite(config=LONG)
    assert noted(result) == [False, True]
    tokens = [as_expr(size) == 1 for size in rows_of_linears(result.gm)]
    # q, k, v, o and the MLP's three of the first layer; q, k and v; o, the MLP, logits.
    assert not any(tokens[:7])
    assert sorted(tokens[7:10]) == [False, False, True]
    assert all(tokens[10:])
    assert len(tokens) == 15
    same(recorded, result)


@pytest.mark.parametrize("sparse", ["streaming", "triangle"])
@pytest.mark.parametrize("policy", [Policy.SPARSE, Policy.ROUTER])
@pytest.mark.parametrize("padded", [False, True])
def test_a_pattern_of_one_query(sparse, policy, padded, monkeypatch):
    """As much as without the pass: the pattern of the last query, and the same routes."""
    recorded = hf.prefill(padded=padded)
    config = FluxConfig(sink=2, local=3, last=2, pool_size=3, sparse=sparse)
    torch.manual_seed(3)
    result = recorded.rewrite(policy, config)
    assert noted(result) == [False, True]
    monkeypatch.setattr("fluxcompile.passes.pipeline.read_last_token", lambda *_: 0)
    torch.manual_seed(3)
    without = recorded.rewrite(policy, config)
    assert noted(without) == [False, False]
    assert [s.became for s in result.sites] == [s.became for s in without.sites]
    for got, expected in zip(recorded.run(result.gm), recorded.run(without.gm), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_a_routed_query_is_read_whole():
    """The router pools over all tokens: the projection stays, rotary embedding does not."""
    result = hf.prefill().rewrite(Policy.ROUTER)
    last = result.sites[-1]
    assert value_of(last.query_tap).shape[1:3] in [(hf.HEADS, hf.LENGTH), (hf.LENGTH, hf.HEADS)]
    assert value_of(last.q).shape[2] == 1
    assert rows_of_linears(result.gm)[7:10] == [hf.LENGTH] * 3
    assert rows_of_linears(result.gm)[10:] == [1] * 5


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        (Policy.SPARSE, {"sparse": "power", "block": 16}),
        (Policy.SPARSE, {"sparse": "xattention", "block": 16, "stride": 4}),
        (Policy.ROUTER, {"sparse": "xattention", "block": 16, "stride": 4}),
        (Policy.FULL, {"retrieval": "xattention", "block": 16, "stride": 4}),
    ],
)
def test_modes_that_read_blocks_of_queries(policy, fields):
    result = hf.prefill().rewrite(policy, FluxConfig(sink=2, local=4, pool_size=3, **fields))
    assert noted(result) == [False, False]
    # What comes behind the attention is row by row all the same.
    assert rows_of_linears(result.gm)[7:] == [hf.LENGTH] * 3 + [1] * 5


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decode_is_left_alone(cache, new):
    result = hf.decode(cache=cache, new=new).rewrite()
    assert noted(result) == [False, False]


def test_no_guard_is_added(monkeypatch):
    """A length that the graph serves without the pass is one that it serves with it."""
    recorded = hf.prefill("qwen3", padded=True, dynamic=True)
    sizes = [x for x in recorded.inputs if isinstance(x, torch.SymInt)]
    guards = sizes[0].node.shape_env.guards
    with monkeypatch.context() as patch:
        patch.setattr("fluxcompile.passes.pipeline.read_last_token", lambda *_: 0)
        recorded.rewrite(Policy.SPARSE, LONG)
    before = len(guards)
    assert noted(recorded.rewrite(Policy.SPARSE, LONG)) == [False, True]
    assert len(guards) == before


def test_plain_causal_attention_takes_no_mask():
    result = hf.prefill().rewrite(config=LONG)
    first, last = (node for node in result.gm.graph.nodes if op_name(node) == SDPA)
    assert first.kwargs["is_causal"]
    assert not last.kwargs["is_causal"]
    assert value_of(last.args[0]).shape[2] == 1


class Reads(torch.nn.Module):
    """Two layers, of whose result ``read`` is read."""

    def __init__(self, read, **layer):
        super().__init__()
        self.stack, self.read = Stack(2, **layer), read

    def forward(self, x, *rest):
        return self.read(self.stack(x))


READS = {
    "all": (lambda y: y, False),
    "both": (lambda y: (y, y[:, -1:]), False),
    "two": (lambda y: y[:, -2:], False),
    "first": (lambda y: y[:, :1], False),
    "features": (lambda y: y[..., -1:], False),
    "last": (lambda y: y[:, -1:], True),
    "last_as_index": (lambda y: y[:, -1], True),
    "last_plus_one": (lambda y: (y + 1)[:, -1:, :], True),
    "backwards": (lambda y: y.flip(1)[:, -1:], False),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_read(name):
    read, expected = READS[name]
    recorded = record(Reads(read), hidden())
    result = recorded.rewrite(config=LONG)
    recorded.check(result)
    assert noted(result) == [False, expected]


def heads_are_given():
    return [torch.randn(2, 4, 10, 8) for _ in range(3)]


def attend_last(attend):
    def run(q, k, v, *rest):
        return attend(q, k, v, *rest).transpose(1, 2).flatten(2)[:, -1:]

    return run


def test_written_out_attention():
    def attend(q, k, v):
        causal = torch.full((10, 10), float("-inf")).triu(1)
        return eager_softmax(q, k, v, causal)

    recorded = record(attend_last(attend), *heads_are_given())
    result = recorded.rewrite(config=LONG)
    recorded.check(result)
    assert noted(result) == [True]


def test_grouped_heads_by_einsum():
    def attend(q, k, v):
        grouped = q.unflatten(1, (2, 2))
        scores = torch.einsum("bkgid,bkjd->bkgij", grouped, k[:, :2]) * 8**-0.5
        scores = scores + torch.full((10, 10), float("-inf")).triu(1)
        out = torch.einsum("bkgij,bkjd->bkgid", scores.softmax(-1), v[:, :2])
        return out.flatten(1, 2)

    recorded = record(attend_last(attend), *heads_are_given())
    result = recorded.rewrite(config=LONG)
    recorded.check(result)
    assert noted(result) == [True]


def test_a_mask_at_an_offset():
    """A chunk behind 3 cached tokens: the last query's place counts from the first one's."""

    def attend(q, k, v, valid):
        i, j = torch.arange(10)[:, None] + 3, torch.arange(16)[None, :]
        mask = (j <= i)[None, None] & valid[:, None, None, :]
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, :4] = False
    q, k, v = torch.randn(2, 4, 10, 8), *(torch.randn(2, 4, 16, 8) for _ in range(2))
    for dynamic in (False, True):
        recorded = record(attend_last(attend), q, k, v, valid, dynamic=dynamic)
        result = recorded.rewrite(config=LONG)
        if not dynamic:
            assert noted(result) == [True]
            assert result.sites[0].mask.offset == 3
        recorded.check(result)


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("policy", [Policy.FULL, Policy.SPARSE, Policy.ROUTER])
def test_a_given_mask(readable, policy, monkeypatch):
    """Whether it is what it should be is told by all its rows, not by the last."""

    def attend(q, k, v, mask):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Module()
            self.model.layers = torch.nn.ModuleList([torch.nn.Module()])
            self.model.layers[0].self_attn = Layer(attend)

        def forward(self, x, mask):
            return self.model.layers[0].self_attn(x, mask)[:, -1:]

    mask = torch.ones(2, 1, 10, 10).tril().bool()
    mask[1, :, :, :2] = False
    if not readable:
        mask[:, :, 5, 1] = False  # a row of which the last one tells nothing
    recorded = record(Last(), hidden(), mask)
    result = recorded.rewrite(policy, CONFIG)
    assert isinstance(result.sites[0].mask, GivenMask)
    assert noted(result) == [True]
    if not readable or policy is Policy.FULL:
        recorded.check(result)
    monkeypatch.setattr("fluxcompile.passes.pipeline.read_last_token", lambda *_: 0)
    without = recorded.rewrite(policy, CONFIG)
    if policy is not Policy.ROUTER:  # whose weights are drawn anew
        for got, expected in zip(recorded.run(result.gm), recorded.run(without.gm), strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_left_alone_after_all(monkeypatch):
    """Nothing is lost where an attention's rewrite turns out to be impossible."""

    def refuse(site, *_):
        raise UnknownSize("s0")

    monkeypatch.setattr(branch_attention, "_rewrite", refuse)
    recorded = hf.prefill(padded=True)
    result = recorded.rewrite(config=LONG)
    assert noted(result) == [False, False]
    assert {site.became for site in result.sites} == {"left alone"}
    assert result.sites[-1].q_shape[2] == hf.LENGTH
    recorded.check(result)
