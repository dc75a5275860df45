"""Retrieval forms: a document with facts hidden in it, and a question only they answer.

``needle``: one fact. ``needles``: several, each in other words, asked for one. ``key_value``: lines
of a table, together or spread over the document. ``two_hop``: one fact leads to the next.

Facts of one document differ in wording as well as in key, except for records: where they differ in
the key alone, a model of 135M parameters takes one for another even with full attention. So the
wording of a question already tells its fact; what is tested is whether the fact can be reached.

Facts stand where neither the first tokens nor a window over the last ones reaches them
(`FROM_START`, `FROM_END`), unless the example is too short for that.
"""

from dataclasses import dataclass, replace

from fluxcompile.training.data.recipe import Recipe
from fluxcompile.training.data.wordings import Chain, Fact

NEEDLES = (2, 4)  # facts, each in another wording
RECORDS = (2, 3)  # lines of a table
CHAINS = (1, 2)  # each in another wording
# Tokens of the document before its first fact, at least, and after where its last one is put
# (looking for a line's end); in short documents a quarter and a half of them.
FROM_START = 128
FROM_END = 800
LEAD_UNREAD = 0.5  # share of the leads that the router does not read


@dataclass(frozen=True)
class Hidden:
    """Text to hide at ``depth`` (0: as early as facts stand, 1: as late)."""

    depth: float
    text: str  # with its line breaks
    needed: bool  # is the answer in it, or on the way to it?

    @classmethod
    def line(cls, depth: float, text: str, needed: bool) -> "Hidden":
        """A line of its own, with an empty one before it."""
        return cls(depth, f"\n{text}\n", needed)


@dataclass(frozen=True)
class Asked:
    """What is hidden, what is asked, and the answer to it.

    Attributes:
        hidden: the facts.
        question: asks for the answer.
        lead: the beginning of the sentence that the answer ends, if it is led up to.
        answer: a value.
        close: what ends that sentence after the answer, as it ends the fact.
        wording: name of the wording.
    """

    hidden: list[Hidden]
    question: str
    lead: str
    answer: str
    close: str
    wording: str


def needle(recipe: Recipe) -> dict:
    i_fact, fact = _choose(recipe, recipe.wordings.needle)
    keys, values = _pairs(recipe, recipe.wordings.places, 1)
    return _ask(recipe, _one_of(recipe, [fact], keys, values, 0, f"needle {i_fact}"))


def needles(recipe: Recipe) -> dict:
    n = recipe.rng.randint(*NEEDLES)
    facts = recipe.rng.sample(recipe.wordings.needles, n)
    keys, values = _pairs(recipe, recipe.wordings.places, n)
    wanted = recipe.wordings.needles.index(facts[0])
    return _ask(recipe, _one_of(recipe, facts, keys, values, 0, f"needles {wanted}"))


def key_value(recipe: Recipe) -> dict:
    i_fact, fact = _choose(recipe, recipe.wordings.records)
    n = recipe.rng.randint(*RECORDS)
    keys = recipe.wordings.draw_record_keys(n, recipe.rng)
    values, wanted = recipe.wordings.draw_values(n, recipe.rng), recipe.rng.randrange(n)
    asked = _one_of(recipe, [fact] * n, keys, values, wanted, f"key_value {i_fact}")
    if recipe.rng.random() < 0.5:
        return _ask(recipe, asked)
    # Together: texts of one depth stay in order and next to each other.
    depth = recipe.rng.random()
    block = [replace(h, depth=depth, text=h.text.lstrip()) for h in asked.hidden]
    block[0] = replace(block[0], text="\n" + block[0].text)
    return _ask(recipe, replace(asked, hidden=block, wording=f"{asked.wording} block"))


def two_hop(recipe: Recipe) -> dict:
    n = recipe.rng.randint(*CHAINS)
    chains = recipe.rng.sample(recipe.wordings.chains, n)
    people, values = _pairs(recipe, recipe.wordings.people, 2 * n)
    hidden = []
    for i_chain, chain in enumerate(chains):
        a, b = people[2 * i_chain : 2 * i_chain + 2]
        link, fact = chain.link.format(a=a, b=b), chain.fact.format(b=b, value=values[i_chain])
        # Next to each other: small models do not find a second step that is somewhere else.
        hidden.append(Hidden.line(recipe.rng.random(), f"{link} {fact}", needed=i_chain == 0))
    question, lead = (text.format(a=people[0]) for text in (chains[0].question, chains[0].lead))
    wanted = recipe.wordings.chains.index(chains[0])
    close = chains[0].close
    return _ask(recipe, Asked(hidden, question, lead, values[0], close, f"two_hop {wanted}"))


def _choose(recipe: Recipe, wordings: tuple) -> tuple[int, Fact | Chain]:
    i_wording = recipe.rng.randrange(len(wordings))
    return i_wording, wordings[i_wording]


def _pairs(recipe: Recipe, names: tuple[str, ...], n: int) -> tuple[list[str], list[str]]:
    values = recipe.wordings.draw_values(n, recipe.rng)
    return recipe.rng.sample(names, n), values


def _one_of(recipe: Recipe, facts, keys, values, wanted: int, wording: str) -> Asked:
    """Facts at random depths, one of which is asked for."""
    hidden = [
        Hidden.line(recipe.rng.random(), fact.fact.format(key=key, value=value), i == wanted)
        for i, (fact, key, value) in enumerate(zip(facts, keys, values, strict=True))
    ]
    fact, key = facts[wanted], keys[wanted]
    question, lead = fact.question.format(key=key), fact.lead.format(key=key)
    return Asked(hidden, question, lead, values[wanted], fact.close, wording)


def _ask(recipe: Recipe, asked: Asked) -> dict:
    """Put document, question and answer together, at exactly the recipe's length."""
    rng, wordings, frame = recipe.rng, recipe.wordings, recipe.frame
    # Where the question stands first alone, a lead would ask it again at the end.
    led = recipe.question != "first" and rng.random() < recipe.lead
    before, after = map(recipe.ids, _question(recipe, asked.question, brief=not led))
    turn = list(frame.turn)
    if frame.style == "plain":
        cue = rng.choice(wordings.cues)
        turn = recipe.ids(f"\n{cue}" if after else f"\n\n{cue}")
    # A turn of a chat ends in a line break, a cue does not; a space belongs to the next token.
    space = " " if frame.style == "plain" else ""
    lead = recipe.ids(space + asked.lead) if led else []
    # What follows a sentence that was said to its end (a line break, the turn's end, another one)
    # is no matter of retrieval, so a led answer ends with it; a bare value has to stop.
    bare = recipe.ids(f"{' ' if led else space}{asked.answer}")
    answer = recipe.ids(f" {asked.answer}{asked.close}") if led else bare + frame.end

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
        # Where a token holds both, the answer's last one is the last of all.
        end_length=len(answer) - len(bare) if answer[: len(bare)] == bare else 0,
        # The lead may be the user's, as in a completion, or the model's own words.
        unread_length=len(lead) if rng.random() < LEAD_UNREAD else 0,
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
    first = min(FROM_START, len(filler) // 4)
    last = len(filler) - min(FROM_END, len(filler) // 2)
    order = sorted(range(len(hidden)), key=lambda i: hidden[i].depth)  # stable: blocks stay whole
    document: list[int] = []
    needed_at = []
    done = 0
    for i_text in order:
        wanted = first + round(hidden[i_text].depth * (last - first))
        place = max(_line_end(recipe, filler, wanted), done)
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
