"""What a router reads of a prompt, against an oracle over lists of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxcompile.config import FluxConfig
from fluxcompile.pooling import Pooling
from fluxcompile.router_pooling import full_attention_rows, pool_positions, pool_query
from tests.router_features import features

HEADS, DIM = 3, 4


def oracle(query, valid, pool):
    """Mean over the first and last ``pool`` valid tokens, each once, then over heads."""
    pooled = []
    for row, live in zip(query, valid, strict=True):
        tokens = [token for token in range(row.shape[1]) if live[token]]
        picked = tokens if len(tokens) < 2 * pool else tokens[:pool] + tokens[-pool:]
        picked = sorted(set(picked))
        if picked:
            pooled.append(row[:, picked].float().mean(1).mean(0))
        else:
            pooled.append(torch.zeros(row.shape[-1]))
    return torch.stack(pooled)


def pooled(query, valid, pool):
    pooling = Pooling(pool, pool)
    return pool_query(query, pool_positions(query, valid, pooling), pooling)


def tokens(batch, length, dtype=torch.float32):
    return torch.randn(batch, HEADS, length, DIM).to(dtype)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_random_validity(data):
    length = data.draw(st.integers(1, 30))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    valid = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=4)))
    pool = data.draw(st.integers(1, 9))
    query = tokens(len(valid), length)
    torch.testing.assert_close(pooled(query, valid, pool), oracle(query, valid, pool))


def poolings():
    """Sizes of the ends, of which one may be 0, and what is kept apart."""
    sizes = st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(any)
    return st.tuples(sizes, st.booleans(), st.booleans())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_any_pooling_of_any_prompt(data):
    length = data.draw(st.integers(1, 20))
    row = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    valid = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)))
    (prefix, suffix), separate, each = data.draw(poolings())
    prompts = st.lists(st.integers(1, 25), min_size=len(valid), max_size=len(valid))
    prompt_length = data.draw(st.none() | prompts.map(torch.tensor))
    config = FluxConfig(
        prefix_size=prefix,
        suffix_size=suffix,
        segments="separate" if separate else "joint",
        heads="each" if each else "mean",
    )
    query = tokens(len(valid), length)
    positions = pool_positions(query, valid, config.pooling, prompt_length)
    found = pool_query(query, positions, config.pooling)
    limits = [None] * len(valid) if prompt_length is None else prompt_length.tolist()
    expected = [
        features(query[i].transpose(0, 1), valid[i].tolist(), config, limits[i])
        for i in range(len(valid))
    ]
    torch.testing.assert_close(found, torch.stack(expected))
    assert found.shape[1] == config.pooling.features(DIM, HEADS)


# One head of one dimension, token t holds 10 ** t: sums of tokens are read off the digits.
BY_HAND = {
    "joint": ({}, 5, [11011 / 4]),
    "joint, short": ({}, 3, [111 / 3]),
    "separate": ({"segments": "separate"}, 5, [11 / 2, 11000 / 2]),
    "separate, the ends overlap": ({"segments": "separate"}, 3, [11 / 2, 110 / 2]),
    "separate, one token": ({"segments": "separate"}, 1, [1, 1]),
    "beginning alone": ({"suffix_size": 0}, 5, [11 / 2]),
    "end alone": ({"prefix_size": 0, "suffix_size": 3}, 5, [11100 / 3]),
    "end alone, separate": ({"prefix_size": 0, "segments": "separate"}, 5, [11000 / 2]),
    "unequal": ({"prefix_size": 3, "suffix_size": 1, "segments": "separate"}, 5, [37, 10000]),
}


@pytest.mark.parametrize("padding", [(0, 0), (2, 0), (0, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("answer", [0, 2])
@pytest.mark.parametrize(("fields", "length", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_by_hand(fields, length, expected, answer, padding):
    """With padding on either side, and an answer behind the prompt that is not to be read."""
    left, right = padding
    digits = [10.0**t for t in range(length)] + [3e30] * answer
    query = torch.tensor([7e30] * left + digits + [7e30] * right).reshape(1, 1, -1, 1)
    valid = torch.tensor([[False] * left + [True] * len(digits) + [False] * right])
    pooling = FluxConfig(pool_size=2, **fields).pooling
    positions = pool_positions(query, valid, pooling, torch.tensor([length]))
    assert pool_query(query, positions, pooling)[0].tolist() == pytest.approx(expected)
    if not any(padding):
        assert torch.equal(
            pool_query(
                query, pool_positions(query, None, pooling, torch.tensor([length])), pooling
            ),
            pool_query(query, positions, pooling),
        )


def test_heads_of_an_end_stand_together():
    query = torch.arange(2 * 3 * 2.0).reshape(1, 2, 3, 2)  # [B, H, S, D]
    pooling = Pooling(1, 1, separate=True, each_head=True)
    found = pool_query(query, pool_positions(query, None, pooling), pooling)
    assert found.tolist() == [[0, 1, 6, 7, 4, 5, 10, 11]]


@pytest.mark.parametrize("pool", [1, 2, 5, 100])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9, 10, 11, 30])
def test_without_padding(length, pool):
    query = tokens(2, length)
    everything = torch.ones(2, length, dtype=torch.bool)
    expected = oracle(query, everything, pool)
    torch.testing.assert_close(pooled(query, None, pool), expected)
    assert torch.equal(pooled(query, None, pool), pooled(query, everything, pool))


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("length", [1, 5, 6, 7, 20])
def test_a_padded_row_equals_its_own_run(length, side):
    """Bit for bit, whatever the padding holds."""
    alone = tokens(1, length)
    before = {"left": 4, "right": 0, "both": 3}[side]
    padded = torch.full((2, HEADS, length + 4, DIM), 1e30)
    padded[:, :, before : before + length] = alone
    valid = torch.zeros(2, length + 4, dtype=torch.bool)
    valid[:, before : before + length] = True
    result = pooled(padded, valid, 3)
    assert torch.equal(result[:1], pooled(alone, None, 3))
    assert torch.equal(result[0], result[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_may_hold_anything(poison):
    query = tokens(1, 8)
    query[:, :, 5:] = poison
    valid = torch.tensor([[True] * 5 + [False] * 3])
    assert pooled(query, valid, 3).isfinite().all()


def test_a_short_prompt_counts_every_token_once():
    index, weight = pool_positions(tokens(1, 5), None, Pooling(4, 4))
    used = index[0][weight[0] > 0]
    assert sorted(used.tolist()) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(weight.sum(1), torch.ones(1))


def test_an_empty_row_is_zero():
    query = tokens(2, 6)
    valid = torch.tensor([[False] * 6, [True] * 6])
    assert torch.equal(pooled(query, valid, 2)[0], torch.zeros(DIM))


def test_validity_may_cover_a_longer_cache():
    """A static cache's validity runs on behind the prompt's tokens."""
    query = tokens(2, 6)
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, :2] = False
    torch.testing.assert_close(pooled(query, valid, 2), oracle(query, valid[:, :6], 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_is_fp32(dtype):
    query = tokens(2, 40, dtype) * 100
    result = pooled(query, None, 20)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, oracle(query, torch.ones(2, 40), 20), atol=1e-4, rtol=1e-5)


def test_strides_do_not_matter():
    query = torch.randn(2, 9, HEADS, DIM).transpose(1, 2)
    assert torch.equal(pooled(query, None, 2), pooled(query.contiguous(), None, 2))


@pytest.mark.parametrize(
    ("logits", "full"),
    [
        ((0.0, 1.0), True),
        ((1.0, 0.0), False),
        ((0.5, 0.5), False),
        ((float("nan"), 0.0), True),
        ((0.0, float("nan")), True),
        ((float("-inf"), 0.0), True),
    ],
)
def test_rows(logits, full):
    """As ``argmax``, whose ties go to the first class; what is no number is full attention."""
    assert full_attention_rows(torch.tensor([logits])).tolist() == [full]
