"""A long prompt with a fact hidden early in it, made of text every Python installation has."""

from dataclasses import dataclass
from pydoc_data.topics import topics

import torch

SECRET = "48213"
FACT = f"Remember this fact: the special magic number for the city of Lisbon is {SECRET}."
QUESTION = "What is the special magic number for the city of Lisbon?"


@dataclass(frozen=True)
class LongPrompt:
    """Token ids [1, S] of a chat turn that asks for `SECRET`, hidden at token ``fact_at``."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    fact_at: int

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    def answered_by(self, text: str) -> bool:
        return SECRET in text

    def to(self, device: str) -> "LongPrompt":
        return LongPrompt(self.input_ids.to(device), self.attention_mask.to(device), self.fact_at)


def long_prompt(tokenizer, length: int, depth: float = 0.1) -> LongPrompt:
    """About ``length`` tokens of Python's own help text, the fact at ``depth`` of them.

    Args:
        tokenizer: of a chat model (it must have a chat template).
        length: wanted tokens, counting the chat template and the question; met within a few.
        depth: 0 puts the fact first, 1 last.
    """
    # The longest of the help texts: one document, some 15,000 tokens.
    filler = tokenizer(topics["specialnames"], add_special_tokens=False).input_ids
    room = length - _chat(tokenizer, f"\n\n{FACT}\n\n")["input_ids"].shape[1]
    fact_at = int(depth * room)
    before, after = tokenizer.decode(filler[:fact_at]), tokenizer.decode(filler[fact_at:room])
    encoded = _chat(tokenizer, f"{before}\n\n{FACT}\n\n{after}")
    return LongPrompt(encoded["input_ids"], encoded["attention_mask"], fact_at)


def _chat(tokenizer, document: str):
    turn = f"Read the following text.\n\n{document}\n\n{QUESTION} Answer in one sentence."
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": turn}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
