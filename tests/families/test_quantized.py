"""Quantised backbones: the router still finds its query, whatever its projection is made of."""

import pytest
import torch

import fluxcompile
from tests.families.drive import defined, in_steps, make_router, mixed_router
from tests.families.families import FAMILIES
from tests.families.quantized import quantize
from tests.families.test_families import STEPS, config, tokens_of
from tests.parity.harness import assert_logits, compiled, definition_of


def by_torchao(bits: int):
    """Weight-only, weights in a tensor subclass."""

    def apply(model):
        torchao = pytest.importorskip("torchao.quantization")
        granularity = pytest.importorskip("torchao.quantization.granularity")
        if bits == 8:
            torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        else:
            rows = granularity.PerAxis(0)
            torchao.quantize_(
                model, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=rows)
            )
        return model

    return apply


QUANTIZED = {"buffers": quantize, "torchao-int8": by_torchao(8), "torchao-int4": by_torchao(4)}
slow = pytest.mark.slow
CASES = [
    ("Llama", "buffers"),
    pytest.param("Qwen3", "buffers", marks=slow),
    pytest.param("Phi-3", "buffers", marks=slow),
    ("Llama", "torchao-int8"),
    pytest.param("Llama", "torchao-int4", marks=slow),
]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_rows_route_by_themselves(name, how):
    """As the model without quantisation: what is read, what is decided, what is computed."""
    family = next(family for family in FAMILIES if family.name == name)
    model, twin = QUANTIZED[how](family.make()), QUANTIZED[how](family.make())
    given, tokens, steps = tokens_of(family, STEPS)
    seed, full = mixed_router(family, twin, config(), given)
    fluxcompile.attach(model, make_router(family, model, config(), seed))
    made = compiled(model, strict=True)
    got = in_steps(family, model, tokens, steps)
    assert fluxcompile.routes(model).fa.tolist() == full.tolist()
    assert_logits(got, defined(family, twin, definition_of(full, config()), tokens), tokens.valid)
    assert made.became == {"routed: full or streaming", "decode by device-side route"}
