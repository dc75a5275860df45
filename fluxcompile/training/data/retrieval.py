"""Retrieval forms: a document with facts hidden in it, and a question only they answer.

``needle``: one fact. ``needles``: several alike, asked for one or for all. ``key_value``: lines of
a table, together or spread over the document. ``two_hop``: one fact leads to another.
"""

from dataclasses import dataclass, replace

from fluxcompile.training.data.recipe import Recipe
from fluxcompile.training.data.wordings import Chain, Fact

RECORDS = (4, 16)  # lines of a table


@dataclass(frozen=True)
class Hidden:
    """Text to hide at ``depth`` (0: before the document, 1: after it)."""

    depth: float
    text: str  # with its line breaks
    needed: bool  # is the answer in it, or on the way to it?

    @classmethod
    def line(cls, depth: float, text: str, needed: bool) -> "Hidden":
        """A line of its own, with an empty one before it."""
        return cls(depth, f"\n{text}\n", needed)


@dataclass(frozen=True)
class Asked:
    """What is hidden, what is asked, and the answer to it; ``lead`` may open the answer."""

    hidden: list[Hidden]
    question: str
    lead: str
    answer: str
    wording: str


def needle(recipe: Recipe) -> dict:
    i_fact, fact = _choose(recipe, recipe.wordings.needle)
    (key,), (value,) = _pairs(recipe, recipe.wordings.places, 1)
    hidden = [Hidden.line(recipe.rng.random(), fact.fact.format(key=key, value=value), True)]
    question, lead = fact.question.format(key=key), fact.lead.format(key=key)
    return _ask(recipe, Asked(hidden, question, lead, value, f"needle {i_fact}"))


def needles(recipe: Recipe) -> dict:
    i_fact, fact = _choose(recipe, recipe.wordings.needles)
    if recipe.rng.random() < 0.5:
        return _ask(recipe, _one_of(recipe, fact, recipe.rng.randint(3, 8), f"needles {i_fact}"))
    keys, values = _pairs(recipe, recipe.wordings.places, recipe.rng.randint(2, 4))
    depths = sorted(recipe.rng.random() for _ in keys)
    hidden = [
        Hidden.line(depth, fact.fact.format(key=key, value=value), True)
        for depth, key, value in zip(depths, keys, values, strict=True)
    ]
    asked = Asked(hidden, fact.every, "", ", ".join(values), f"needles {i_fact} all")
    return _ask(recipe, asked)


def key_value(recipe: Recipe) -> dict:
    i_fact, fact = _choose(recipe, recipe.wordings.records)
    n = recipe.rng.randint(*RECORDS)
    keys = recipe.wordings.draw_record_keys(n, recipe.rng)
    asked = _one_of(recipe, fact, n, f"key_value {i_fact}", keys)
    if recipe.rng.random() < 0.5:
        return _ask(recipe, asked)
    # Together: texts of one depth stay in order and next to each other.
    depth = recipe.rng.random()
    block = [replace(h, depth=depth, text=h.text.lstrip()) for h in asked.hidden]
    block[0] = replace(block[0], text="\n" + block[0].text)
    return _ask(recipe, replace(asked, hidden=block, wording=f"{asked.wording} block"))


def two_hop(recipe: Recipe) -> dict:
    i_chain, chain = _choose(recipe, recipe.wordings.chains)
    n = recipe.rng.randint(1, 3)
    people, values = _pairs(recipe, recipe.wordings.people, 2 * n)
    hidden = []
    for i_pair in range(n):
        a, b = people[2 * i_pair : 2 * i_pair + 2]
        fact = chain.fact.format(b=b, value=values[i_pair])
        for text in (chain.link.format(a=a, b=b), fact):
            hidden.append(Hidden.line(recipe.rng.random(), text, needed=i_pair == 0))
    question, lead = chain.question.format(a=people[0]), chain.lead.format(a=people[0])
    return _ask(recipe, Asked(hidden, question, lead, values[0], f"two_hop {i_chain}"))


def _choose(recipe: Recipe, wordings: tuple) -> tuple[int, Fact | Chain]:
    i_wording = recipe.rng.randrange(len(wordings))
    return i_wording, wordings[i_wording]


def _pairs(recipe: Recipe, names: tuple[str, ...], n: int) -> tuple[list[str], list[str]]:
    values = recipe.wordings.draw_values(n, recipe.rng)
    return recipe.rng.sample(names, n), values


def _one_of(recipe: Recipe, fact: Fact, n: int, wording: str, keys=None) -> Asked:
    """``n`` facts at random depths, one of which is asked for."""
    values = recipe.wordings.draw_values(n, recipe.rng)
    keys = keys or recipe.rng.sample(recipe.wordings.places, n)
    wanted = recipe.rng.randrange(n)
    hidden = [
        Hidden.line(recipe.rng.random(), fact.fact.format(key=key, value=value), i == wanted)
        for i, (key, value) in enumerate(zip(keys, values, strict=True))
    ]
    question, lead = (text.format(key=keys[wanted]) for text in (fact.question, fact.lead))
    return Asked(hidden, question, lead, values[wanted], wording)


def _ask(recipe: Recipe, asked: Asked) -> dict:
    """Put document, question and answer together, at exactly the recipe's length."""
    rng, wordings, frame = recipe.rng, recipe.wordings, recipe.frame
    # Where the question stands first alone, a lead would ask it again at the end.
    led = bool(asked.lead) and recipe.question != "first" and rng.random() < recipe.lead
    before, after = map(recipe.ids, _question(recipe, asked.question, brief=not led))
    turn = list(frame.turn)
    if frame.style == "plain":
        turn = recipe.ids(f"\n{wordings.cue}" if after else f"\n\n{wordings.cue}")
    # A turn of a chat ends in a line break, a cue does not; a space belongs to the next token.
    space = " " if frame.style == "plain" else ""
    lead = recipe.ids(space + asked.lead) if led else []
    answer = recipe.ids((" " if led else space) + asked.answer) + frame.end

    kind = rng.choice(wordings.fillers)
    texts = [recipe.ids(hidden.text) for hidden in asked.hidden]
    start = [*frame.head, *before]
    room = recipe.room(start, *texts, after, turn, lead, answer)
    filler = recipe.corpus.stretch(kind, room, rng)
    document, first_needed = _hide(recipe, filler, asked.hidden, texts)
    return recipe.item(
        [*start, *document, *after, *turn, *lead],
        answer,
        answer=asked.answer,
        depth=(len(start) + first_needed) / recipe.length,
        wording=f"{asked.wording}{' lead' if led else ''}",
        lead_length=len(lead),
        filler=kind,
    )


def _question(recipe: Recipe, question: str, brief: bool) -> tuple[str, str]:
    """Text before and after the document."""
    rng, wordings = recipe.rng, recipe.wordings
    opening = rng.choice(wordings.openings)
    first = rng.choice(wordings.ask_first).format(question=question)
    last = rng.choice(wordings.ask_last).format(question=question)
    wish = f" {rng.choice(wordings.brief)}" if brief else ""
    if recipe.question == "first":
        return f"{opening}\n\n{first}{wish}\n\n", ""
    before = f"{opening}\n\n{first}\n\n" if recipe.question == "both" else f"{opening}\n\n"
    return before, f"\n\n{last}{wish}"


def _hide(recipe: Recipe, filler: list[int], hidden: list[Hidden], texts: list[list[int]]):
    """The filler with the texts between its lines, and where the first needed one starts."""
    order = sorted(range(len(hidden)), key=lambda i: hidden[i].depth)  # stable: blocks stay whole
    document: list[int] = []
    needed_at = []
    done = 0
    for i_text in order:
        place = max(_line_end(recipe, filler, round(hidden[i_text].depth * len(filler))), done)
        document += filler[done:place]
        done = place
        if hidden[i_text].needed:
            needed_at.append(len(document))
        document += texts[i_text]
    return document + filler[done:], min(needed_at)


def _line_end(recipe: Recipe, filler: list[int], place: int) -> int:
    """The next end of a line from ``place`` on; ``place`` itself if none is near."""
    line_ends = recipe.corpus.line_ends
    near = range(place, min(place + 100, len(filler)))
    return next((i + 1 for i in near if filler[i] in line_ends), place)


FORMS = {"needle": needle, "needles": needles, "key_value": key_value, "two_hop": two_hop}
