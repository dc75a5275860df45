"""A sparse kernel that runs out of memory: the error comes through, and the next call works."""

import pytest
import torch
from transformers import DynamicCache

import fluxcompile
from fluxcompile.kernels.decode import cpu as decode_cpu
from fluxcompile.kernels.streaming import cpu as streaming_cpu
from tests.parity.harness import (
    all_rows,
    assert_follows,
    assert_logits,
    compiled,
    definition_of,
    forward,
    generate,
)
from tests.parity.models import flux_config, prompt, random_router, tiny_model
from tests.parity.reference import routed_logits


@pytest.fixture
def scarce(monkeypatch):
    """``scarce(module, at)``: the kernel's n-th block finds no memory; the others do."""

    def make(module, at):
        real, calls = module.attend, []

        def attend(*operands, **options):
            calls.append(None)
            if len(calls) == at:
                raise torch.OutOfMemoryError("simulated: tried to allocate 2 GiB")
            return real(*operands, **options)

        monkeypatch.setattr(module, "attend", attend)

    return make


@pytest.mark.parametrize("at", [1, 3])
def test_prefill(scarce, at):
    model, twin, given = tiny_model("llama"), tiny_model("llama"), prompt(2, 63, "left")
    compiled(model, routes="sparse", config=flux_config(), strict=True)
    scarce(streaming_cpu, at)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        forward(model, given, use_cache=False)
    definition = definition_of(all_rows(2, (0, 0)), flux_config())
    wanted = routed_logits(twin, definition, given.ids, attention_mask=given.mask, use_cache=False)
    assert_logits(forward(model, given, use_cache=False), wanted, given.valid)


def test_a_prompt_after_one_that_failed_halfway(scarce):
    """Routes of the prompt that failed are not those of the next."""
    model, twin = tiny_model("llama"), tiny_model("llama")
    fluxcompile.attach(model, random_router(model, seed=0))
    compiled(model, strict=True)
    generate(model, prompt(3, 63, "left", seed=1), 2)
    before = fluxcompile.routes(model).fa
    scarce(streaming_cpu, 2)
    given = prompt(3, 63, "left")
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, given, 2)
    assert torch.equal(fluxcompile.routes(model).fa, before)
    got = generate(model, given, 3)
    full = fluxcompile.routes(model).fa
    assert not torch.equal(full, before)
    assert_follows(twin, got, given, definition_of(full, flux_config()))


def test_decode_and_then_another_generation(scarce):
    model, twin, given = tiny_model("llama"), tiny_model("llama"), prompt(2, 63, "left")
    compiled(model, routes="sparse", config=flux_config(), strict=True)
    scarce(decode_cpu, 1)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, given, 3, past_key_values=DynamicCache())
    got = generate(model, given, 3)
    assert_follows(twin, got, given, definition_of(all_rows(2, (0, 0)), flux_config()))
