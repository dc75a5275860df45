"""Masks read back from how they were made."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fluxcompile.passes.plan import Policy
from fluxcompile.passes.site import CausalMask, GivenMask, SkipReason

from .graphs import SDPA, Layer, hidden, op_counts, qkv, record, record_all
from .mask_reading import (
    LOWEST,
    B,
    S,
    causal,
    check_expression,
    gathered,
    padding,
    places,
    read,
    sdpa,
)

CAUSAL = {
    "bool": lambda q, k, v: sdpa(q, k, v, causal(q, k)),
    "bool-batched": lambda q, k, v: sdpa(q, k, v, causal(q, k).expand(q.shape[0], 1, -1, -1)),
    "strictly-less": lambda q, k, v: sdpa(
        q, k, v, (torch.arange(S)[None] < torch.arange(S)[:, None] + 1)[None, None]
    ),
    "ge": lambda q, k, v: sdpa(
        q, k, v, torch.ge(torch.arange(S)[:, None], torch.arange(S)[None])[None, None]
    ),
    "not-greater": lambda q, k, v: sdpa(
        q, k, v, ~(torch.arange(S)[None] > torch.arange(S)[:, None])[None, None]
    ),
    "logical-not": lambda q, k, v: sdpa(
        q, k, v, torch.logical_not(torch.arange(S)[None, None, None] > places(S, S)[0])
    ),
    "where": lambda q, k, v: sdpa(q, k, v, torch.where(causal(q, k), 0.0, LOWEST)),
    "where-swapped": lambda q, k, v: sdpa(q, k, v, torch.where(~causal(q, k), LOWEST, 0.0)),
    "where-tensors": lambda q, k, v: sdpa(
        q, k, v, torch.where(causal(q, k), torch.tensor(0.0), torch.tensor(LOWEST))
    ),
    "where-infinity": lambda q, k, v: sdpa(q, k, v, torch.where(causal(q, k), 0.0, float("-inf"))),
    "where-large": lambda q, k, v: sdpa(q, k, v, torch.where(causal(q, k), 0.0, -1e9)),
    "masked-fill": lambda q, k, v: sdpa(
        q, k, v, torch.zeros(B, 1, S, S).masked_fill(~causal(q, k), LOWEST)
    ),
    "masked-fill-keywords": lambda q, k, v: sdpa(
        q, k, v, torch.zeros(B, 1, S, S).masked_fill(mask=~causal(q, k), value=LOWEST)
    ),
    "additive-cast": lambda q, k, v: sdpa(
        q, k, v, torch.where(causal(q, k), 0.0, LOWEST).to(torch.float64).to(q.dtype)
    ),
    "and-true": lambda q, k, v: sdpa(q, k, v, causal(q, k) & torch.ones(S, S, dtype=torch.bool)),
    "and-new-full": lambda q, k, v: sdpa(
        q, k, v, causal(q, k) & causal(q, k).new_full((S, S), True)
    ),
    "or-false": lambda q, k, v: sdpa(q, k, v, causal(q, k) | torch.zeros(S, S, dtype=torch.bool)),
    "bool-where": lambda q, k, v: sdpa(q, k, v, torch.where(causal(q, k), True, False)),
    "arange-keywords": lambda q, k, v: sdpa(
        q,
        k,
        v,
        (torch.arange(start=3, end=3 + S)[None] <= torch.arange(3, end=3 + S)[:, None])[None, None],
    ),
    "arange-steps": lambda q, k, v: sdpa(
        q,
        k,
        v,
        (torch.arange(0, 2 * S, 2)[None] - torch.arange(S)[None] <= places(S, S)[0])[None, None],
    ),
    "positions-int32": lambda q, k, v: sdpa(
        q, k, v, (places(S, S)[1].int() <= places(S, S)[0].to(torch.int32))[None, None]
    ),
    "sliced": lambda q, k, v: sdpa(q, k, v, causal(q, k)[:, :, :, :S]),
    "two-axes": lambda q, k, v: sdpa(q, k, v, causal(q, k)[0, 0]),
    "every-head": lambda q, k, v: sdpa(q, k, v, causal(q, k).expand(B, 4, -1, -1)),
    "tril": lambda q, k, v: sdpa(q, k, v, torch.ones(S, S, dtype=torch.bool).tril()),
    "tril-compared": lambda q, k, v: sdpa(q, k, v, torch.tril(torch.ones(S, S)) != 0),
    "triu-compared": lambda q, k, v: sdpa(q, k, v, torch.ones(S, S).triu(diagonal=1) == 0),
    "triu-cast": lambda q, k, v: sdpa(q, k, v, ~torch.ones(S, S).triu(1).bool()),
    "triu-additive": lambda q, k, v: sdpa(q, k, v, torch.full((S, S), float("-inf")).triu(1)),
    "inverted": lambda q, k, v: sdpa(q, k, v, (1.0 - causal(q, k).float()) * LOWEST),
    "sum-of-two": lambda q, k, v: sdpa(
        q, k, v, torch.where(causal(q, k), 0.0, LOWEST) + torch.zeros(S)
    ),
}


@pytest.mark.parametrize("form", CAUSAL)
def test_causal(form):
    site = read(CAUSAL[form], *qkv())
    assert site.mask == CausalMask(), site.skip
    assert site.became == "full"


def test_causal_flag():
    site = read(
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv()
    )
    assert site.mask == CausalMask()


VALID = {
    "gathered": lambda q, k, v, m: sdpa(q, k, v, causal(q, k) & gathered(q, k, m.to(torch.bool))),
    "unsqueezed": lambda q, k, v, m: sdpa(q, k, v, causal(q, k) & m.bool()[:, None, None, :]),
    "compared": lambda q, k, v, m: sdpa(q, k, v, causal(q, k) & (m != 0)[:, None, None, :]),
    "expanded": lambda q, k, v, m: sdpa(
        q, k, v, m.bool()[:, None, None, :].expand(B, 1, S, S) & causal(q, k)
    ),
    "filled": lambda q, k, v, m: sdpa(
        q,
        k,
        v,
        torch.where(causal(q, k), 0.0, LOWEST).masked_fill(~m.bool()[:, None, None, :], LOWEST),
    ),
}


@pytest.mark.parametrize("form", VALID)
def test_valid_keys(form):
    site = read(VALID[form], *qkv(), padding())
    assert isinstance(site.mask, CausalMask), site.skip
    assert site.mask.valid is not None
    assert (site.mask.valid_offset, site.mask.window, site.mask.offset) == (0, 0, None)


def test_one_row_of_validity_for_the_whole_batch():
    site = read(VALID["unsqueezed"], *qkv(), padding(1))
    assert site.became == "full"


@pytest.mark.parametrize("shift", [0, 2])
def test_validity_of_a_longer_cache(shift):
    """Keys may be the later part of what the padding mask covers."""

    def attend(q, k, v, m):
        return sdpa(q, k, v, causal(q, k) & gathered(q, k, m.bool(), shift))

    valid = padding(keys=S + 4)
    valid[:, shift] = 1
    site = read(attend, *qkv(), valid)
    assert site.mask.valid_offset == shift
    assert site.became == "full"


def test_window():
    def attend(q, k, v, m):
        i, j = places(S, S)
        seen = causal(q, k) & (j > i - 4)[None, None]
        return sdpa(q, k, v, seen & m.bool()[:, None, None, :])

    site = read(attend, *qkv(), torch.ones(B, S, dtype=torch.long))
    assert site.mask.window == 4
    assert site.mask.valid is not None


@pytest.mark.parametrize(
    ("term", "width"),
    [
        (lambda i, j: j > i - 4, 4),
        (lambda i, j: j >= i - 4, 5),
        (lambda i, j: i - j < 4, 4),
        (lambda i, j: (i - j) <= 4, 5),
        (lambda i, j: ~(j <= i - 4), 4),
        (lambda i, j: i < j + 1, 1),
    ],
)
def test_window_forms(term, width):
    def attend(q, k, v):
        return sdpa(q, k, v, causal(q, k) & term(*places(S, S)))

    assert read(attend, *qkv()).mask.window == width


class TestOffset:
    """Queries that are not the first tokens."""

    @staticmethod
    def operands(queries=4):
        q, k, v = qkv()
        return q[:, :, :queries], k, v

    def test_lower_right_is_proven(self):
        site = read(lambda q, k, v: sdpa(q, k, v, causal(q, k, 6)), *self.operands())
        assert site.mask == CausalMask()

    @pytest.mark.parametrize("start", [0, 3, 8])
    def test_elsewhere_is_kept(self, start):
        site = read(lambda q, k, v: sdpa(q, k, v, causal(q, k, start)), *self.operands())
        assert site.mask.offset == start

    def test_before_the_first_key(self):
        """A query without a key has no defined result; the others are exact."""

        def attend(q, k, v):
            return sdpa(q, k, v, causal(q, k, -1))[:, :, 1:]

        assert read(attend, *qkv()).mask.offset == -1

    def test_on_the_device(self):
        def attend(q, k, v, start):
            i, j = places(q.shape[2], k.shape[2])
            return sdpa(q, k, v, (j <= i + start)[None, None])

        site = read(attend, *self.operands(), torch.tensor(3))
        ((symbol, node),) = site.mask.scalars
        assert site.mask.offset == symbol
        assert node.op == "placeholder"

    def test_on_the_device_twice(self):
        def attend(q, k, v, start):
            i, j = places(q.shape[2], k.shape[2])
            return sdpa(q, k, v, (j + 1 <= i + start + start)[None, None])

        assert read(attend, *self.operands(), torch.tensor(2)).became == "full"

    def test_a_product_on_the_device_is_not_emitted(self):
        def attend(q, k, v, start):
            i, j = places(q.shape[2], k.shape[2])
            return sdpa(q, k, v, (j <= i + start * start)[None, None])

        site = read(attend, *self.operands(), torch.tensor(2))
        assert site.skip.reason is SkipReason.MASK_UNREADABLE

    def test_changed_on_the_device_before_the_mask(self):
        def attend(q, k, v, start):
            start = start * 1
            i, j = places(q.shape[2], k.shape[2])
            start.add_(1)
            return sdpa(q, k, v, (j <= i + start)[None, None])

        read(attend, *self.operands(), torch.tensor(2))

    def test_changed_on_the_device_after_the_mask(self):
        """A static cache counts its tokens in place once its mask is made."""

        def attend(q, k, v, start):
            i, j = places(q.shape[2], k.shape[2])
            seen = (j <= i + start)[None, None]
            start.add_(4)
            return sdpa(q, k, v, seen)

        assert read(attend, *self.operands(), torch.tensor(2)).became == "full"

    def test_a_negative_number_on_the_device(self):
        def attend(q, k, v, lowest):
            i, j = places(S, S)
            return sdpa(q, k, v, ((j <= i) & (j + lowest >= 0))[None, None])[:, :, 3:]

        assert read(attend, *qkv(), torch.tensor(-3)).skip is not None

    def test_one_query_sees_all_keys(self):
        """Seeing all of them is causal where the last one is the query's own."""
        q, k, v = self.operands(1)
        attention = functional.scaled_dot_product_attention
        past = k[:, :, :-1], v[:, :, :-1]

        def appended(q, k, v, past_k, past_v, m=None):
            k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=-2)
            return sdpa(q, k, v, None if m is None else m.bool()[:, None, None, :])

        def written(q, k, v, past_k, past_v):
            at = torch.tensor([past_k.shape[2] - 1])
            past_k.index_copy_(2, at, k)
            past_v.index_copy_(2, at, v)
            return attention(q, past_k, past_v)

        def tokens_first(q, k, v, past_k, past_v):
            k, v = (
                torch.cat((old.transpose(1, 2), new.transpose(1, 2)), dim=1).transpose(1, 2)
                for old, new in ((past_k, k), (past_v, v))
            )
            return attention(q, k, v)

        def assigned(q, k, v, past_k, past_v):
            past_k[:, :, -1:], past_v[:, :, -1:] = k, v
            return attention(q, past_k, past_v)

        new = k[:, :, -1:], v[:, :, -1:]
        assert read(appended, q, *new, *past).mask == CausalMask()
        assert read(tokens_first, q, *new, *past).mask == CausalMask()
        assert read(assigned, q, *new, *past).mask == CausalMask()
        assert read(written, q, *new, *past).mask == CausalMask()
        assert read(attention, q, *new).mask == CausalMask()
        site = read(appended, q, *new, *past, padding())
        assert isinstance(site.mask, CausalMask)
        assert site.mask.valid is not None

    def test_one_query_on_keys_that_come_from_elsewhere(self):
        """Cross-attention: cached keys of another sequence, or new ones, more than queries."""
        q, k, v = self.operands(1)
        attention = functional.scaled_dot_product_attention

        def computed(q, k, v):
            return attention(q, torch.cat((k[:, :, :0], k * 2), dim=2), v)

        def masked(q, k, v, m):
            return sdpa(q, k, v, m.bool()[:, None, None, :])

        for fn, inputs in ((attention, ()), (computed, ()), (masked, (padding(),))):
            site = read(fn, q, k, v, *inputs)
            assert site.skip.reason is SkipReason.NOT_CAUSAL
            assert "own sequence" in site.skip.detail


class TestGiven:
    """A four-dimensional mask from outside: its structure is checked when it runs."""

    @staticmethod
    def causal_mask(batch=B):
        return torch.ones(S, S, dtype=torch.bool).tril().expand(batch, 1, S, S).clone()

    @pytest.mark.parametrize("batch", [1, B])
    @pytest.mark.parametrize("form", ["causal", "padded", "random", "window"])
    def test_any_structure_is_exact(self, form, batch):
        mask = self.causal_mask(batch)
        if form == "padded":
            mask[-1, ..., 4] = False
            mask[-1, ..., 0] = True
        elif form == "random":
            mask = torch.rand(batch, 1, S, S) > 0.4
            mask[..., 0] = True
        elif form == "window":
            mask &= ~torch.ones(S, S, dtype=torch.bool).tril(-3)
        site = read(sdpa, *qkv(), mask)
        assert isinstance(site.mask, GivenMask)
        assert site.became == "full"

    @pytest.mark.parametrize("queries", [1, 4])
    def test_buffer_of_a_model(self, queries):
        """GPT-2's way: a slice of one large lower triangle."""

        def attend(q, k, v, triangle):
            keys = k.shape[2]
            return sdpa(q, k, v, triangle[:, :, keys - q.shape[2] : keys, :keys])

        q, k, v = qkv()
        triangle = torch.ones(1, 1, 2 * S, 2 * S, dtype=torch.bool).tril()
        assert read(attend, q[:, :, -queries:], k, v, triangle).skip is None

    @pytest.mark.parametrize(
        ("mask", "detail"),
        [
            (torch.ones(B, 1, 1, S, dtype=torch.bool), "expected [B, 1, Sq, Skv]"),
            (torch.ones(B, 4, S, S, dtype=torch.bool), "shape"),
            (torch.zeros(B, 1, S, S), "additive"),
            (torch.ones(S, S, dtype=torch.bool), "expected [batch, key + c]"),
        ],
        ids=["one-query", "per-head", "additive", "two-axes"],
    )
    def test_other_kinds(self, mask, detail):
        site = read(sdpa, *qkv(), mask)
        assert site.skip.reason is SkipReason.MASK_UNREADABLE
        assert detail in site.skip.detail

    def test_with_another_term(self):
        def attend(q, k, v, mask):
            return sdpa(q, k, v, mask & causal(q, k))

        site = read(attend, *qkv(), self.causal_mask())
        assert site.skip.reason is SkipReason.MASK_UNREADABLE

    def test_row_of_a_triangle_is_no_validity(self):
        def attend(q, k, v, triangle):
            return sdpa(q, k, v, triangle[None, None, :1].expand(B, 1, 1, S))

        q, k, v = qkv()
        triangle = torch.ones(S, S, dtype=torch.bool).tril()
        assert read(attend, q[:, :, :1], k, v, triangle).skip is not None


def masked_layer(q, k, v, m):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    return sdpa(q, k, v, (j <= i)[None, None] & m.bool()[:, None, None, :])


def test_symbolic_lengths_stay_symbolic():
    recorded = record(Layer(masked_layer), hidden(), padding(), dynamic=True)
    (site,) = recorded.sites()
    check_expression(recorded, site)
    assert isinstance(site.q_shape[2], torch.SymInt)
    assert site.mask.offset is None
    result = recorded.rewrite()
    recorded.check(result)
    assert isinstance(result.sites[0].k_shape[2], torch.SymInt)


def test_full_attention_adds_no_recompilation():
    """Reading the mask guards on nothing: further lengths and batches reuse the second graph."""
    from fluxcompile.graph_copy import copy_graph
    from fluxcompile.passes.pipeline import analyse, rewrite
    from fluxcompile.passes.plan import RoutingPlan

    from .graphs import CONFIG

    compiled = []

    def backend(gm, inputs):
        result = rewrite(analyse(copy_graph(gm), inputs), RoutingPlan(CONFIG))
        compiled.append(result)
        return result.gm.forward

    model = Layer(masked_layer)
    routed = torch.compile(model, backend=backend)
    with torch.no_grad():
        for batch, length in [(2, 10), (3, 12), (2, 25), (5, 7), (4, 4)]:
            x, valid = hidden(batch, length), torch.ones(batch, length, dtype=torch.long)
            valid[0, length // 2] = 0
            torch.testing.assert_close(routed(x, valid), model(x, valid))
    assert len(compiled) == 2
    assert not any(op_counts(result.gm)["le"] for result in compiled)


def test_masks_are_evaluated_once():
    """Layers share their mask node, and what is made of it."""

    def model(q, k, v, m):
        mask = causal(q, k) & m.bool()[:, None, None, :]
        for _ in range(3):
            q = sdpa(q, k, v, mask)
        return q

    recorded = record(model, *qkv(), padding())
    result = recorded.rewrite()
    recorded.check(result)
    counts = op_counts(result.gm)
    assert [counts[name] for name in ("mask_bounds.default", "full_attention.default", SDPA)] == [
        *(1, 3, 0)
    ]


@st.composite
def composed(draw):
    """A causal mask, perhaps windowed and padded, in one of many spellings."""
    queries = draw(st.integers(1, 6))
    keys = queries + draw(st.integers(0, 5))
    return {
        "queries": queries,
        "keys": keys,
        "start": draw(st.sampled_from([keys - queries, 0, 2])),
        "window": draw(st.sampled_from([0, 1, 3, 20])),
        "padded": draw(st.booleans()),
        "shift": draw(st.integers(0, 2)),
        "spelling": draw(st.integers(0, 5)),
        "additive": draw(st.booleans()),
        "origin": draw(st.sampled_from([0, 5])),
        "order": draw(st.permutations(range(3))),
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(composed())
def test_random_compositions(case):
    def attend(q, k, v, m):
        origin = case["origin"]
        i = torch.arange(origin, origin + case["queries"])[:, None] + case["start"]
        j = torch.arange(origin, origin + case["keys"])[None, :]
        spellings = [
            lambda: j <= i,
            lambda: ~(j > i),
            lambda: i - j >= 0,
            lambda: j - 1 < i,
            lambda: torch.where(i >= j, True, False),
            lambda: torch.logical_not(torch.gt(j, i)),
        ]
        terms = [spellings[case["spelling"]]()[None, None]]
        if case["window"]:
            terms.append((j > i - case["window"])[None, None])
        if case["padded"]:
            first = case["shift"]
            terms.append(m.bool()[:, None, None, first : first + case["keys"]])
        ordered = [terms[place] for place in case["order"] if place < len(terms)]
        mask = ordered[0]
        for term in ordered[1:]:
            mask = mask & term
        if case["additive"]:
            mask = torch.where(mask, 0.0, LOWEST)
        return sdpa(q, k, v, mask)

    q = torch.randn(B, 2, case["queries"], 8)
    k, v = (torch.randn(B, 2, case["keys"], 8) for _ in range(2))
    torch._dynamo.reset()
    recorded = record(attend, q, k, v, torch.rand(B, case["keys"] + 2) > 0.4)
    (site,) = recorded.sites()
    assert isinstance(site.mask, CausalMask), site.skip
    check_expression(recorded, site)


def test_all_spellings_agree_on_sparse_attention():
    """The same mask written differently gives the same sparse attention."""
    q, k, v = qkv()
    outputs = []
    for form in ("bool", "where", "masked-fill", "not-greater"):
        recorded = record(CAUSAL[form], q, k, v)
        outputs += recorded.run(recorded.rewrite(Policy.SPARSE).gm)
    for left, right in itertools.pairwise(outputs):
        assert torch.equal(left, right)


def test_a_second_length_is_read_too():
    lengths = (10, 13)
    graphs = record_all(Layer(masked_layer), [(hidden(length=n), padding(keys=n)) for n in lengths])
    assert len(graphs) == 2
    for graph in graphs:
        assert graph.site().mask.valid is not None
