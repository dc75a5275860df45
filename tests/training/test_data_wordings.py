"""Held-out prompts share no wording, no name and no form of value with the training prompts."""

import dataclasses
import itertools
import random
import re
import string

import pytest

from fluxcompile.training.data import WORDINGS
from fluxcompile.training.data.retrieval import RECORDS
from fluxcompile.training.data.wordings import Chain, Fact

FIELDS = [field.name for field in dataclasses.fields(WORDINGS["train"])]
TEXTS = [name for name in FIELDS if name not in ("fillers", "cue")]


def strings(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Fact | Chain):
        value = [text for text in dataclasses.astuple(value) if text]
    return list(itertools.chain.from_iterable(map(strings, value)))


def everything(split: str) -> list[str]:
    return [text.lower() for name in TEXTS for text in strings(getattr(WORDINGS[split], name))]


def test_no_wording_is_in_both_splits():
    assert not set(everything("train")) & set(everything("heldout"))
    assert not set(WORDINGS["train"].cues) & set(WORDINGS["heldout"].cues)
    assert WORDINGS["train"].fillers != WORDINGS["heldout"].fillers


def test_no_wording_contains_one_of_the_other_split():
    for train, heldout in itertools.product(
        strings(WORDINGS["train"].needle + WORDINGS["train"].needles),
        strings(WORDINGS["heldout"].needle + WORDINGS["heldout"].needles),
    ):
        bare = [re.sub(r"\{\w+\}", "…", text).strip(".?") for text in (train, heldout)]
        assert bare[0] not in bare[1]
        assert bare[1] not in bare[0]


def test_training_values_have_digits_and_held_out_values_none():
    rng = random.Random(0)
    train = [WORDINGS["train"].draw_values(9, rng) for _ in range(20)]
    held = [WORDINGS["heldout"].draw_values(9, rng) for _ in range(20)]
    assert all(any(c.isdigit() for c in value) for values in train for value in values)
    assert not any(c.isdigit() for values in held for value in values for c in value)
    assert all(len(set(values)) == 9 for values in train + held)


@pytest.mark.parametrize("split", WORDINGS)
def test_placeholders_are_the_promised_ones(split):
    def fields(text: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}

    wordings = WORDINGS[split]
    for fact in wordings.needle + wordings.needles + wordings.records:
        assert fields(fact.fact) == {"key", "value"}
        assert fields(fact.question) == fields(fact.lead) == {"key"}
    for chain in wordings.chains:
        assert fields(chain.link) == {"a", "b"}
        assert fields(chain.fact) == {"b", "value"}
        assert fields(chain.question) == fields(chain.lead) == {"a"}
    assert all(fields(text) == {"question"} for text in wordings.ask_first + wordings.ask_last)
    assert all(fields(text) == {"names"} for text in wordings.sort)
    assert all(text.endswith(" {name}") and "{text}" in text for text in wordings.shot)


@pytest.mark.parametrize("split", WORDINGS)
def test_there_are_enough_names_for_every_form(split):
    wordings = WORDINGS[split]
    assert min(len(set(wordings.places)), len(set(wordings.people))) >= 40
    assert len(set(wordings.words)) >= RECORDS[1]
    rng = random.Random(0)
    for _ in range(20):
        keys = wordings.draw_record_keys(RECORDS[1], rng)
        assert len({re.split("[^a-z]", key)[0] for key in keys}) == RECORDS[1]
