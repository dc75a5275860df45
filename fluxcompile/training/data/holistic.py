"""Holistic forms of real text: what comes next hangs on its gist, not on a few far tokens.

``code`` and ``prose``: a stretch of text and its own continuation, bare (plain style) or asked for
(chat style). The third form, ``in_context``, is in a file of its own.
"""

from fluxcompile.training.data.in_context import in_context
from fluxcompile.training.data.recipe import Recipe


def code(recipe: Recipe) -> dict:
    return _continuation(recipe, "code", recipe.wordings.continue_code)


def prose(recipe: Recipe) -> dict:
    return _continuation(recipe, "prose", recipe.wordings.continue_prose)


def _continuation(recipe: Recipe, kind: str, instructions: tuple[str, ...]) -> dict:
    frame = recipe.frame
    before, after, wording = [], [], f"{kind} bare"
    if frame.style == "chat":
        i_wording = recipe.rng.randrange(len(instructions))
        before, after = recipe.around(instructions[i_wording])
        wording = f"{kind} {i_wording}"
    room = recipe.room(frame.head, before, after, frame.turn)
    text = recipe.corpus.stretch(kind, room, recipe.rng)
    half = room // 2
    start = [*frame.head, *before]
    item = recipe.item(
        [*start, *text[:half], *after, *frame.turn],
        text[half:],  # no end of the turn: the text would go on
        answer="",
        depth=None,
        wording=wording,
        filler=kind,
        question=recipe.question if before or after else "",
    )
    if recipe.loss == "all":
        item["labels"][len(start) : len(start) + half] = text[:half]
    return item


FORMS = {"code": code, "prose": prose, "in_context": in_context}
