"""In-context learning: excerpts of code with the module each is from, and one more to place."""

from fluxcompile.training.data.corpus import Document
from fluxcompile.training.data.recipe import Recipe
from fluxcompile.training.encoding import IGNORED

CLASSES = 4  # modules that excerpts come from
EXCERPT = (48, 96)  # tokens
LEAST_MODULE = 2000  # tokens


def in_context(recipe: Recipe) -> dict:
    """Many shots, then a query. In plain style the shots' names bear loss too."""
    frame, rng = recipe.frame, recipe.rng
    large = [d for d in recipe.corpus.documents("code") if len(d) >= LEAST_MODULE]
    modules = rng.sample(large, CLASSES)
    i_wording = rng.randrange(len(recipe.wordings.sort))
    names = ", ".join(sorted(module.name for module in modules))
    before, after = recipe.around(recipe.wordings.sort[i_wording].format(names=names))
    # An instruction that stands last comes before the query, so that the query's cue is last.
    after += recipe.ids("\n\n") if after else []

    shots = _Shots(recipe)
    asked = rng.choice(modules)
    query = shots.excerpt(asked, rng.randint(*EXCERPT))
    answer = recipe.ids(asked.name if frame.turn else f" {asked.name}") + frame.end
    room = recipe.room(frame.head, before, after, query, frame.turn, answer)
    examples, labels = shots.fill(modules, room)

    start = [*frame.head, *before]
    item = recipe.item(
        [*start, *examples, *after, *query, *frame.turn],
        answer,
        answer=asked.name,
        end_length=len(frame.end),
        depth=None,
        wording=f"in_context {i_wording}",
        filler="code",
    )
    if frame.style == "plain":
        skipped = 0 if recipe.loss == "all" else room // 2
        labels[:skipped] = [IGNORED] * skipped
        item["labels"][len(start) : len(start) + room] = labels
    return item


class _Shots:
    """Excerpts in one wording."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        opening, cue = recipe.rng.choice(recipe.wordings.shot).split("{text}")
        self.opening, self.cue = recipe.ids(opening), recipe.ids(cue.removesuffix(" {name}"))
        self.separator = recipe.ids("\n\n")

    def excerpt(self, module: Document, n: int) -> list[int]:
        """``n`` tokens of the module, up to the cue for its name."""
        place = self.recipe.rng.randrange(len(module) - n)
        start = min(module.line_at(place), len(module) - n)
        return [*self.opening, *module.ids[start : start + n], *self.cue]

    def fill(self, modules: list[Document], room: int) -> tuple[list[int], list[int]]:
        """Shots of exactly ``room`` tokens together, and labels on the names in them."""
        rng = self.recipe.rng
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < room:
            module = rng.choice(modules)
            name = self.recipe.ids(f" {module.name}")
            around = len(self.opening) + len(self.cue) + len(name) + len(self.separator)
            n, left = rng.randint(*EXCERPT), room - len(ids) - around
            if left < n + 2 * EXCERPT[1]:
                n = left  # no room for another shot after this one
            text = self.excerpt(module, max(n, 1))
            ids += [*text, *name, *self.separator]
            labels += [IGNORED] * len(text) + name + [IGNORED] * len(self.separator)
        if len(ids) > room:
            self.recipe.room(ids)  # raises: too short for a single shot
        return ids, labels
