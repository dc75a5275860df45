"""From a row of data to token ids, labels and the length of its prompt.

A row says what it is by its key: ``input_ids`` (taken as they are), ``text`` (tokenised, every
token is a label) or ``messages`` (a conversation: only what the assistant says is a label).

The *prompt* is what a router sees at inference, where the answer is not there yet: a conversation
up to the assistant's first turn; of other rows ``prompt_length`` tokens, if they say so, else all.
"""

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fluxcompile.errors import DataError

IGNORED = -100  # the label of a token that bears no loss, as torch's cross entropy has it
CONTENT = ("input_ids", "text", "messages")


def encode(row: Mapping, tokenizer, where: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Token ids and labels of one row, both 1-D int64 and of one length, and its prompt's length.

    Args:
        row: exactly one of ``input_ids``, ``text`` and ``messages``; perhaps ``labels``, which
            replace the labels that the content implies; and perhaps ``prompt_length``, where the
            answer begins, with ``unread_length``, how many of the tokens before it the router does
            not read: an answer's own beginning, say.
        tokenizer: of the model to train; may be None if every row has ``input_ids``.
        where: the row's position, which starts every error message.

    Raises:
        DataError: the row cannot be encoded; the message says what was expected and what found.
    """
    given = [key for key in CONTENT if row.get(key) is not None]
    if len(given) != 1:
        raise DataError.mismatch(
            where, f"exactly one of {list(CONTENT)}", given or f"keys {sorted(map(str, row))}"
        )
    (key,) = given
    if key == "input_ids":
        ids = as_ids(row[key], f"{where}: input_ids")
        implied = ids
    elif tokenizer is None:
        raise DataError.mismatch(where, f"a tokenizer, since the row has {key!r}", None)
    elif key == "text":
        ids = implied = _encode_text(row[key], tokenizer, where)
    else:
        ids, implied = encode_messages(row[key], tokenizer, where)
    _refuse_padding(row, where)
    prompt = _prompt_length(row, len(ids), where)
    if prompt is None:
        prompt = _first_label(implied) if key == "messages" else len(ids)
    if row.get("labels") is None:
        return ids, implied, prompt
    labels = as_ids(row["labels"], f"{where}: labels")
    if len(labels) != len(ids):
        raise DataError.mismatch(f"{where}: labels", f"{len(ids)}, one a token", len(labels))
    return ids, labels, prompt


def _prompt_length(row: Mapping, length: int, where: str) -> int | None:
    """What the row says itself; None if it does not."""
    if row.get("prompt_length") is None:
        return None
    prompt = _integer(row["prompt_length"])
    if prompt is None or not 1 <= prompt <= max(length, 1):
        raise DataError.mismatch(
            f"{where}: prompt_length", f"an int from 1 to {length} tokens", row["prompt_length"]
        )
    unread = 0 if row.get("unread_length") is None else _integer(row["unread_length"])
    if unread is None or not 0 <= unread < prompt:
        raise DataError.mismatch(
            f"{where}: unread_length", f"an int from 0 to {prompt - 1}", row["unread_length"]
        )
    return prompt - unread


def _integer(value: Any) -> int | None:
    """``value``, which may be an array of no dimension, as an int; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _first_label(labels: torch.Tensor) -> int:
    """Where the first label stands: the end of what comes before the assistant's first turn."""
    kept = (labels != IGNORED).nonzero()
    return max(int(kept[0]), 1) if len(kept) else len(labels)


def as_ids(values, where: str) -> torch.Tensor:
    """``values`` (a list, array or tensor of integers) as a 1-D int64 tensor."""
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu().numpy()
        ids = np.asarray(values)  # several times as fast on long lists as torch is
    except (TypeError, ValueError) as error:  # bfloat16, or ragged
        raise DataError.mismatch(where, "a flat list of integers", error) from error
    if ids.ndim != 1:
        raise DataError.mismatch(where, "a flat list of integers", f"{ids.ndim} dimensions")
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise DataError.mismatch(where, "integers", ids.dtype)
    # A copy where the caller's memory is another type, or not ours to share.
    return torch.from_numpy(np.require(ids.astype(np.int64, copy=False), requirements="W"))


def _encode_text(text, tokenizer, where: str) -> torch.Tensor:
    if not isinstance(text, str):
        raise DataError.mismatch(f"{where}: text", "a string", type(text).__name__)
    return as_ids(tokenizer(text).input_ids, f"{where}: text")


def encode_messages(messages, tokenizer, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A conversation through the chat template; labels on the assistant's turns alone.

    Where each turn begins and ends in the rendered text is found by rendering the conversation
    up to it, so any template will do that renders a prefix of the conversation as a prefix of the
    text. Each part is then tokenised by itself, as it is when the model generates the turn.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError.mismatch(
            f"{where}: messages", "a tokenizer with a chat template", "one without"
        )
    if not isinstance(messages, list | tuple) or not all(isinstance(m, Mapping) for m in messages):
        raise DataError.mismatch(
            f"{where}: messages", "a list of mappings", type(messages).__name__
        )
    turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
    if not turns:
        roles = [m.get("role") for m in messages]
        raise DataError.mismatch(f"{where}: messages", "a turn of the role 'assistant'", roles)

    whole = _render(tokenizer, messages)
    ids: list[int] = []
    labels: list[int] = []
    done = 0
    for i_turn in turns:
        prompt = _render(tokenizer, messages[:i_turn], add_generation_prompt=True)
        answered = _render(tokenizer, messages[: i_turn + 1])
        if not (whole.startswith(answered) and answered.startswith(prompt)):
            raise DataError.mismatch(
                f"{where}: messages",
                "a chat template that leaves earlier turns as they are (else: input_ids, labels)",
                f"one that rewrites them at message {i_turn}",
            )
        asked = _tokenise(tokenizer, whole[done : len(prompt)])
        said = _tokenise(tokenizer, whole[len(prompt) : len(answered)])
        n_said = end_of_turn(said, tokenizer)
        ids += asked + said
        labels += [IGNORED] * len(asked) + said[:n_said] + [IGNORED] * (len(said) - n_said)
        done = len(answered)
    rest = _tokenise(tokenizer, whole[done:])
    return torch.tensor(ids + rest), torch.tensor(labels + [IGNORED] * len(rest))


def end_of_turn(said: list[int], tokenizer) -> int:
    """How many tokens of a turn the model generates: up to its end-of-sequence token."""
    eos = tokenizer.eos_token_id
    # From the right: the text itself may quote the token.
    return len(said) - said[::-1].index(eos) if eos in said else len(said)


def _render(tokenizer, messages, **options) -> str:
    # Some templates refuse an empty conversation: one that starts with the assistant.
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)


def _tokenise(tokenizer, text: str) -> list[int]:
    # The template has written its special tokens out already.
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []


def _refuse_padding(row: Mapping, where: str) -> None:
    mask = row.get("attention_mask")
    if mask is not None and not bool(torch.as_tensor(mask).bool().all()):
        raise DataError.mismatch(
            f"{where}: attention_mask", "rows without padding (batches are padded later)", "zeros"
        )
