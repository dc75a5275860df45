"""Keys and values before expansion, and expansions that only look like it."""

import pytest
import torch
from torch.nn import functional

from fluxcompile.passes.pipeline import Rewrite
from fluxcompile.passes.site import SkipReason

from .graphs import SDPA, Layer, causal_sdpa, hidden, op_counts, record

B, H, HK, S, D = 2, 4, 2, 10, 8


def operands(heads=HK, batch=B):
    return torch.randn(batch, H, S, D), *(torch.randn(batch, heads, S, D) for _ in range(2))


def expand_reshape(x):
    batch, heads, length, dim = x.shape
    return (
        x[:, :, None].expand(batch, heads, H // heads, length, dim).reshape(batch, H, length, dim)
    )


def tile_expand(x):
    batch, heads, length, dim = x.shape
    return x[:, None].expand(batch, H // heads, heads, length, dim).reshape(batch, H, length, dim)


RECOGNISED = {
    "expand-reshape": expand_reshape,
    "repeat-interleave": lambda x: torch.repeat_interleave(x, H // x.shape[1], dim=1),
    "repeat-interleave-method": lambda x: x.repeat_interleave(H // x.shape[1], 1),
    "stack-of-views": lambda x: expand_reshape(x.contiguous()).contiguous(),
    "tokens-first": lambda x: (
        expand_reshape(x.transpose(1, 2)).transpose(1, 2)
        if x.shape[1] == S
        else expand_reshape(x.transpose(1, 2).contiguous().transpose(1, 2))
    ),
}
NOT_RECOGNISED = {
    "tiled": lambda x: x.repeat(1, H // x.shape[1], 1, 1),
    "tile-expand": tile_expand,
    "heads-swapped": lambda x: expand_reshape(x)[:, [1, 0, 3, 2]],
    "heads-rolled": lambda x: expand_reshape(x).roll(1, 1),
    "heads-flipped": lambda x: expand_reshape(x).flip(1),
    "tokens-flipped": lambda x: expand_reshape(x).flip(2),
    "scaled": lambda x: expand_reshape(x) * 2,
}


def rewrite(expand, batch=B, dynamic=False, heads=HK) -> Rewrite:
    recorded = record(
        lambda q, k, v: causal_sdpa(q, expand(k), expand(v)),
        *operands(heads, batch),
        dynamic=dynamic,
    )
    result = recorded.rewrite()
    recorded.check(result)
    return result


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", RECOGNISED)
def test_recognised(name, heads, batch):
    result = rewrite(RECOGNISED[name], batch=batch, heads=heads)
    assert result.sites[0].k_shape[1] == result.sites[0].v.meta["example_value"].shape[1] == heads
    assert not {"expand", "repeat_interleave"} & set(op_counts(result.gm))


@pytest.mark.parametrize("name", ["expand-reshape", "repeat-interleave"])
def test_recognised_with_symbolic_sizes(name):
    def attend(q, k, v):
        return causal_sdpa(q, RECOGNISED[name](k), RECOGNISED[name](v))

    recorded = record(Layer(attend, H, HK, D), hidden(), dynamic=True)
    result = recorded.rewrite()
    recorded.check(result)
    batch, heads, length, dim = result.sites[0].k_shape
    assert (heads, dim) == (HK, D)
    assert isinstance(batch, torch.SymInt)
    assert isinstance(length, torch.SymInt)


@pytest.mark.parametrize("name", NOT_RECOGNISED)
def test_not_recognised(name):
    site = rewrite(NOT_RECOGNISED[name]).sites[0]
    assert site.k_shape[1] == H
    assert site.became == "full"


def test_keys_alone_keep_their_expansion():
    """A kernel takes keys and values with one number of heads."""
    recorded = record(
        lambda q, k, v: causal_sdpa(q, expand_reshape(k), tile_expand(v)), *operands()
    )
    result = recorded.rewrite()
    recorded.check(result)
    assert result.sites[0].k_shape[1] == H


def test_ungrouped_is_left_as_it_is():
    recorded = record(causal_sdpa, *operands(H))
    site = recorded.site()
    assert (site.q.name, site.k.name, site.v.name) == ("l_q_", "l_k_", "l_v_")


def test_grouped_in_the_call():
    recorded = record(lambda q, k, v: causal_sdpa(q, k, v, enable_gqa=True), *operands())
    result = recorded.rewrite()
    recorded.check(result)
    assert result.sites[0].k_shape[1] == HK


CUT = {
    "heads": lambda x: x[:, :HK],
    "one-head": lambda x: x[:, :1],
    "other-heads": lambda x: x[:, HK:],
    "tokens": lambda x: x[:, :, :S],
    "later-tokens": lambda x: x[:, :, 2:],
    "features": lambda x: x[..., :D],
    "batch": lambda x: x[:B],
}


@pytest.mark.parametrize("name", CUT)
def test_a_part_is_not_the_whole(name):
    """Keys cut out of a larger tensor, such as a cache's filled part, stay cut."""
    cut = CUT[name]
    k, v = (torch.randn(B + 1, H, S + 2, D + 8) for _ in range(2))
    k, v = {
        "heads": (k[:B, :, :S, :D], v[:B, :, :S, :D]),
        "one-head": (k[:B, :, :S, :D], v[:B, :, :S, :D]),
        "other-heads": (k[:B, :, :S, :D], v[:B, :, :S, :D]),
        "tokens": (k[:B, :, :, :D], v[:B, :, :, :D]),
        "later-tokens": (k[:B, :, :, :D], v[:B, :, :, :D]),
        "features": (k[:B, :, :S], v[:B, :, :S]),
        "batch": (k[:, :, :S, :D], v[:, :, :S, :D]),
    }[name]

    def attend(q, k, v):
        return causal_sdpa(q, cut(k), cut(v), enable_gqa=True)

    recorded = record(attend, torch.randn(B, H, S, D), k, v)
    result = recorded.rewrite()
    recorded.check(result)
    assert result.sites[0].k_shape == tuple(cut(k).shape)


def change_copy(x):
    x = expand_reshape(x)
    x.mul_(2.0)
    return x


def assign_into_copy(x):
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    x[..., :4] = x[..., :4] * 2
    return expand_reshape(x)


def add_into_copy(x):
    x = x.clone()
    x += 1.0
    return expand_reshape(x)


def change_source_afterwards(x):
    x = x * 1.0
    copied = expand_reshape(x)
    x.zero_()
    return copied


def change_source_before(x):
    x = x * 1.0
    x.mul_(2.0)
    return expand_reshape(x)


@pytest.mark.parametrize(
    "expand",
    [change_copy, assign_into_copy, add_into_copy, change_source_afterwards, change_source_before],
)
def test_in_place_changes(expand):
    """Whatever is recognised, the keys read are those that the attention read."""
    rewrite(expand)


def test_a_broadcast_batch_is_left_alone():
    q, k, v = operands(H)
    recorded = record(lambda q, k, v: causal_sdpa(q, k[:1], v[:1]), q, k, v)
    result = recorded.rewrite()
    recorded.check(result)
    assert result.sites[0].skip.reason is SkipReason.SHAPES
    assert op_counts(result.gm)[SDPA] == 1


def test_a_broadcast_head_is_multi_query():
    q, k, v = operands(1)
    recorded = record(lambda q, k, v: functional.scaled_dot_product_attention(
        q, k, v, is_causal=True), q, k, v)  # fmt: skip
    result = recorded.rewrite()
    recorded.check(result)
    assert result.sites[0].skip is None
