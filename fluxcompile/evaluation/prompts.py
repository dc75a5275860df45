"""Held-out prompts to judge routes by, and what of an answer is judged.

A *cell* is one task at one length. Its prompts are the built-in mixture's of the ``"heldout"``
split: documents, wordings and forms of facts that no training example has. Questions stand last and
the answer's sentence is begun (``lead=1``), so that the first token to predict is the answer's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from fluxcompile.errors import DataError
from fluxcompile.training.backbone import longest
from fluxcompile.training.data import ALL, FORMS, builtin_mixture

#: what each task is judged by: the share of answers that are exactly right, or the mean loss
METRICS = {task: "loss" if task in ("code", "prose") else "accuracy" for task in ALL}
KINDS = {task: kind for kind, tasks in FORMS.items() for task in tasks}

_SEEDS_APART = 1_000_003  # seeds of one length from those of the next


class Cell(NamedTuple):
    """One task (``"needle"``, ``"code"``, …) at one length, in tokens of prompt and answer."""

    task: str
    length: int

    @property
    def metric(self) -> str:
        """``"accuracy"`` or ``"loss"``."""
        return METRICS[self.task]

    @property
    def kind(self) -> str:
        """``"retrieval"`` or ``"holistic"``."""
        return KINDS[self.task]


@dataclass(frozen=True)
class Prompt:
    """A prompt and what should follow it.

    Attributes:
        prompt: token ids that the route is decided by.
        target: token ids that are judged: an answer without the token that ends it, or the second
            half of a stretch of text.

    Raises:
        DataError: no prompt, or nothing to judge: that would count as right whatever is said.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("prompt", "target"):
            if not getattr(self, name):
                raise DataError.mismatch(f"{name} of a prompt to judge", "some tokens", "none")

    @classmethod
    def of(cls, item: Mapping[str, Any]) -> "Prompt":
        """From an item of the built-in mixture; what ends its answer is not judged."""
        ids, start = item["input_ids"], item["prompt_length"]
        return cls(tuple(ids[:start]), tuple(ids[start : len(ids) - item["end_length"]]))


Cells = Mapping[Cell, Sequence[Prompt]]


def builtin_prompts(
    tokenizer: Any,
    *,
    tasks: Sequence[str] = ALL,
    lengths: Sequence[int],
    examples: int,
    seed: int = 0,
    style: str = "mixed",
    split: str = "heldout",
) -> dict[Cell, list[Prompt]]:
    """``examples`` prompts a cell, of exactly its length together with their answers.

    Args:
        tokenizer: of the model to judge.
        tasks: forms of the built-in mixture; ``"retrieval"`` and ``"holistic"`` stand for all of
            theirs.
        lengths: tokens; 1,024 is enough for every form.
        examples: prompts a cell.
        seed: decides everything that is random.
        style: ``"chat"``, ``"plain"``, or ``"mixed"``, the same for all tasks: how a prompt is
            dressed must not tell retrieval from holistic.
        split: ``"train"`` for prompts to search static patterns with.

    Raises:
        DataError: an argument that :func:`builtin_mixture` refuses.
    """
    forms = [form for task in tasks for form in FORMS.get(task, [task])]
    cells = {}
    for length in lengths:
        for task in dict.fromkeys(forms):
            items = builtin_mixture(
                tokenizer,
                length=length,
                examples=examples,
                seed=seed * _SEEDS_APART + length,
                split=split,
                tasks=task,
                question="last",
                style=style,
                lead=1.0,
            )
            cells[Cell(task, length)] = [Prompt.of(item) for item in items]
    if not cells:
        raise DataError.mismatch("tasks and lengths", "at least one of each", "none")
    return cells


def check_lengths(model: nn.Module, lengths: Sequence[int]) -> None:
    """Refuse lengths beyond the positions that ``model`` was made for.

    Raises:
        DataError: naming the longest.
    """
    most = longest(model, max(lengths, default=0))
    if most < max(lengths, default=0):
        raise DataError.mismatch("lengths", f"at most {most}, the model's positions", max(lengths))
