"""Views that were made for an attention go when it is left alone after all."""

import torch

from fluxcompile.passes.plan import Policy

from .graphs import op_counts, record


def attend(q, k, v, bias):
    scores = torch.einsum("bikgd,bjkd->bkgij", q.unflatten(2, (2, 2)), k) + bias
    return torch.einsum("bkgij,bjkd->bikgd", scores.softmax(-1), v)


def traced(bias):
    q, k, v = (torch.randn(2, 10, heads, 8) for heads in (4, 2, 2))
    return record(attend, q, k, v, bias)


def test_left_alone_is_what_it_was():
    recorded = traced(torch.randn(10, 10))  # a bias, and no mask
    assert op_counts(recorded.analyse().gm)["permute"] == 3
    result = recorded.rewrite(Policy.SPARSE)
    assert result.sites[0].skip is not None
    assert op_counts(result.gm) == recorded.before
    recorded.check(result)


def test_gradients_leave_it_as_it_was():
    from fluxcompile.backend import flux

    def forward(q, k, v):
        place = torch.arange(10)
        return attend(q, k, v, torch.where(place <= place[:, None], 0.0, float("-inf")))

    q, k, v = (torch.randn(2, 10, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    graphs = []

    def backend(gm, inputs):
        graphs.append(flux(gm, inputs, options={"lowering": "eager", "routes": "sparse"}))
        return graphs[-1]

    out = torch.compile(forward, backend=backend)(q, k, v)
    torch.testing.assert_close(out, forward(q, k, v))
    assert op_counts(graphs[0].__self__)["permute"] == 0
