"""A real pretrained model on real text."""

import pydoc_data.topics

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

import fluxcompile
from fluxcompile import smollm2
from tests.parity.harness import (
    Generated,
    all_rows,
    assert_same_generation,
    compiled,
    eager,
    generate,
    reference_after,
)
from tests.parity.models import Prompt, flux_config
from tests.parity.reference import RoutedDefinition


@pytest.fixture(scope="module")
def real():
    try:
        model, tokenizer = smollm2.load()
    except smollm2.ModelMissingError as missing:
        pytest.skip(str(missing))
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False), tokenizer


def test_the_architecture_is_what_the_file_says():
    try:
        file = smollm2.gguf_path()
    except smollm2.ModelMissingError as missing:
        pytest.skip(str(missing))
    written = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    given = LlamaConfig(**smollm2.ARCHITECTURE)
    rounded = {"rms_norm_eps": pytest.approx(written.rms_norm_eps, rel=1e-6)}
    for name in smollm2.ARCHITECTURE:
        assert getattr(given, name) == rounded.get(name, getattr(written, name)), name
    assert given.hidden_act == written.hidden_act
    assert not written.attention_bias
    assert not written.mlp_bias


def text(tokenizer, words) -> Prompt:
    topic = pydoc_data.topics.topics["assignment"].split()
    batch = tokenizer([" ".join(topic[:n]) for n in words], return_tensors="pt", padding=True)
    return Prompt(batch["input_ids"], batch["attention_mask"])


@pytest.mark.slow
def test_full_is_eager(real):
    model, tokenizer = real
    given = text(tokenizer, (40, 90))
    expected = generate(model, given, 4)
    try:
        made = compiled(model, routes="full", strict=True)
        assert_same_generation(generate(model, given, 4), expected)
        assert made.became == {"full", "full decode"}
        assert len(made.reports[0].rows) == 30
    finally:
        eager(model)


@pytest.mark.slow
def test_static_pattern_is_the_reference(real):
    model, tokenizer = real
    given, config = text(tokenizer, (40, 90)), flux_config(sink=8, local=32)
    pattern = smollm2.static_routes()
    try:
        compiled(model, routes=pattern, config=config, strict=True)
        got = generate(model, given, 4)
    finally:
        eager(model)
    assert fluxcompile.routes(model).fa.tolist() == [[bool(x) for x in pattern]] * 2
    definition = RoutedDefinition(all_rows(2, pattern), config.sink, config.local)
    logits = reference_after(model, got, given, definition)
    expected = Generated(logits.argmax(-1), logits)
    assert_same_generation(got, expected)
    full = RoutedDefinition(torch.ones(2, 30, dtype=torch.bool), 0, 1)
    assert (reference_after(model, got, given, full) - logits).abs().max() > 0.1
