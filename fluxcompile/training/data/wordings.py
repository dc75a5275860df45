"""What the built-in prompts are worded from: one `Wordings` a split, kept as data.

Placeholders are ``str.format`` fields. Patterns of values and keys are spelled ``#`` for a digit,
``@`` for a capital letter and ``*`` for a word of the split's own list.
"""

import random
import string
from dataclasses import dataclass


def listed(names: str) -> tuple[str, ...]:
    """The words of a long string: a list of names that stays readable in its file."""
    return tuple(names.split())


def _after_value(sentence: str) -> str:
    return sentence.rpartition("{value}")[2]


@dataclass(frozen=True)
class Fact:
    """A sentence to hide, and how to ask for what it says.

    Attributes:
        fact: has ``{key}`` and ``{value}``.
        question: has ``{key}``.
        lead: the beginning of an answer, after which only the value is missing; has ``{key}``.
    """

    fact: str
    question: str
    lead: str

    @property
    def close(self) -> str:
        """What ends the sentence after its value."""
        return _after_value(self.fact)


@dataclass(frozen=True)
class Chain:
    """Two sentences, of which the first (``{a}``, ``{b}``) leads to the second (``{b}``, value)."""

    link: str
    fact: str
    question: str
    lead: str

    @property
    def close(self) -> str:
        """What ends the second sentence after its value."""
        return _after_value(self.fact)


@dataclass(frozen=True)
class Wordings:
    """All wordings of one split.

    Attributes:
        openings: lines over a document, before anything is asked.
        ask_first: how a question, ``{question}``, is put before the document.
        ask_last: how it is put after the document.
        brief: asks for the bare answer.
        cues: in plain text, what stands right before an answer: one of these, each as likely as it
            is often here.
        needle, needles: single facts; facts of which several, all in other words, are hidden.
        records: facts that are lines of a table.
        chains: facts in two steps.
        continue_code, continue_prose: ask for the rest of a text.
        sort: asks for the module of the last excerpt; has ``{names}``.
        shot: an excerpt and its module: ``{text}`` and, at the end, ``{name}``.
        places, people, words: what keys, names and words of patterns are drawn from.
        values, record_keys: patterns; those of keys begin with ``*``.
        fillers: what a document around facts is made of, each as likely as it is often here.
    """

    openings: tuple[str, ...]
    ask_first: tuple[str, ...]
    ask_last: tuple[str, ...]
    brief: tuple[str, ...]
    cues: tuple[str, ...]
    needle: tuple[Fact, ...]
    needles: tuple[Fact, ...]
    records: tuple[Fact, ...]
    chains: tuple[Chain, ...]
    continue_code: tuple[str, ...]
    continue_prose: tuple[str, ...]
    sort: tuple[str, ...]
    shot: tuple[str, ...]
    places: tuple[str, ...]
    people: tuple[str, ...]
    words: tuple[str, ...]
    values: tuple[str, ...]
    record_keys: tuple[str, ...]
    fillers: tuple[str, ...]

    def draw_values(self, n: int, rng: random.Random) -> list[str]:
        """``n`` different values of one pattern."""
        pattern = rng.choice(self.values)
        drawn: dict[str, None] = {}
        while len(drawn) < n:
            drawn[self._fill(pattern, rng)] = None
        return list(drawn)

    def draw_record_keys(self, n: int, rng: random.Random) -> list[str]:
        """``n`` keys of one pattern, no two of which begin with the same word."""
        pattern = rng.choice(self.record_keys)
        words = rng.sample(self.words, n)
        return [self._fill(pattern.replace("*", word, 1), rng) for word in words]

    def _fill(self, pattern: str, rng: random.Random) -> str:
        draw = {
            "#": lambda: rng.choice(string.digits),
            "@": lambda: rng.choice(string.ascii_uppercase),
            "*": lambda: rng.choice(self.words),
        }
        return "".join(draw[sign]() if sign in draw else sign for sign in pattern)
