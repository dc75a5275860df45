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
