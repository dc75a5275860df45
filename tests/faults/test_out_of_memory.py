"""A sparse kernel that runs out of memory: the error comes through, and the next call works."""

import pytest
import torch

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


def wanted(twin, full, given):
    definition = definition_of(full, flux_config())
    return routed_logits(twin, definition, given.ids, attention_mask=given.mask, use_cache=False)


def test_prefill(scarce):
    model, twin, given = tiny_model("llama"), tiny_model("llama"), prompt(2, 63, "left")
    compiled(model, routes="sparse", config=flux_config(), strict=True)
    scarce(streaming_cpu, 3)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        forward(model, given, use_cache=False)
    logits = forward(model, given, use_cache=False)
    assert_logits(logits, wanted(twin, all_rows(2, (0, 0)), given), given.valid)


def test_a_prompt_after_one_that_failed_halfway(scarce):
    """The routes of a prompt that failed are recorded nowhere, and reach no other prompt."""
    model, twin = tiny_model("llama"), tiny_model("llama")
    fluxcompile.attach(model, random_router(model, seed=0))
    compiled(model, strict=True)
    first, given = prompt(3, 63, "left", seed=1), prompt(3, 63, "left")
    forward(model, first, use_cache=False)
    before = fluxcompile.routes(model).fa
    scarce(streaming_cpu, 2)
    with pytest.raises(torch.OutOfMemoryError):
        forward(model, given, use_cache=False)
    assert torch.equal(fluxcompile.routes(model).fa, before)
    logits = forward(model, given, use_cache=False)
    full = fluxcompile.routes(model).fa
    assert not torch.equal(full, before)
    assert_logits(logits, wanted(twin, full, given), given.valid)


def test_decode_and_then_another_generation(scarce):
    model, twin, given = tiny_model("llama"), tiny_model("llama"), prompt(2, 63, "left")
    compiled(model, dynamic=False, routes="sparse", config=flux_config(), strict=True)
    scarce(decode_cpu, 1)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, given, 2)
    got = generate(model, given, 2)
    assert_follows(twin, got, given, definition_of(all_rows(2, (0, 0)), flux_config()))
