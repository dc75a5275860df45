"""A ``FluxCache`` in the parity tests: made, driven and compared with a cache that keeps all."""

from __future__ import annotations

import warnings

import pytest
from transformers import DynamicCache, PreTrainedModel

import fluxcompile
from tests.parity.harness import Generated, generate
from tests.parity.models import LOCAL, SINK, Prompt

SPARE = 4
#: tokens that a trimmed layer may have more than what it keeps before it is trimmed
SLOTS = SINK + LOCAL + SPARE + 1
ROOM = 192

#: a cache that grows, and one of fixed size
KINDS = [pytest.param(None, id="growing"), pytest.param(ROOM, id="fixed")]
#: both, of which one is for the full matrix: the code between them differs little there
GROWING = [KINDS[0], pytest.param(ROOM, id="fixed", marks=pytest.mark.slow)]
FIXED = [pytest.param(None, id="growing", marks=pytest.mark.slow), KINDS[1]]


def one_kind_each(first, second) -> list:
    """Pairs of a case and a kind: ``first`` growing, ``second`` fixed, the other two if slow."""
    cases = [(first, None), (second, ROOM), (first, ROOM), (second, None)]
    return [
        pytest.param(case, room, id=f"{case}-{'fixed' if room else 'growing'}", marks=marks)
        for (case, room), marks in zip(cases, [(), (), *[pytest.mark.slow] * 2], strict=True)
    ]


def flux_cache(model: PreTrainedModel, max_length: int | None = None, spare: int = SPARE):
    return fluxcompile.FluxCache(model, sink=SINK, local=LOCAL, spare=spare, max_length=max_length)


def untrimmed(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def generate_with(model: PreTrainedModel, prompt: Prompt, new: int, cache, **options) -> Generated:
    """Greedy ``generate`` of exactly ``new`` tokens on top of ``cache``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer names of past_key_values
        return generate(model, prompt, new, disable_compile=False, past_key_values=cache, **options)
