"""Two prompts of one length that want different attention, of text that no router trained on.

They are the built-in mixture's of the held-out split (:mod:`fluxcompile.training.data`): a question
whose answer is hidden in a long document, and code to go on with.
"""

from dataclasses import dataclass
from typing import Any

import torch

from fluxcompile.training.data import builtin_mixture


@dataclass(frozen=True)
class RoutedPrompt:
    """A prompt that a router decides for.

    Attributes:
        name: ``"question"`` or ``"code"``.
        what: it is, in words.
        input_ids: int64 ``[1, S]``.
        lead: the beginning of the answer, with which the prompt ends; empty if it has none.
        answer: what the answer has to have in it; empty for a continuation.
    """

    name: str
    what: str
    input_ids: torch.Tensor
    lead: str
    answer: str

    @property
    def attention_mask(self) -> torch.Tensor:
        return torch.ones_like(self.input_ids)

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]


def routed_prompts(tokenizer: Any, length: int, seed: int = 0) -> list[RoutedPrompt]:
    """A retrieval prompt and a holistic one, of exactly ``length`` tokens each.

    Args:
        tokenizer: of the model.
        length: tokens; a thousand is enough.
        seed: decides the texts, the fact and the wordings.

    Raises:
        DataError: ``length`` is too short for a prompt.
    """
    question = _prompt(tokenizer, "needle", length, seed, answer_grows=1)
    lead = question["input_ids"][length - question["lead_length"] : length]
    fact_at = round(question["depth"] * len(question["input_ids"]))
    code = _prompt(tokenizer, "code", length, seed, answer_grows=2)
    return [
        RoutedPrompt(
            "question",
            f"one fact hidden at token {fact_at} of a document, asked for at its end",
            torch.tensor([question["input_ids"][:length]]),
            tokenizer.decode(lead).strip(),
            question["answer"],
        ),
        RoutedPrompt(
            "code",
            "a module of the standard library, to go on with",
            torch.tensor([code["input_ids"][:length]]),
            "",
            "",
        ),
    ]


def _prompt(tokenizer: Any, form: str, length: int, seed: int, answer_grows: int) -> dict[str, Any]:
    """An item of the mixture whose prompt has ``length`` tokens.

    Args:
        answer_grows: tokens that an item must grow by for its prompt to grow by one: a
            continuation is as long as what it continues, an answer as long as it is.
    """
    whole = length
    for _ in range(2):  # the second has what the first one lacked
        (item,) = builtin_mixture(
            tokenizer,
            length=whole,
            examples=1,
            seed=seed,
            split="heldout",
            tasks=[form],
            question="last",
            lead=1.0,
            style="chat" if getattr(tokenizer, "chat_template", None) else "plain",
        )
        whole += answer_grows * (length - item["prompt_length"])
    assert item["prompt_length"] == length
    return item
