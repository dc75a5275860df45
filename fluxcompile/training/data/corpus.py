"""Stretches of real text as token ids, of any length.

Every source is tokenised once for a tokenizer; all else is slicing.
"""

import random
from bisect import bisect_left
from functools import lru_cache

from fluxcompile.training.data.sources import KINDS, sources

MIXED_CHUNK = (200, 800)  # tokens of one kind before the other takes over, in mixed filler


class Document:
    """A tokenised source, with the places where its lines begin."""

    def __init__(self, name: str, ids: list[int], line_ends: set[int]) -> None:
        self.name = name
        self.ids = ids
        self.line_starts = [0, *(i + 1 for i, token in enumerate(ids) if token in line_ends)]

    def __len__(self) -> int:
        return len(self.ids)

    def line_at(self, place: int) -> int:
        """The first start of a line at or after ``place``; ``place`` itself if there is none."""
        i_line = bisect_left(self.line_starts, place)
        return self.line_starts[i_line] if i_line < len(self.line_starts) else place


class Corpus:
    """The code and the prose of one split, tokenised when first asked for."""

    def __init__(self, tokenizer, split: str) -> None:
        self.tokenizer = tokenizer
        self.split = split
        self.line_ends: set[int] = set()  # ids whose text has a newline in it, of those seen
        self._known: set[int] = set()
        self._documents: dict[str, list[Document]] = {}

    def documents(self, kind: str) -> list[Document]:
        if kind not in self._documents:
            self._documents[kind] = [
                Document(source.name, self.tokenise(source.text), self.line_ends)
                for source in sources(kind, self.split)
            ]
        return self._documents[kind]

    def tokenise(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        new = set(ids) - self._known
        self.line_ends |= {token for token in new if "\n" in self.tokenizer.decode([token])}
        self._known |= new
        return ids

    def stretch(self, kind: str, n: int, rng: random.Random) -> list[int]:
        """``n`` tokens of text from a random place on.

        Args:
            kind: ``"code"``, ``"prose"`` or ``"mixed"`` (chunks of both, in turn).
            n: tokens wanted, met exactly. Where one source ends another begins; once all
                have been used they come again.
        """
        if kind != "mixed":
            return self._stretch(kind, n, rng)
        ids: list[int] = []
        i_kind = rng.randrange(len(KINDS))
        while len(ids) < n:
            ids += self._stretch(KINDS[i_kind % len(KINDS)], rng.randint(*MIXED_CHUNK), rng)
            i_kind += 1
        return ids[:n]

    def _stretch(self, kind: str, n: int, rng: random.Random) -> list[int]:
        documents = self.documents(kind)
        # A source is as likely as there are places in it from which on the text suffices.
        room = [max(len(document) - n, 1) for document in documents]
        (first,) = rng.choices(documents, weights=room)
        start = first.line_at(rng.randrange(max(len(first) - n, 1)))
        ids = first.ids[start : start + n]
        others = [document for document in documents if document is not first]
        while len(ids) < n:
            for document in rng.sample(others, len(others)):
                if len(ids) < n:
                    ids += self.tokenise(self._title(kind, document.name)) + document.ids
            others = documents
        return ids[:n]

    @staticmethod
    def _title(kind: str, name: str) -> str:
        return f"\n\n# {name}.py\n\n" if kind == "code" else "\n\n"


@lru_cache(maxsize=4)
def corpus(tokenizer, split: str) -> Corpus:
    """The tokenised sources of ``split``, made once for a tokenizer object."""
    return Corpus(tokenizer, split)
