"""Conversations: loss on what the assistant says, and on nothing else."""

import pytest

from fluxcompile.errors import DataError
from fluxcompile.training.examples import prepare
from fluxcompile.training.tasks import resolve_tasks
from tests.training.byte_tokenizer import ByteTokenizer, ForgetfulTokenizer

USER = {"role": "user", "content": "What is 2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "Four."}
AGAIN = {"role": "user", "content": "And 3 + 3?"}
SIX = {"role": "assistant", "content": "Six."}


def ready(messages, tokenizer=None):
    rows = [{"messages": messages, "task": "retrieval"}]
    (example,) = prepare(rows, tokenizer or ByteTokenizer(), tasks=resolve_tasks())
    return example


def labelled(example) -> str:
    return ByteTokenizer().decode(example.labels[example.labels != -100])


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([USER, ASSISTANT], "Four.<eos>"),
        ([USER, ASSISTANT, AGAIN, SIX], "Four.<eos>Six.<eos>"),
        ([{"role": "system", "content": "Be brief."}, USER, ASSISTANT], "Four.<eos>"),
        ([USER, ASSISTANT, AGAIN], "Four.<eos>"),
        ([USER, {"role": "assistant", "content": "It is <eos> four"}], "It is <eos> four<eos>"),
    ],
    ids=["one turn", "two turns", "system", "open question", "end of turn quoted"],
)
def test_loss_on_the_assistants_turns_and_their_end(messages, said):
    tokenizer = ByteTokenizer()
    example = ready(messages)
    assert labelled(example) == said
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.input_ids) == whole
    asked = tokenizer.apply_chat_template(
        messages[: messages.index(next(m for m in messages if m["role"] == "assistant"))],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert tokenizer.decode(example.input_ids[: example.prompt_length]) == asked
    kept = example.labels != -100
    assert example.labels[kept].tolist() == example.input_ids[kept].tolist()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER], "a turn of the role 'assistant', got \\['user'\\]"),
        ([], "a turn of the role 'assistant', got \\[\\]"),
        ("hello", "a list of mappings, got str"),
        (["hello"], "a list of mappings"),
    ],
    ids=["user only", "none", "str", "list of str"],
)
def test_conversations_that_teach_nothing(messages, message):
    with pytest.raises(DataError, match=f"example 0: messages: expected {message}"):
        ready(messages)


def test_a_tokenizer_without_a_chat_template():
    with pytest.raises(DataError, match="example 0: messages: expected a tokenizer with a chat"):
        ready([USER, ASSISTANT], ByteTokenizer(chat=False))


def test_a_template_that_rewrites_earlier_turns():
    assert labelled(ready([USER, ASSISTANT], ForgetfulTokenizer())) == "Four.<eos>"
    with pytest.raises(DataError, match="leaves earlier turns as they are"):
        ready([USER, ASSISTANT, AGAIN, SIX], ForgetfulTokenizer())
