"""Masks that must not be read as causal + valid keys, and calls left alone because of them."""

import pytest
import torch

from fluxcompile.passes.site import SkipReason

from .graphs import qkv, record
from .mask_reading import LOWEST, B, S, causal, gathered, places, read, sdpa


def in_place(change):
    def attend(q, k, v):
        mask = causal(q, k).expand(q.shape[0], 1, -1, -1).clone()
        mask = change(mask)
        return sdpa(q, k, v, mask)

    return attend


def assign(mask):
    mask[..., 1] = False
    return mask


def assign_through_view(mask):
    mask[:, 0].view(-1, S)[:, 1:3] = False
    return mask


def and_in_place(mask):
    mask.logical_and_(torch.arange(S) != 1)
    return mask


def and_operator(mask):
    mask &= torch.arange(S) != 1
    return mask


def fill_diagonal(mask):
    mask[0, 0].fill_diagonal_(False)
    mask[..., 0] = True
    return mask


def additive_assigned(q, k, v):
    mask = torch.where(causal(q, k), 0.0, LOWEST).expand(q.shape[0], 1, -1, -1).clone()
    mask[:, :, :, 2:4] = mask[:, :, :, 2:4].masked_fill(causal(q, k)[..., 2:4], LOWEST)
    return sdpa(q, k, v, mask)


@pytest.mark.parametrize(
    "attend",
    [
        *map(in_place, (assign, assign_through_view, and_in_place, and_operator, fill_diagonal)),
        additive_assigned,
    ],
    ids=["assign", "through-view", "logical_and_", "iand", "fill_diagonal_", "additive"],
)
def test_masks_changed_in_place(attend):
    assert read(attend, *qkv()).skip.reason is SkipReason.MASK_UNREADABLE


def test_a_mask_changed_between_two_layers():
    def attend(q, k, v):
        mask = causal(q, k).expand(q.shape[0], 1, -1, -1).clone()
        first = sdpa(q, k, v, mask)
        mask[..., 1] = False
        return sdpa(first, k, v, mask)

    recorded = record(attend, *qkv())
    recorded.check(recorded.rewrite())


documents = torch.tensor([[0] * 4 + [1] * 6, [0] * 7 + [1] * 3])
UNREADABLE = {
    "packed": lambda q, k, v: sdpa(
        q, k, v, causal(q, k) & (documents[:, None, :, None] == documents[:, None, None, :])
    ),
    "block-diagonal": lambda q, k, v: sdpa(
        q, k, v, causal(q, k) & (places(S, S)[0] // 4 == places(S, S)[1] // 4)
    ),
    "chunked": lambda q, k, v: sdpa(
        q, k, v, causal(q, k) & (places(S, S)[1] >= places(S, S)[0] // 4 * 4)
    ),
    "bidirectional-prefix": lambda q, k, v: sdpa(
        q, k, v, causal(q, k) | (torch.arange(S) < 3)[None, None, None]
    ),
    "diagonal-only": lambda q, k, v: sdpa(
        q, k, v, (places(S, S)[0] == places(S, S)[1])[None, None]
    ),
    "all-but-diagonal": lambda q, k, v: sdpa(
        q, k, v, causal(q, k) & ((places(S, S)[0] != places(S, S)[1]) | (places(S, S)[1] == 0))
    ),
    "dilated": lambda q, k, v: sdpa(
        q, k, v, (2 * places(S, S)[1] <= 2 * places(S, S)[0] - places(S, S)[1])[None, None]
    ),
    "anti-causal": lambda q, k, v: sdpa(q, k, v, (places(S, S)[1] >= places(S, S)[0])[None, None]),
    "triu": lambda q, k, v: sdpa(q, k, v, torch.ones(S, S, dtype=torch.bool).triu()[None, None]),
    "tril-of-fives": lambda q, k, v: sdpa(
        q, k, v, torch.full((S, S), -5.0).triu(1)[None, None]
    ),
    "tril-of-numbers": lambda q, k, v: sdpa(
        q, k, v, (torch.full((S, S), 2.0).tril() == 1)[None, None] | causal(q, k)
    ),
    "alibi": lambda q, k, v: sdpa(
        q,
        k,
        v,
        torch.where(causal(q, k), -0.1 * (places(S, S)[0] - places(S, S)[1])[None, None], LOWEST),
    ),
    "alibi-per-head": lambda q, k, v: sdpa(
        q,
        k,
        v,
        torch.where(causal(q, k), 0.0, LOWEST)
        - torch.arange(4.0)[None, :, None, None] * torch.arange(S),
    ),
    "small-bias": lambda q, k, v: sdpa(q, k, v, torch.where(causal(q, k), 0.0, -5.0)),
    "bias-inside": lambda q, k, v: sdpa(q, k, v, torch.where(causal(q, k), 1.0, LOWEST)),
    "inverted-numbers": lambda q, k, v: sdpa(
        q, k, v, (2.0 - causal(q, k).float()) * LOWEST
    ),
    "sum-with-a-bias": lambda q, k, v: sdpa(
        q, k, v, torch.where(causal(q, k), 0.0, LOWEST) + torch.ones(S)
    ),
    "eight-bit-positions": lambda q, k, v: sdpa(
        q, k, v, (places(S, S)[1].to(torch.int8) <= places(S, S)[0].to(torch.int8))[None, None]
    ),
    "permuted-keys": lambda q, k, v: sdpa(
        q, k, v, causal(q, k)[:, :, :, [1, 0, *range(2, S)]]
    ),
    "flipped": lambda q, k, v: sdpa(q, k, v, causal(q, k).flip(3).flip(3)),
    "window-the-wrong-way": lambda q, k, v: sdpa(
        q, k, v, causal(q, k) & (places(S, S)[1] > places(S, S)[0] + 4) | (places(S, S)[1] == 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", UNREADABLE)
def test_unreadable(form):
    site = read(UNREADABLE[form], *qkv())
    assert site.skip is not None, site.mask
    assert site.skip.reason is SkipReason.MASK_UNREADABLE
    assert site.skip.detail
    assert site.became == "left alone"


def transposed(q, k, v, m):
    return sdpa(q, k, v, causal(q, k) & m.bool().t()[None, None])


def reversed_batch(q, k, v, m):
    key = torch.arange(S)[None, None, None, :]
    batch = (1 - torch.arange(B))[:, None, None, None]
    return sdpa(q, k, v, causal(q, k) & m.bool()[batch, key])


def first_row_for_all(q, k, v, m):
    return sdpa(q, k, v, causal(q, k) & m.bool()[0][None, None, None, :])


def second_row_for_all(q, k, v, m):
    return sdpa(q, k, v, (causal(q, k) & m.bool()[1:][:, None, None, :]).expand(B, 1, S, S))


def both_rows(q, k, v, m):
    valid = m.bool()
    return sdpa(q, k, v, causal(q, k) & valid[:, None, None, :] & valid.flip(0)[:, None, None, :])


def either_row(q, k, v, m):
    return sdpa(q, k, v, causal(q, k) & (m.bool() | (m > 5)).flip(0)[:, None, None, :])


def of_queries(q, k, v, m):
    return sdpa(q, k, v, causal(q, k) & m.bool()[:, None, :, None])


def along_diagonals(q, k, v, m):
    i, j = places(S, S)
    wide = torch.cat((m, m), 1).bool()
    return sdpa(q, k, v, causal(q, k) & wide[:, None][:, :, (i + j)])


def shifted_back(q, k, v, m):
    return sdpa(q, k, v, causal(q, k) & gathered(q, k, m.bool(), -2))


def validity_changed(q, k, v, m):
    valid = m.bool()
    valid[:, 4] = False
    return sdpa(q, k, v, causal(q, k) & valid[:, None, None, :])


def padding_only(q, k, v, m):
    return sdpa(q, k, v, m.bool()[:, None, None, :])


@pytest.mark.parametrize(
    "attend",
    [reversed_batch, first_row_for_all, second_row_for_all, both_rows, of_queries,
     along_diagonals, shifted_back, validity_changed],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_validity_that_is_not_a_row_s_own(attend):
    valid = torch.ones(B, S, dtype=torch.long)
    valid[1, 5] = 0
    site = read(attend, *qkv(), valid)
    assert site.skip is not None, site.mask
    assert site.skip.reason is SkipReason.MASK_UNREADABLE


def test_padding_alone_is_no_causal_mask():
    """As an encoder's, or cross-attention to one: there is nothing to recover, and no warning."""
    valid = torch.ones(B, S, dtype=torch.long)
    valid[1, 5] = 0
    site = read(padding_only, *qkv(), valid)
    assert site.skip is not None, site.mask
    assert site.skip.reason is SkipReason.NOT_CAUSAL


def test_a_computed_validity_is_a_validity():
    valid = torch.ones(B, S, dtype=torch.long)
    valid[1, 5] = 0
    site = read(either_row, *qkv(), valid)
    assert site.mask.valid is not None
