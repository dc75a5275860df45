"""What counts as an attention, how its parts are read, and when it is left alone."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from fluxcompile.passes.site import SkipReason

from .graphs import SDPA, Layer, eager_softmax, hidden, op_counts, qkv, record

INF = float("inf")


def causal(q, dtype=torch.float32):
    """Additive causal mask ``[1, 1, S, S]``, in terms that can be read back."""
    place = torch.arange(q.shape[2])
    return torch.where(place[None, :] <= place[:, None], 0.0, -INF)[None, None].to(dtype)


def scores(q, k):
    return q @ k.transpose(2, 3)


def softmax(x):
    return functional.softmax(x, dim=-1)


def read(attend, *operands, **kwargs):
    """The one site, after checking that its rewrite computes the same."""
    recorded = record(attend, *(operands or qkv()), **kwargs)
    result = recorded.rewrite()
    recorded.check(result)
    (site,) = result.sites
    return site


SDPA_FORMS = {
    "positional": lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, None, 0.0, True),
    "keywords": lambda q, k, v: functional.scaled_dot_product_attention(
        query=q, key=k, value=v, is_causal=True, dropout_p=0.0
    ),
    "mixed": lambda q, k, v: functional.scaled_dot_product_attention(
        q, k, value=v, attn_mask=None, is_causal=True
    ),
    "mask-positional": lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, causal(q)),
    "mask-keyword": lambda q, k, v: functional.scaled_dot_product_attention(
        q, k, v, attn_mask=causal(q)
    ),
}


@pytest.mark.parametrize("form", SDPA_FORMS)
def test_sdpa_forms(form):
    site = read(SDPA_FORMS[form])
    assert (site.scale, site.softcap, site.became) == (1 / math.sqrt(8), 0.0, "full")


@pytest.mark.parametrize("dynamic", [False, True])
def test_sdpa_scale(dynamic):
    """``dynamic=True`` turns the scale into a graph input; it is read all the same."""

    class Scaled(nn.Module):
        scaling = 0.37

        def forward(self, q, k, v):
            return functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scaling
            )

    site = read(Scaled(), dynamic=dynamic)
    assert site.scale == 0.37


def in_place(q, k, v):
    product = scores(q, k)
    product *= 0.3
    product += causal(q)
    return softmax(product) @ v


WRITTEN_OUT = {
    "bare": (lambda q, k, v: softmax(scores(q, k) + causal(q)) @ v, 1.0, 0.0),
    "mul": (lambda q, k, v: softmax(scores(q, k) * 0.3 + causal(q)) @ v, 0.3, 0.0),
    "mul-left": (lambda q, k, v: softmax(0.3 * scores(q, k) + causal(q)) @ v, 0.3, 0.0),
    "div": (lambda q, k, v: softmax(scores(q, k) / 4.0 + causal(q)) @ v, 0.25, 0.0),
    "mul-and-div": (lambda q, k, v: softmax(scores(q, k) * 2 / 8.0 + causal(q)) @ v, 0.25, 0.0),
    "mask-first": (lambda q, k, v: softmax(causal(q) + scores(q, k) * 0.3) @ v, 0.3, 0.0),
    "torch-functions": (
        lambda q, k, v: torch.matmul(
            torch.softmax(
                torch.add(torch.mul(torch.matmul(q, k.transpose(-1, -2)), 0.3), causal(q)), -1
            ),
            v,
        ),
        0.3,
        0.0,
    ),
    "permute": (
        lambda q, k, v: softmax(q @ k.permute(0, 1, 3, 2) * 0.3 + causal(q)) @ v, 0.3, 0.0
    ),
    "last-axis-by-number": (
        lambda q, k, v: (scores(q, k) * 0.3 + causal(q)).softmax(3) @ v, 0.3, 0.0
    ),
    "softcap": (
        lambda q, k, v: softmax(torch.tanh(scores(q, k) * 0.3 / 5.0) * 5.0 + causal(q)) @ v,
        0.3,
        5.0,
    ),
    "softcap-left": (
        lambda q, k, v: softmax(5.0 * torch.tanh(0.2 * (0.3 * scores(q, k))) + causal(q)) @ v,
        0.3,
        5.0,
    ),
    "fp32-softmax": (
        lambda q, k, v: functional.softmax(
            scores(q, k) * 0.3 + causal(q), dim=-1, dtype=torch.float32
        ).to(q.dtype)
        @ v,
        0.3,
        0.0,
    ),
    "upcast-scores": (
        lambda q, k, v: softmax(scores(q, k).float() * 0.3 + causal(q)).type_as(v) @ v, 0.3, 0.0
    ),
    "in-place": (lambda q, k, v: in_place(q, k, v), 0.3, 0.0),
    "filled": (
        lambda q, k, v: softmax((scores(q, k) * 0.3).masked_fill(causal(q) != 0, -1e9)) @ v,
        0.3,
        0.0,
    ),
    "filled-then-scaled": (
        lambda q, k, v: softmax(scores(q, k).masked_fill(causal(q) != 0, -INF) * 0.3) @ v,
        0.3,
        0.0,
    ),
    "selected": (
        lambda q, k, v: softmax(torch.where(causal(q) == 0, scores(q, k), -INF)) @ v, 1.0, 0.0
    ),
    "scaled-operands": (
        lambda q, k, v: softmax((q * 0.5) @ (k / 2.0).mT + causal(q)) @ v, 0.25, 0.0
    ),
    "constant-tensor": (
        lambda q, k, v: softmax(scores(q, k) / torch.tensor(4.0) + causal(q)) @ v, 0.25, 0.0
    ),
    "idle-dropout": (
        lambda q, k, v: functional.dropout(
            softmax(scores(q, k) * 0.3 + causal(q)), p=0.5, training=False
        )
        @ v,
        0.3,
        0.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", WRITTEN_OUT)
def test_written_out(form):
    attend, scale, softcap = WRITTEN_OUT[form]
    site = read(attend)
    assert site.became == "full", site.skip
    assert (site.scale, site.softcap) == (pytest.approx(scale), pytest.approx(softcap))


def test_low_precision_is_read_through_its_casts():
    q, k, v = (x.bfloat16() for x in qkv())
    recorded = record(lambda q, k, v: eager_softmax(q, k, v, causal(q, q.dtype)), q, k, v)
    (site,) = recorded.rewrite().sites
    assert site.became == "full"
    assert op_counts(recorded.rewrite().gm)["softmax"] == 0


def test_other_head_dims_of_scale():
    q, k, v = qkv(dim=16)
    assert read(lambda q, k, v: eager_softmax(q, k, v, causal(q)), q, k, v).scale == 0.25


def weights_returned(q, k, v):
    weights = softmax(scores(q, k) + causal(q))
    return weights @ v, weights


def weights_summed(q, k, v):
    weights = softmax(scores(q, k) + causal(q))
    return weights @ v, weights.sum()


def weights_changed(q, k, v):
    weights = softmax(scores(q, k) + causal(q))
    weights[..., 0] = 0
    return weights @ v


def scores_changed(q, k, v):
    product = scores(q, k)
    product.mul_(0.3)
    return softmax(product + causal(q)) @ v


def mask_added_in_place(q, k, v):
    product = scores(q, k)
    product.add_(causal(q))
    return softmax(product) @ v


def query_changed_between(q, k, v):
    q = q * 1.0
    product = scores(q, k)
    q.zero_()
    return softmax(product + causal(q)) @ v + q


def softcap_divided(q, k, v):
    return softmax(torch.tanh(scores(q, k) / 3.0) / 3.0 + causal(q)) @ v


def softcap_of_two(q, k, v):
    return softmax(torch.tanh(scores(q, k) / 3.0) * 5.0 + causal(q)) @ v


def softcap_over_mask(q, k, v):
    return softmax(torch.tanh((scores(q, k) + causal(q).clamp(min=-9.0)) / 3.0) * 3.0) @ v


def scaled_by_a_tensor(q, k, v):
    return softmax(scores(q, k) * q.new_full((), 0.3) + causal(q)) @ v


def two_added(q, k, v):
    return softmax(scores(q, k) + causal(q) + torch.linspace(0, 1, q.shape[2])) @ v


def filled_with_little(q, k, v):
    return softmax(scores(q, k).masked_fill(causal(q) != 0, -1e4)) @ v


def filled_before_scaling(q, k, v):
    """A finite bias is not what it was after a scale."""
    return softmax(scores(q, k).masked_fill(causal(q) != 0, -1e5) * 0.01) @ v


def filled_before_softcap(q, k, v):
    return softmax(torch.tanh(scores(q, k).masked_fill(causal(q) != 0, -INF) / 3.0) * 3.0) @ v


def a_bool_added(q, k, v):
    return softmax(scores(q, k) + (causal(q) == 0)) @ v


def scaled_down_below_zero(q, k, v):
    return softmax(scores(q, k) * -0.3 + causal(q)) @ v


LEFT_ALONE = {
    weights_returned: SkipReason.WEIGHTS_RETURNED,
    weights_summed: SkipReason.WEIGHTS_RETURNED,
    weights_changed: SkipReason.WEIGHTS_RETURNED,
    scores_changed: SkipReason.SCORES_UNREADABLE,
    mask_added_in_place: SkipReason.SCORES_UNREADABLE,
    query_changed_between: SkipReason.SCORES_UNREADABLE,
    softcap_divided: SkipReason.SCORES_UNREADABLE,
    softcap_of_two: SkipReason.SCORES_UNREADABLE,
    softcap_over_mask: SkipReason.SCORES_UNREADABLE,
    scaled_by_a_tensor: SkipReason.SCORES_UNREADABLE,
    two_added: SkipReason.MASK_UNREADABLE,
    filled_with_little: SkipReason.SCORES_UNREADABLE,
    filled_before_scaling: SkipReason.SCORES_UNREADABLE,
    filled_before_softcap: SkipReason.SCORES_UNREADABLE,
    a_bool_added: SkipReason.MASK_UNREADABLE,
    scaled_down_below_zero: SkipReason.SCALE_UNREADABLE,
}


@pytest.mark.parametrize("attend", LEFT_ALONE, ids=lambda f: f.__name__)
def test_written_out_and_left_alone(attend):
    site = read(attend)
    assert site.skip is not None
    assert site.skip.reason is LEFT_ALONE[attend]
    assert site.became == "left alone"


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=0.5
        ),
        lambda q, k, v: functional.dropout(softmax(scores(q, k) + causal(q)), 0.5, True) @ v,
        lambda q, k, v: functional.dropout(softmax(scores(q, k) + causal(q))) @ v,
    ],
    ids=["sdpa", "written-out", "written-out-defaults"],
)
def test_active_dropout(attend):
    (site,) = record(attend, *qkv()).rewrite().sites
    assert site.skip.reason is SkipReason.DROPOUT
    assert "0.5" in site.skip.detail


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: softmax(scores(q.float(), k.float()) + causal(q)).to(v.dtype) @ v,
        lambda q, k, v: softmax(scores(q, k).float() + causal(q)) @ v.float(),
    ],
    ids=["query-and-key", "value"],
)
def test_mixed_dtypes(attend):
    site = read(attend, *(x.bfloat16() for x in qkv()))
    assert site.skip.reason is SkipReason.DTYPES


SHAPES = {
    "three-axes": lambda q, k, v: [x[0] for x in (q, k, v)],
    "five-axes": lambda q, k, v: [x[None] for x in (q, k, v)],
    "narrow-values": lambda q, k, v: [q, k, v[..., :4]],
    "one-batch-of-keys": lambda q, k, v: [q, k[:1], v[:1]],
    "keys-with-fewer-heads": lambda q, k, v: [q, k[:, :1], v],
    "wide-heads": lambda q, k, v: [x.repeat(1, 1, 1, 33) for x in (q, k, v)],
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_no_kernel_takes(name):
    def attend(q, k, v):
        q, k, v = SHAPES[name](q, k, v)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    site = read(attend)
    assert site.skip.reason is SkipReason.SHAPES


@pytest.mark.parametrize(
    "attend",
    [
        functional.scaled_dot_product_attention,
        lambda q, k, v: eager_softmax(q, k, v),
        lambda q, k, v: functional.scaled_dot_product_attention(q[:, :, :4], k, v),
        # PyTorch aligns is_causal at the upper left: query 0 sees key 0 alone
        lambda q, k, v: functional.scaled_dot_product_attention(q[:, :, :1], k, v, is_causal=True),
        lambda q, k, v: functional.scaled_dot_product_attention(q[:, :, 2:], k, v, is_causal=True),
    ],
    ids=["sdpa", "written-out", "cross", "one-query-upper-left", "upper-left"],
)
def test_not_causal(attend):
    assert read(attend).skip.reason is SkipReason.NOT_CAUSAL


NOT_ATTENTION = {
    "vocabulary": lambda q, k, v: softmax(q @ torch.ones(8, 5)),
    "experts": lambda q, k, v: softmax(q.sum(1)).topk(2).values,
    "other-axis": lambda q, k, v: functional.softmax(scores(q, k), dim=2) @ v,
    "pooling": lambda q, k, v: softmax(q.mean(-1, keepdim=True).transpose(2, 3)) @ v,
    "weights-on-the-right": lambda q, k, v: v.transpose(2, 3) @ softmax(scores(q, k)),
    "gate": lambda q, k, v: softmax(q) * v,
}


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_a_softmax_that_is_no_attention(name):
    recorded = record(NOT_ATTENTION[name], *qkv())
    assert recorded.sites() == []
    assert recorded.before["softmax"] == 1


def test_every_layer_is_found_in_order():
    model = nn.Sequential(*(Layer() for _ in range(3)))
    sites = record(model, hidden()).sites()
    assert [site.index for site in sites] == [0, 1, 2]
    assert [site.path for site in sites] == ["0", "1", "2"]
    assert [site.layer for site in sites] == [0, 1, 2]


def test_layers_of_other_attentions_do_not_shift_the_count():
    """Static routes count causal self-attentions only."""
    model = nn.Sequential(
        Layer(), Layer(functional.scaled_dot_product_attention), Layer(), Layer(weights_free)
    )
    sites = record(model, hidden()).sites()
    assert [site.layer for site in sites] == [0, None, 1, 2]


def weights_free(q, k, v):
    return eager_softmax(q, k, v, causal(q))


def test_analysis_changes_nothing():
    recorded = record(nn.Sequential(Layer(), Layer()), hidden())
    code = recorded.gm.code
    recorded.analyse()
    assert recorded.gm.code == code
    assert op_counts(recorded.gm) == recorded.before
    assert recorded.before[SDPA] == 2
