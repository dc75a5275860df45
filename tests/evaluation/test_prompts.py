"""Prompts are held out, end where the answer begins, and have exactly the length asked for."""

import pytest

from fluxcompile.errors import DataError
from fluxcompile.evaluation import Cell, builtin_prompts
from fluxcompile.training.data import ALL, builtin_mixture
from tests.training.byte_tokenizer import EOS, ByteTokenizer

LENGTH = 2048


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
            assert end == (1 if cell.metric == "accuracy" else 0), "what ends the answer"
            assert EOS not in prompt.target


def test_answers_are_led_up_to_and_bare(tokenizer):
    (prompts,) = builtin_prompts(
        tokenizer, tasks=["needle"], lengths=[LENGTH], examples=4, style="chat"
    ).values()
    items = builtin_mixture(
        tokenizer, length=LENGTH, examples=4, split="heldout", tasks="needle", question="last",
        style="chat", lead=1.0, seed=LENGTH,
    )  # fmt: skip
    for prompt, item in zip(prompts, items, strict=True):
        assert tokenizer.decode(prompt.target).strip() == item["answer"]
        assert item["lead_length"] > 0


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
