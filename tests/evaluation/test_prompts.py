"""Prompts are held out, end where the answer begins, and have exactly the length asked for."""

import pytest

from fluxcompile.errors import DataError
from fluxcompile.evaluation import Cell, Prompt, builtin_prompts
from fluxcompile.evaluation.prompts import METRICS
from fluxcompile.training.data import ALL, builtin_mixture
from tests.training.byte_tokenizer import EOS, ByteTokenizer

LENGTH = 2048
# Tokens that end an answer; the sentences of other tasks may end with nothing or " |" as well.
ENDS = {"code": {0}, "prose": {0}, "in_context": {1}}


@pytest.fixture(scope="module")
def tokenizer():
    return ByteTokenizer()


def test_every_task_at_every_length(tokenizer):
    cells = builtin_prompts(tokenizer, lengths=[LENGTH, 3000], examples=3)
    assert list(cells) == [Cell(task, length) for length in (LENGTH, 3000) for task in ALL]
    for cell, prompts in cells.items():
        assert len(prompts) == 3
        for prompt in prompts:
            end = cell.length - len(prompt.prompt) - len(prompt.target)
            assert end in ENDS.get(cell.task, {0, 1, 2}), "what ends the answer"
            assert EOS not in prompt.target


class _LongTurns(ByteTokenizer):
    """Turns end with two tokens, as with an end-of-sequence token that is not the template's."""

    eos_token_id = ByteTokenizer.eos_token_id + 1


@pytest.mark.parametrize("turns", [ByteTokenizer, _LongTurns])
@pytest.mark.parametrize("style", ["chat", "plain"])
@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("task", [task for task, metric in METRICS.items() if metric == "accuracy"])
def test_answers_are_led_up_to_and_judged_whole(task, split, style, turns):
    tokenizer = turns()
    few = {"examples": 6, "split": split, "style": style}
    (prompts,) = builtin_prompts(tokenizer, tasks=[task], lengths=[LENGTH], **few).values()
    items = builtin_mixture(
        tokenizer, length=LENGTH, tasks=task, question="last", lead=1.0, seed=LENGTH, **few
    )
    for prompt, item in zip(prompts, items, strict=True):
        assert tokenizer.decode(prompt.target).strip() == item["answer"]
        assert len(prompt.prompt) + len(prompt.target) + item["end_length"] == LENGTH
        assert (item["lead_length"] > 0) == (task != "in_context")


@pytest.mark.parametrize("empty", [{"prompt": ()}, {"target": ()}])
def test_nothing_to_judge_is_refused(empty):
    with pytest.raises(DataError, match=next(iter(empty))):
        Prompt(**{"prompt": (1,), "target": (2,)} | empty)


def test_continuations_are_the_second_half(tokenizer):
    (prompts,) = builtin_prompts(
        tokenizer, tasks=["code"], lengths=[LENGTH], examples=2, style="plain"
    ).values()
    for prompt in prompts:
        assert abs(len(prompt.prompt) - len(prompt.target)) <= 1


def test_kinds_seeds_and_splits(tokenizer):
    few = {"lengths": [LENGTH], "examples": 1}
    both = builtin_prompts(tokenizer, tasks=["retrieval", "needle"], **few)
    assert [cell.task for cell in both] == ["needle", "needles", "key_value", "two_hop"]
    cell = Cell("code", LENGTH)
    made = [
        builtin_prompts(tokenizer, tasks=["code"], **few, **other)[cell]
        for other in ({}, {"seed": 1}, {"split": "train"}, {})
    ]
    assert made[0] == made[3]
    assert made[0] != made[1]
    assert made[0] != made[2]
    for bad in ({"tasks": []}, {"tasks": ["poems"]}, {"tasks": ["code"], "style": "verse"}):
        with pytest.raises(DataError):
            builtin_prompts(tokenizer, **few, **bad)
