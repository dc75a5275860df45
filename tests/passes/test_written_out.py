"""Attention without four axes of its own: read by its indices, or left alone."""

import pytest
import torch

from fluxcompile.passes.plan import Policy
from fluxcompile.passes.site import CausalMask, OutputForm, SkipReason

from .graphs import op_counts, record

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 10, 8
GROUP = HEADS // KV_HEADS


def tokens_first():
    """q ``[B, S, H, D]``, k and v ``[B, S, HK, D]``, as projections leave them."""
    return [torch.randn(BATCH, LENGTH, n, DIM) for n in (HEADS, KV_HEADS, KV_HEADS)]


def weights_of(scores, axes=2):
    blocked = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return (scores * 0.3).masked_fill(blocked, float("-inf")).softmax(-1)


def repeated(x, axis):
    return x.repeat_interleave(GROUP, dim=axis)


def flat(x):
    return x.transpose(1, 2).flatten(0, 1)


def grouped_einsum(q, k, v):
    q = q.unflatten(2, (KV_HEADS, GROUP))
    weights = weights_of(torch.einsum("bikgd,bjkd->bkgij", q, k))
    return torch.einsum("bkgij,bjkd->bikgd", weights, v)


def grouped_matmul(q, k, v):
    q = q.transpose(1, 2).unflatten(1, (KV_HEADS, GROUP))
    k, v = (x.transpose(1, 2).unsqueeze(2) for x in (k, v))
    return weights_of(q @ k.mT) @ v


def tokens_first_einsum(q, k, v):
    weights = weights_of(torch.einsum("bihd,bjhd->bhij", q, repeated(k, 2)))
    return torch.einsum("bhij,bjhd->bihd", weights, repeated(v, 2))


def keys_first_einsum(q, k, v):
    weights = weights_of(torch.einsum("bjhd, bihd -> bhij", repeated(k, 2), q))
    return torch.einsum("bjhd,bhij->bihd", repeated(v, 2), weights)


def flat_bmm(q, k, v):
    q, k, v = flat(q), flat(repeated(k, 2)), flat(repeated(v, 2))
    return weights_of(q.bmm(k.transpose(1, 2))).bmm(v)


def flat_products_of_whole_weights(q, k, v):
    scores = flat(q).bmm(flat(repeated(k, 2)).mT).view(BATCH, HEADS, LENGTH, LENGTH)
    return weights_of(scores).flatten(0, 1).bmm(flat(repeated(v, 2)))


FORMS = {
    grouped_einsum: OutputForm.BIKGD,
    grouped_matmul: OutputForm.BKGID,
    tokens_first_einsum: OutputForm.BIHD,
    keys_first_einsum: OutputForm.BIHD,
    flat_bmm: OutputForm.FLAT,
    flat_products_of_whole_weights: OutputForm.FLAT,
}


def rewritten(attend, policy=Policy.FULL):
    recorded = record(attend, *tokens_first())
    result = recorded.rewrite(policy)
    if policy is Policy.FULL:
        recorded.check(result)
    return result


@pytest.mark.parametrize("attend", FORMS, ids=lambda f: f.__name__)
def test_it_is_read(attend):
    result = rewritten(attend)
    (site,) = result.sites
    assert site.skip is None, site.skip
    assert (site.output_form, site.became) == (FORMS[attend], "full")
    assert site.mask == CausalMask()
    assert site.scale == pytest.approx(0.3)
    assert tuple(site.q_shape) == (BATCH, HEADS, LENGTH, DIM)
    assert tuple(site.k_shape) == (BATCH, KV_HEADS, LENGTH, DIM)  # before they were repeated
    left = op_counts(result.gm)
    assert not {"softmax", "bmm", "einsum", "matmul", "repeat_interleave"} & set(left), left


@pytest.mark.parametrize("attend", FORMS, ids=lambda f: f.__name__)
def test_a_router_finds_its_query(attend):
    result = rewritten(attend, Policy.ROUTER)
    assert result.sites[0].became == "routed: full or streaming"
    assert op_counts(result.gm)["cond"] == 1


def values_of_other_rows(q, k, v):
    """Flattened heads first, where queries and keys are batch first."""
    mixed = repeated(v, 2).permute(2, 0, 1, 3).flatten(0, 1)
    return weights_of(flat(q).bmm(flat(repeated(k, 2)).mT)).bmm(mixed)


def values_of_queries(q, k, v):
    """The weights' columns are summed over, not their rows."""
    weights = weights_of(torch.einsum("bihd,bjhd->bhij", q, repeated(k, 2)))
    return torch.einsum("bhij,bihd->bjhd", weights, repeated(v, 2))


def keys_of_other_heads(q, k, v):
    k = repeated(k, 2).transpose(1, 2)
    weights = weights_of(q.transpose(1, 2) @ k[:, [1, 0, 2, 3]].mT)
    return weights @ repeated(v, 2).transpose(1, 2)


def heads_interleaved(q, k, v):
    """Head h reads KV head h % 2: tiled, not repeated."""
    k, v = (x.repeat(1, 1, GROUP, 1).transpose(1, 2) for x in (k, v))
    return weights_of(q.transpose(1, 2) @ k.mT) @ v


def summed_over_features_and_heads(q, k, v):
    weights = weights_of(torch.einsum("bihd,bjhd->bij", q, repeated(k, 2)))
    return torch.einsum("bij,bjhd->bihd", weights, repeated(v, 2))


@pytest.mark.parametrize(
    "attend",
    [
        values_of_other_rows,
        values_of_queries,
        keys_of_other_heads,
        heads_interleaved,
        summed_over_features_and_heads,
    ],
    ids=lambda f: f.__name__,
)
def test_what_only_looks_like_it(attend):
    """Equal whatever becomes of it, and never with keys or values of the wrong head."""
    recorded = record(attend, *tokens_first())
    for policy in (Policy.FULL, Policy.SPARSE):
        result = recorded.rewrite(policy)
        if attend in (keys_of_other_heads, heads_interleaved):  # attention, of other tensors
            assert all(tuple(site.k_shape)[1] == HEADS for site in result.sites)
            recorded.check(recorded.rewrite(Policy.FULL))
            continue
        assert all(site.skip is not None for site in result.sites)
        recorded.check(result)


def changed_after_flattening(q, k, v):
    q = q * 1.0
    copy = flat(q).contiguous()
    q.zero_()
    return weights_of(copy.bmm(flat(repeated(k, 2)).mT)).bmm(flat(repeated(v, 2))) + q.sum()


def changed_before_the_values_are_read(q, k, v):
    v = repeated(v, 2)
    last = flat(v)
    weights = weights_of(flat(q).bmm(flat(repeated(k, 2)).mT))
    v.mul_(2.0)
    return weights.bmm(last) + v.sum()


@pytest.mark.parametrize("attend", [changed_after_flattening, changed_before_the_values_are_read])
def test_operands_changed_in_place(attend):
    """A source is read at the attention's place: it must still be what the product read."""
    rewritten(attend)


def test_a_mask_that_each_head_has_of_its_own():
    def attend(q, k, v, slopes):
        q, k, v = flat(q), flat(repeated(k, 2)), flat(repeated(v, 2))
        bias = slopes[:, None, None] * torch.arange(LENGTH)
        return weights_of(q.bmm(k.mT) + bias.repeat(BATCH, 1, 1)).bmm(v)

    recorded = record(attend, *tokens_first(), torch.rand(HEADS))
    result = recorded.rewrite(Policy.SPARSE)
    assert result.sites[0].skip.reason in (
        SkipReason.MASK_UNREADABLE,
        SkipReason.SCORES_UNREADABLE,
    )
    recorded.check(result)
