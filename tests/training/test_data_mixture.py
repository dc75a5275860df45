"""The built-in mixture: exact lengths, loss where promised, balance, reproducible."""

from collections import Counter

import pytest

from fluxcompile.errors import DataError
from fluxcompile.training.batching import collate
from fluxcompile.training.data import ALL, FORMS, WORDINGS, builtin_mixture
from fluxcompile.training.data.sources import sources
from fluxcompile.training.examples import prepare
from fluxcompile.training.tasks import resolve_tasks
from tests.training.byte_tokenizer import BOS, EOS, ByteTokenizer

LENGTH = 5000  # a token a byte: some 1,200 tokens of a real tokenizer
TOKENIZER = ByteTokenizer()
CUES = WORDINGS["train"].cues
RETRIEVAL, HOLISTIC = tuple(FORMS["retrieval"]), tuple(FORMS["holistic"])


def mixture(examples: int = 14, **options) -> list[dict]:
    return builtin_mixture(TOKENIZER, **{"length": LENGTH, "examples": examples} | options)


def decode(ids) -> str:
    return TOKENIZER.decode([i for i in ids if i != -100])


def test_the_same_arguments_make_the_same_examples():
    first, second = mixture(), builtin_mixture(ByteTokenizer(), length=LENGTH, examples=14)
    assert first == second
    assert mixture(6) == first[:6]
    assert mixture(6, seed=1) != first[:6]
    assert mixture(6, split="heldout") != first[:6]


def test_tasks_and_forms_take_turns():
    made = mixture(24)
    assert [item["task"] for item in made] == ["retrieval", "holistic"] * 12
    assert Counter(item["form"] for item in made) == dict.fromkeys(RETRIEVAL, 3) | dict.fromkeys(
        HOLISTIC, 4
    )


def test_every_form_gets_every_length():
    made = mixture(48, length=[4000, 6000])
    assert {(item["form"], len(item["input_ids"])) for item in made} == {
        (form, n) for form in ALL for n in (4000, 6000)
    }


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_lengths_are_exact_and_labels_are_ids(form, split):
    for item in mixture(8, tasks=(form,), split=split):
        assert len(item["input_ids"]) == len(item["labels"]) == LENGTH
        pairs = zip(item["input_ids"], item["labels"], strict=True)
        assert all(label in (-100, token) for token, label in pairs)
        assert item["form"] == form
        assert form in FORMS[item["task"]]


@pytest.mark.parametrize("form", RETRIEVAL)
@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("style", ["chat", "plain"])
def test_loss_is_on_the_answer_and_its_end_alone(form, split, style):
    closes = {".", ",", ";", " |", ""}  # a sentence led up to ends as its fact does
    for item in mixture(6, tasks=(form,), split=split, style=style):
        said = decode(item["labels"]).lstrip()
        assert said.startswith(item["answer"])
        end = said.removeprefix(item["answer"])
        assert end in (closes if item["lead_length"] else {"<eos>" if style == "chat" else "\n"})
        start = item["prompt_length"]
        assert item["labels"][:start] == [-100] * start
        assert item["labels"][start:] == item["input_ids"][start:]


@pytest.mark.parametrize("form", RETRIEVAL)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_answer_stands_in_the_document_where_depth_says(form, split):
    depths = []
    for item in mixture(12, tasks=(form,), split=split):
        prompt = decode(item["input_ids"][: item["prompt_length"]])
        assert item["answer"] in prompt
        # Nothing needed stands before `depth`.
        before = decode(item["input_ids"][: round(item["depth"] * LENGTH)])
        assert item["answer"] not in before
        depths.append(item["depth"])
    assert max(depths) - min(depths) > 0.4


@pytest.mark.parametrize("form", RETRIEVAL)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_neither_the_first_tokens_nor_the_last_ones_hold_the_answer(form, split):
    for item in mixture(12, tasks=(form,), split=split):
        ids, start = item["input_ids"], item["prompt_length"]
        assert item["answer"] not in decode(ids[:100])
        assert item["answer"] not in decode(ids[start - 700 : start])


def test_a_single_needle_begins_at_its_depth():
    for item in mixture(8, tasks=("needle",)):
        at = decode(item["input_ids"][round(item["depth"] * LENGTH) :])
        fact = at.lstrip("\n").split("\n")[0]
        assert fact.rstrip(".").endswith(item["answer"])


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_a_lead_is_between_the_prompt_and_the_answer(style):
    made = mixture(12, tasks="retrieval", style=style, question="last")
    led = [item for item in made if item["lead_length"]]
    assert 0 < len(led) < 12
    assert led == [item for item in made if item["wording"].endswith("lead")]
    for item in made:
        prompt = decode(item["input_ids"][: item["prompt_length"] - item["lead_length"]])
        asked = "[assistant] " if style == "chat" else tuple(f"\n{cue}" for cue in CUES)
        assert prompt.endswith(asked)
    for item in led:
        lead, answer = item["prompt_length"] - item["lead_length"], item["prompt_length"]
        assert decode(item["input_ids"][lead:answer]).strip()
        assert decode(item["input_ids"][answer:]).startswith(f" {item['answer']}")


def test_the_router_reads_up_to_the_answer_or_half_of_a_text():
    made = mixture(14, style="mixed")
    for item, example in zip(made, prepare(made, tasks=resolve_tasks()), strict=True):
        assert example.prompt_length == item["prompt_length"] - item["unread_length"]
        assert item["unread_length"] in (0, item["lead_length"])
        if item["form"] in ("code", "prose"):
            assert example.prompt_length == pytest.approx(LENGTH / 2, abs=100)
            assert (example.labels[: example.prompt_length] == -100).all()


@pytest.mark.parametrize("lead", [0.0, 1.0])
def test_all_answers_are_led_up_to_or_none(lead):
    made = mixture(6, tasks=("needle", "two_hop"), question="both", lead=lead)
    assert {item["lead_length"] > 0 for item in made} == {lead == 1}


def test_of_several_places_for_the_question_each_is_used():
    made = mixture(24, tasks="retrieval", question=("last", "both"))
    assert {item["question"] for item in made} == {"last", "both"}


@pytest.mark.parametrize("question", [(), ("last", "middle"), "middle"])
def test_an_impossible_place_for_the_question_is_refused(question):
    with pytest.raises(DataError, match="question"):
        mixture(2, question=question)


@pytest.mark.parametrize("question", ["first", "last", "both"])
def test_the_question_stands_where_it_is_asked_for(question):
    for item in mixture(8, tasks=("needle", "two_hop"), question=question, style="plain"):
        prompt = decode(item["input_ids"][: item["prompt_length"]])
        asked = [part.count("?") for part in (prompt[:350], prompt[-350:])]
        assert item["question"] == question
        assert (asked[0] > 0) == (question in ("first", "both")) or "?" in prompt[350:-350]
        if question == "first":
            assert "lead" not in item["wording"]  # it would ask again


@pytest.mark.parametrize("form", ["code", "prose"])
def test_continuations_are_real_text(form):
    texts = [source.text for source in sources(form, "train")]
    for item in mixture(8, tasks=(form,), style="chat"):
        said = decode(item["labels"])
        # Long enough a part of it to be sure, short enough to lie within one source.
        assert any(said[:300] in text for text in texts) or "\n\n" in said[:300]
        assert 0.4 * LENGTH < len(said) <= 0.5 * LENGTH


@pytest.mark.parametrize("style", ["chat", "plain"])
@pytest.mark.parametrize("form", ["code", "prose"])
def test_loss_on_half_of_the_text_or_on_all(form, style):
    (half,) = mixture(1, tasks=(form,), style=style, loss="half")
    (all_,) = mixture(1, tasks=(form,), style=style, loss="all")
    assert half["input_ids"] == all_["input_ids"]
    n_half, n_all = (sum(label != -100 for label in i["labels"]) for i in (half, all_))
    assert n_half == pytest.approx(n_all / 2, abs=1)
    assert n_all == (LENGTH - 1 if style == "plain" else pytest.approx(LENGTH, rel=0.05))


def test_in_context_shots_name_their_modules():
    for item in mixture(8, tasks=("in_context",)):
        text = decode(item["input_ids"])
        names = decode(item["labels"]).replace("<eos>", "").split()
        assert names[-1] == item["answer"]
        assert len(names) == 1 if item["style"] == "chat" else len(names) > 3
        assert all(f": {name}\n" in text or name == item["answer"] for name in names)


def test_plain_style_without_a_chat_template():
    made = builtin_mixture(ByteTokenizer(chat=False), length=LENGTH, examples=14)
    assert {item["style"] for item in made} == {"plain"}
    assert {item["input_ids"][0] for item in made} == {BOS}
    assert all(EOS not in item["input_ids"] for item in made)


def test_chat_style_goes_through_the_template():
    for item in mixture(7, style="chat"):
        text = decode(item["input_ids"])
        assert text.startswith("<bos>[user] ")
        assert "<eos>\n[assistant] " in text
        assert item["input_ids"].count(BOS) == 1


def test_the_mixture_is_ready_for_training():
    examples = prepare(
        mixture(14), tasks=resolve_tasks(), min_length=LENGTH, max_length=LENGTH,
        vocab_size=len(TOKENIZER),
    )  # fmt: skip
    batch = collate(examples[:4], 0)
    assert batch["input_ids"].shape == (4, LENGTH)
    assert batch["task_id"].tolist() == [0, 1, 0, 1]


def test_the_mixture_as_a_hugging_face_dataset():
    datasets = pytest.importorskip("datasets")
    made = mixture(14)
    examples = prepare(datasets.Dataset.from_list(made), tasks=resolve_tasks())
    assert [e.input_ids.tolist() for e in examples] == [item["input_ids"] for item in made]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split: expected one of"),
        ({"question": "middle"}, "question: expected one of"),
        ({"style": "poem"}, "style: expected one of"),
        ({"loss": "none"}, "loss: expected one of"),
        ({"lead": 2}, "lead: expected a share"),
        ({"tasks": ("needle", "haystack")}, "tasks: expected one of .*got 'haystack'"),
        ({"tasks": ()}, "tasks: expected some of"),
        ({"length": 0}, "length: expected"),
        ({"length": []}, "length: expected"),
        ({"length": 10.5}, "length: expected"),
        ({"length": 300}, "length of 'needle': expected at least"),
        ({"length": 300, "tasks": "in_context"}, "length of 'in_context': expected at least"),
        ({"examples": 0}, "examples: expected at least 1"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        mixture(**{"examples": 7} | options)


def test_chat_style_needs_a_chat_template():
    with pytest.raises(DataError, match="style 'chat': expected a tokenizer with a chat template"):
        builtin_mixture(ByteTokenizer(chat=False), length=LENGTH, examples=1, style="chat")


def test_kinds_stand_for_their_forms():
    assert {item["form"] for item in mixture(8, tasks="retrieval")} == set(RETRIEVAL)
    assert {item["form"] for item in mixture(8, tasks=["holistic"])} == set(HOLISTIC)


def test_the_router_reads_half_of_the_leads():
    made = mixture(24, tasks="retrieval", question="last", lead=1.0)
    assert 0 < sum(item["unread_length"] > 0 for item in made) < len(made)
