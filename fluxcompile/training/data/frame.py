"""What stands around a prompt and its answer: a chat template's turns, or nothing.

Prompts are put together from token ids, so that their length can be met exactly. The template is
rendered once with a mark in place of the user's words and taken apart there.
"""

from dataclasses import dataclass
from functools import lru_cache

from fluxcompile.errors import DataError
from fluxcompile.training.encoding import end_of_turn

STYLES = ("plain", "chat", "mixed")
MARK = "BODYOFTHEPROMPT"


@dataclass(frozen=True)
class Frame:
    """Token ids before the prompt, between prompt and answer, and after the answer.

    Attributes:
        style: ``"chat"`` or ``"plain"``.
        head: opens the user's turn; in plain style what the tokenizer starts every text with.
        turn: closes it and opens the assistant's; empty in plain style.
        end: ends the answer: the end-of-turn token, or a newline.
    """

    style: str
    head: list[int]
    turn: list[int]
    end: list[int]


def styles(tokenizer, style: str) -> tuple[str, ...]:
    """The styles to choose from. ``"mixed"`` is both where the tokenizer has a chat template."""
    chat = getattr(tokenizer, "chat_template", None) is not None
    if style not in STYLES:
        raise DataError.mismatch("style", f"one of {STYLES}", repr(style))
    if style == "chat" and not chat:
        raise DataError.mismatch("style 'chat'", "a tokenizer with a chat template", "one without")
    if style == "mixed":
        return ("chat", "plain") if chat else ("plain",)
    return (style,)


@lru_cache(maxsize=8)
def frame(tokenizer, style: str) -> Frame:
    """The frame of ``style``, made once for a tokenizer object."""
    if style == "plain":
        return Frame("plain", _prefix(tokenizer), [], _ids(tokenizer, "\n"))
    asked = [{"role": "user", "content": MARK}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    head, _, turn = prompt.partition(MARK)
    said = [*asked, {"role": "assistant", "content": "ANSWER"}]
    whole = tokenizer.apply_chat_template(said, tokenize=False)
    end = _ids(tokenizer, whole.rpartition("ANSWER")[2])
    return Frame(
        "chat", _ids(tokenizer, head), _ids(tokenizer, turn), end[: end_of_turn(end, tokenizer)]
    )


def _prefix(tokenizer) -> list[int]:
    bare, full = _ids(tokenizer, "a"), list(tokenizer("a").input_ids)
    return full[: full.index(bare[0])]


def _ids(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []
