"""Examples are checked, by position, before anything is trained on them."""

import numpy as np
import pytest
import torch

from fluxcompile.errors import DataError
from fluxcompile.training.examples import prepare
from fluxcompile.training.tasks import resolve_tasks
from tests.training.byte_tokenizer import BOS, EOS, N_SPECIAL, ByteTokenizer

TASKS = resolve_tasks({"mine": 0.3})
GOOD = {"input_ids": [5, 6, 7, 8], "task": "holistic"}


def ready(data, **options):
    return prepare(data, ByteTokenizer(), tasks=TASKS, **options)


def test_every_token_is_a_label_unless_labels_say_otherwise():
    plain, masked = ready([GOOD, {**GOOD, "labels": [-100, -100, 7, 8], "task": "retrieval"}])
    assert plain.input_ids.tolist() == plain.labels.tolist() == [5, 6, 7, 8]
    assert masked.labels.tolist() == [-100, -100, 7, 8]
    assert (plain.task, masked.task) == ("holistic", "retrieval")
    assert (plain.index, masked.index) == (0, 1)
    assert plain.input_ids.dtype == masked.labels.dtype == torch.int64


def test_the_prompt_is_the_whole_row_unless_the_row_says_where_it_ends():
    labels = [-100, -100, 7, 8]
    rows = [
        GOOD,
        {**GOOD, "labels": labels},
        {**GOOD, "prompt_length": 3},
        {**GOOD, "prompt_length": torch.tensor(3), "unread_length": np.int64(1)},
        {"text": "ab", "task": "mine", "prompt_length": None},
    ]
    assert [e.prompt_length for e in ready(rows)] == [4, 4, 3, 2, 3]


def test_text_is_tokenised_as_the_model_expects_it():
    (example,) = ready([{"text": "ab", "task": "mine"}])
    assert example.input_ids.tolist() == [BOS, 97 + N_SPECIAL, 98 + N_SPECIAL]
    assert torch.equal(example.labels, example.input_ids)


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        iter,
        lambda rows: (row for row in rows),
        lambda rows: [{**row, "input_ids": np.array(row["input_ids"])} for row in rows],
        lambda rows: [{**row, "input_ids": torch.tensor(row["input_ids"])} for row in rows],
        lambda rows: [{**row, "labels": None, "text": None, "other": object()} for row in rows],
    ],
    ids=["list", "tuple", "iterator", "generator", "numpy", "torch", "columns of None"],
)
def test_any_iterable_of_mappings_will_do(make):
    assert [e.input_ids.tolist() for e in ready(make([GOOD, GOOD]))] == [[5, 6, 7, 8]] * 2


def test_a_map_style_dataset_will_do():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return GOOD

    assert len(ready(Rows())) == 3


@pytest.mark.parametrize("format", [None, "torch", "numpy"])
def test_a_hugging_face_dataset_will_do(format):
    datasets = pytest.importorskip("datasets")
    rows = [GOOD, {"input_ids": [9, 8, 7], "task": "retrieval"}]
    dataset = datasets.Dataset.from_list(rows).with_format(format)
    assert [e.input_ids.tolist() for e in ready(dataset)] == [[5, 6, 7, 8], [9, 8, 7]]
    with pytest.raises(DataError, match=r"one split\), got a mapping with keys \['train'\]"):
        ready(datasets.DatasetDict(train=dataset))


def test_an_endless_iterable_is_read_up_to_the_limit():
    def endless():
        while True:
            yield GOOD

    assert len(ready(endless(), limit=5)) == 5


NO_TASK = {"input_ids": [5, 6, 7]}
BAD_ROWS = {
    "unknown task": ({**GOOD, "task": "poetry"}, r": task: expected one of .*got 'poetry'"),
    "no task": (NO_TASK, r": task: expected one of .*got None"),
    "class label": ({**GOOD, "task": 1}, r": task: expected one of .*got 1"),
    "nothing to encode": ({"task": "holistic", "body": 1}, r"exactly one of .*got keys \['body'"),
    "two contents": ({**GOOD, "text": "a"}, r"exactly one of .*got \['input_ids', 'text'\]"),
    "empty": ({**GOOD, "input_ids": []}, "expected tokens, got an empty row"),
    "too short": ({**GOOD, "input_ids": [5]}, "expected at least 2 tokens|after the first token"),
    "labels too few": ({**GOOD, "labels": [5, 6]}, "labels: expected 4, one a token, got 2"),
    "no loss": ({**GOOD, "labels": [-100] * 4}, "its loss is NaN"),
    "loss on first only": ({**GOOD, "labels": [5] + [-100] * 3}, "its loss is NaN"),
    "beyond vocabulary": ({**GOOD, "input_ids": [5, 259]}, r"vocab_size \(259\), got 259"),
    "negative id": ({**GOOD, "input_ids": [5, -1]}, "token ids >= 0.*got -1"),
    "label beyond": ({**GOOD, "labels": [5, 6, 7, 300]}, "labels: .*got 300"),
    "label of -1": ({**GOOD, "labels": [-1, 6, 7, 8]}, "labels: .*got -1"),
    "floats": ({**GOOD, "input_ids": [5.0, 6.0]}, "input_ids: expected integers, got float64"),
    "bfloat16": ({**GOOD, "input_ids": torch.ones(3, dtype=torch.bfloat16)}, "input_ids: expected"),
    "bools": ({**GOOD, "input_ids": [True, False]}, "input_ids: expected integers, got bool"),
    "strings": ({**GOOD, "input_ids": ["a", "b"]}, "input_ids: expected integers, got <U1"),
    "nested": ({**GOOD, "input_ids": [[5, 6], [7, 8]]}, "flat list of integers, got 2 dimensions"),
    "ragged": ({**GOOD, "input_ids": [[5, 6], [7]]}, "input_ids: expected a flat list"),
    "text of bytes": ({"text": b"ab", "task": "mine"}, "text: expected a string, got bytes"),
    "padded": ({**GOOD, "attention_mask": [0, 1, 1, 1]}, "attention_mask: expected rows without"),
    "no prompt": ({**GOOD, "prompt_length": 0}, "prompt_length: expected an int from 1 to 4 .*0"),
    "prompt beyond": ({**GOOD, "prompt_length": 5}, "prompt_length: expected an int from 1 to 4"),
    "prompt of text": ({**GOOD, "prompt_length": "3"}, "prompt_length: expected an int from 1"),
    "prompt of bool": ({**GOOD, "prompt_length": True}, "prompt_length: .*got True"),
    "all lead": (
        {**GOOD, "prompt_length": 3, "unread_length": 3},
        "unread_length: expected an int from 0 to 2, got 3",
    ),
    "not a mapping": ("text", "expected a mapping, got str"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_by_its_position(row, message):
    with pytest.raises(DataError, match=f"example 2.*({message})"):
        ready([GOOD, GOOD, row, GOOD], vocab_size=259)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "at least one example, got none"),
        ((row for row in ()), "at least one example, got none"),
        ("text", "iterable of mappings, got str"),
        (7, "iterable of mappings, got int"),
        (GOOD, "got a mapping with keys"),
    ],
    ids=["empty", "generator of nothing", "str", "int", "mapping"],
)
def test_data_that_is_no_data(data, message):
    with pytest.raises(DataError, match=message):
        ready(data)


def test_text_needs_a_tokenizer():
    with pytest.raises(
        DataError, match="example 0: expected a tokenizer, since the row has 'text'"
    ):
        prepare([{"text": "ab", "task": "mine"}], tasks=TASKS)


def test_shorter_than_what_can_teach_is_refused():
    with pytest.raises(DataError, match="example 1: expected at least 4 tokens, got 3"):
        ready([GOOD, {"input_ids": [1, 2, 3], "task": "mine"}], min_length=4)


def test_long_holistic_documents_are_cut_within_themselves():
    rows = [{"input_ids": list(range(start, start + 23)), "task": "holistic"} for start in (0, 100)]
    examples = ready(rows, min_length=5, max_length=10)
    # 23 = 10 + 10 + 3, and 3 are too few.
    assert [e.input_ids[[0, -1]].tolist() for e in examples] == [
        [0, 9], [10, 19], [100, 109], [110, 119]
    ]  # fmt: skip
    assert [e.index for e in examples] == [0, 1, 2, 3]


def test_pieces_keep_the_part_of_the_prompt_that_they_hold():
    row = {"input_ids": list(range(26)), "task": "holistic", "prompt_length": 13}
    assert [e.prompt_length for e in ready([row], max_length=10)] == [10, 3, 6]


def test_a_joined_row_s_prompt_ends_with_its_last_document_s():
    rows = [document(10, 4), {**document(20, 4), "prompt_length": 1}]
    (joined,) = ready(rows, join_short=True, max_length=16)
    assert len(joined) == 9
    assert joined.prompt_length == 6
    (joined,) = ready(rows[::-1], join_short=True, max_length=16)
    assert joined.prompt_length == 9


def test_a_piece_without_loss_is_left_out():
    labels = [-100] * 12 + list(range(12, 20))
    (example,) = ready(
        [{"input_ids": list(range(20)), "labels": labels, "task": "holistic"}], max_length=10
    )
    assert example.input_ids.tolist() == list(range(10, 20))


@pytest.mark.parametrize("task", ["retrieval", "mine"])
def test_only_holistic_documents_are_cut(task):
    row = {"input_ids": list(range(20)), "task": task}
    with pytest.raises(DataError, match=f"example 0: expected at most 10 .*20 of task '{task}'"):
        ready([row], max_length=10)


def test_bounds_that_exclude_each_other_are_refused():
    with pytest.raises(DataError, match=r"max_length: expected >= min_length \(9\)"):
        ready([GOOD], min_length=9, max_length=8)


def document(start: int, n: int, task: str = "holistic") -> dict:
    return {"input_ids": list(range(start, start + n)), "task": task}


def test_documents_are_joined_only_when_asked():
    rows = [document(10, 4), document(20, 4)]
    assert len(ready(rows)) == 2
    (joined,) = ready(rows, join_short=True, max_length=16)
    assert joined.input_ids.tolist() == [10, 11, 12, 13, EOS, 20, 21, 22, 23]
    # Neither the separator nor what opens the next document can be told from the one before.
    assert joined.labels.tolist() == [10, 11, 12, 13, -100, -100, 21, 22, 23]


def test_joining_keeps_to_the_length_and_to_one_holistic_task():
    rows = [
        document(10, 4), document(20, 4), document(30, 4),  # two fit into 9
        document(40, 4, "retrieval"), document(50, 4, "retrieval"),  # never joined
        document(60, 4, "mine"),
        document(70, 4),
    ]  # fmt: skip
    examples = ready(rows, join_short=True, max_length=9)
    assert [len(e) for e in examples] == [9, 4, 4, 4, 4, 4]
    assert [e.task for e in examples[1:]] == [
        "holistic", "retrieval", "retrieval", "mine", "holistic"
    ]  # fmt: skip


def test_rows_still_too_short_after_joining_are_refused():
    with pytest.raises(DataError, match="example 2: expected at least 8 tokens, got 4"):
        ready(
            [document(10, 4), document(20, 4), document(30, 4)],
            join_short=True, min_length=8, max_length=9,
        )  # fmt: skip


def test_joining_needs_a_length_to_fill():
    with pytest.raises(DataError, match="join_short"):
        ready([GOOD], join_short=True)
