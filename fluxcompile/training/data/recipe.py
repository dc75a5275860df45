"""What one built-in example is made with, and how its parts become an item."""

import random
from dataclasses import dataclass

from fluxcompile.errors import DataError
from fluxcompile.training.data.corpus import Corpus
from fluxcompile.training.data.frame import Frame
from fluxcompile.training.data.wordings import Wordings
from fluxcompile.training.encoding import IGNORED

QUESTIONS = ("last", "first", "both")
LEAST_TEXT = 128  # tokens of real text in an example, so that every form fits in


@dataclass(frozen=True)
class Recipe:
    """One example to make.

    Attributes:
        form: name of its form (``"needle"``, ``"code"``, …).
        length: tokens it shall have.
        rng: all that is random about it comes from here.
        corpus, wordings: text and wordings of its split.
        frame: chat or plain.
        question: where the question or instruction stands: ``"last"``, ``"first"`` or ``"both"``.
        loss: of modelling forms: ``"half"`` (the second half bears the loss) or ``"all"``.
        lead: of retrieval forms: how likely an answer is led up to.
    """

    form: str
    length: int
    rng: random.Random
    corpus: Corpus
    wordings: Wordings
    frame: Frame
    question: str
    loss: str
    lead: float

    def ids(self, text: str) -> list[int]:
        return self.corpus.tokenise(text) if text else []

    def around(self, instruction: str) -> tuple[list[int], list[int]]:
        """Ids before and after a document: the instruction where `question` wants it."""
        first = f"{instruction}\n\n" if self.question != "last" else ""
        last = f"\n\n{instruction}" if self.question != "first" else ""
        return self.ids(first), self.ids(last)

    def room(self, *fixed: list[int]) -> int:
        """Tokens left of `length` once all of ``fixed`` are in."""
        left = self.length - sum(map(len, fixed))
        if left < LEAST_TEXT:
            raise DataError.mismatch(
                f"length of {self.form!r}",
                f"at least {self.length - left + LEAST_TEXT}",
                self.length,
            )
        return left

    def item(self, prompt: list[int], target: list[int], **about) -> dict:
        """The example as data: the loss is on ``target`` alone. ``about`` goes into it as it is."""
        return {
            "input_ids": prompt + target,
            "labels": [IGNORED] * len(prompt) + target,
            "form": self.form,
            "prompt_length": len(prompt),
            "lead_length": 0,
            "unread_length": 0,
            "end_length": 0,
            "style": self.frame.style,
            "question": self.question,
            **about,
        }
