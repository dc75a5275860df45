"""What a router reads of a prompt, against an oracle over lists of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxcompile.pooling import Pooling
from fluxcompile.router_pooling import full_attention_rows, pool_positions, pool_query

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
