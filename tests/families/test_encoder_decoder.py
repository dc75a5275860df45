"""Encoder-decoders: only the decoder's own attention is routed, and explain says why."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import fluxcompile
from fluxcompile.passes.site import SkipReason
from tests.families.drive import defined, in_steps
from tests.families.families import FAMILIES
from tests.families.family import spread
from tests.families.test_families import STEPS, config, tokens_of
from tests.families.unusual import EncoderDecoder
from tests.parity.harness import all_rows, assert_logits, compiled, definition_of
from tests.parity.models import VOCABULARY, prompt

pytestmark = pytest.mark.families

(BART,) = (family for family in FAMILIES if isinstance(family, EncoderDecoder))
OWN = [f"model.decoder.layers.{layer}.self_attn" for layer in (0, 1)]


def test_cross_attention_is_no_layer():
    """Fixed routes are for the decoder's own two layers, at prefill and in decode steps, where a
    cross-attention has a single query too."""
    model, twin = BART.make(), BART.make()
    assert list(fluxcompile.FluxRouter.from_model(model).layer_names) == OWN
    made = compiled(model, routes=(0, 1), config=config(), strict=True)
    _, tokens, steps = tokens_of(BART, STEPS)
    got = in_steps(BART, model, tokens, steps)
    definition = definition_of(all_rows(3, (0, 1)), config())
    assert_logits(got, defined(BART, twin, definition, tokens), tokens.valid)
    for report, became in zip(made.reports, (("streaming", "full"), None), strict=True):
        own = [row for row in report.rows if row.path in OWN]
        cross = [row for row in report.rows if row.path not in OWN]
        assert [row.became for row in own] == list(became or ("streaming decode", "full decode"))
        assert [row.path.split(".")[-1] for row in cross] == ["encoder_attn"] * 2
        assert {row.became for row in cross} == {"left alone"}
        assert {row.reason for row in cross} == {SkipReason.NOT_CAUSAL}


def test_answers_begin_with_one_token():
    """A query, and more keys than sink and local, none of them its own: nothing to make sparse."""
    model, twin = BART.make(), BART.make()
    made = compiled(model, routes="sparse", config=config(), strict=True)
    _, tokens, steps = tokens_of(BART, (1, 1), "ones")
    got = in_steps(BART, model, tokens, steps)
    definition = definition_of(all_rows(3, (0, 0)), config())
    assert_logits(got, defined(BART, twin, definition, tokens), tokens.valid)
    assert "streaming" not in made.became


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_explain_names_all_three_kinds(padded):
    """The encoder looks both ways, the decoder's own attention is causal, the other one is not."""
    model = BART.make()
    fluxcompile.attach(model, fluxcompile.FluxRouter.from_model(model, config()))
    source, target = prompt(2, 21, "right" if padded else "none"), prompt(2, 30)
    report = fluxcompile.explain(
        model,
        input_ids=source.ids,
        attention_mask=source.mask,
        decoder_input_ids=target.ids,
        use_cache=False,
    )
    found = {row.path: (row.became, row.reason) for row in report.rows}
    left_alone = ("left alone", SkipReason.NOT_CAUSAL)
    for layer in (0, 1):
        assert found.pop(f"model.encoder.layers.{layer}.self_attn") == left_alone
        assert found.pop(f"model.decoder.layers.{layer}.encoder_attn") == left_alone
        assert found.pop(OWN[layer]) == ("routed: full or streaming", None)
    assert not found


def test_relative_position_bias_is_left_alone(record_property):
    """T5 adds a learned bias to its scores, which no kernel knows: full attention, and why."""
    record_property("left alone", "T5")
    torch.manual_seed(7)
    fields = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    model = spread(
        T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **fields, pad_token_id=0)).eval()
    )
    encoded = torch.randn(2, 9, 64)
    inputs = {"encoder_outputs": (encoded,), "decoder_input_ids": prompt(2, 30).ids}
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        made = compiled(model, routes="sparse", config=config())
        with pytest.warns(fluxcompile.FluxWarning, match="full attention, because the mask is not"):
            got = model(**inputs, use_cache=False).logits
    assert_logits(got, expected, torch.ones(2, 30))
    own = {row.reason for row in made.reports[0].rows if "SelfAttention" in row.path}
    assert own == {SkipReason.MASK_UNREADABLE}
    assert made.became == {"left alone"}
