"""Every sparse mode of the configuration: its operator, and that it computes its definition."""

import pytest
import torch
from torch.nn import functional

from fluxcompile.config import SPARSE_MODES, FluxConfig
from fluxcompile.kernels.power import reference as power
from fluxcompile.kernels.streaming import reference as streaming
from fluxcompile.kernels.triangle import reference as triangle
from fluxcompile.kernels.xattention import reference as xattention
from fluxcompile.passes.branch_attention import FIELDS
from fluxcompile.passes.plan import Policy

from .graphs import op_counts, record

REFERENCES = {
    "streaming": streaming, "triangle": triangle, "power": power, "xattention": xattention,
}  # fmt: skip
SIZES = {"sink": 2, "local": 9, "last": 5, "block": 16, "stride": 4, "threshold": 0.3}


def config_of(mode, **fields):
    return FluxConfig(sparse=mode, pool_size=3, **SIZES | fields)


def definition(mode, q, k, v, valid, route=None):
    """The mode's eager definition, ``[B, H, Sq, D]``."""
    options = {field: SIZES[field] for field in FIELDS[mode]}
    scale = q.shape[-1] ** -0.5
    out = REFERENCES[mode].attention(q, k, v, valid, None, route, **options, scale=scale)
    return out.transpose(1, 2)


def prompt(length=100, pads=(0, 20)):
    q, k, v = (4 * torch.randn(len(pads), 4, length, 8) for _ in range(3))
    valid = torch.ones(len(pads), length, dtype=torch.bool)
    for row, pad in enumerate(pads):
        valid[row, :pad] = False
    return q, k, v, valid


def attend(q, k, v, valid):
    length = q.shape[2]
    index = torch.arange(length)
    mask = (index <= index[:, None]) & valid[:, None, None, :]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("mode", SPARSE_MODES)
def test_sparse_prefill(mode):
    operands = prompt()
    recorded = record(attend, *operands)
    result = recorded.rewrite(Policy.SPARSE, config_of(mode))
    assert op_counts(result.gm)[f"{mode}_attention.default"] == 1
    assert result.sites[0].became == mode
    (got,) = recorded.run(result.gm)
    expected = definition(mode, *operands)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    full = definition(mode, *operands, route=torch.tensor([True, True]))
    assert (got - full).abs().max() > 0.1  # the pattern does leave something out


@pytest.mark.parametrize(
    ("mode", "reach"), [("streaming", 11), ("triangle", 11), ("power", 11), ("xattention", 32)]
)
def test_short_prompts_are_full(mode, reach):
    for length, short in ((reach, True), (reach + 1, False)):
        recorded = record(attend, *prompt(length, (0, 3)))
        result = recorded.rewrite(Policy.SPARSE, config_of(mode))
        assert result.sites[0].became.startswith("full") == short
        if short:
            assert op_counts(result.gm)[f"{mode}_attention.default"] == 0


@pytest.mark.parametrize("mode", SPARSE_MODES)
def test_where_short_is_full_the_operator_agrees(mode):
    """At the very boundary the mode's own definition is full attention."""
    reach = 32 if mode == "xattention" else 11
    for pads in ((0, 3), (0, 0)):
        operands = prompt(reach, pads)
        everything = torch.tensor([True, True])
        torch.testing.assert_close(
            definition(mode, *operands), definition(mode, *operands, route=everything)
        )


def routed(recorded, rows, **fields):
    """The rewritten graph's output where the rows' routes are ``rows``, and its one site."""
    result = recorded.rewrite(Policy.ROUTER, config_of("streaming", **fields))
    (node,) = result.gm.graph.find_nodes(
        op="call_function", target=torch.ops.flux.route_rows.default
    )
    with result.gm.graph.inserting_after(node):
        given = result.gm.graph.call_function(torch.tensor, (list(rows),))
    node.replace_all_uses_with(given)
    result.gm.recompile()
    return recorded.run(result.gm)[0], result


@pytest.mark.parametrize(
    "rows", [(True, True), (False, False), (True, False), (False, True)], ids=str
)
def test_retrieval_rows_use_xattention(rows):
    """Each row is what it would be alone, whatever the other rows are routed to."""
    operands = prompt()
    recorded = record(attend, *operands)
    route = torch.tensor(rows)
    got, result = routed(recorded, rows, retrieval="xattention")
    assert result.sites[0].became == "routed: xattention or streaming"
    xa, streaming_rows = definition("xattention", *operands), definition("streaming", *operands)
    expected = torch.where(route[:, None, None, None], xa, streaming_rows)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows", [(True,), (False,)], ids=str)
def test_retrieval_of_one_row_is_one_branch(rows):
    operands = prompt(pads=(7,))
    recorded = record(attend, *operands)
    got, result = routed(recorded, rows, retrieval="xattention")
    assert op_counts(result.gm)["cond"] == 1
    mode = "xattention" if rows[0] else "streaming"
    torch.testing.assert_close(got, definition(mode, *operands), atol=2e-5, rtol=2e-5)


def test_retrieval_and_sparse_alike_need_no_branch():
    recorded = record(attend, *prompt())
    config = config_of("xattention", retrieval="xattention")
    result = recorded.rewrite(Policy.ROUTER, config)
    assert op_counts(result.gm)["cond"] == 0
    assert op_counts(result.gm)["xattention_attention.default"] == 1
    assert len(result.routes.decided) == 1  # still kept for decode


def test_retrieval_on_a_short_prompt_is_full():
    recorded = record(attend, *prompt(32, (0, 3)))
    result = recorded.rewrite(Policy.ROUTER, config_of("streaming", retrieval="xattention"))
    assert result.sites[0].became == "routed: full or streaming"
