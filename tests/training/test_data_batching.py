"""Batches: padding, balance of tasks, similar lengths, one order on every process."""

from collections import Counter

import pytest
import torch

from fluxcompile.errors import DataError
from fluxcompile.training.batching import TaskBalancedSampler, collate
from fluxcompile.training.examples import Example
from fluxcompile.training.sampling import ByLengthInStep, RunSampler
from fluxcompile.training.tasks import resolve_tasks

TASKS = ["retrieval"] * 12 + ["holistic"] * 5 + ["mine"] * 3


def example(n: int, task: str, index: int) -> Example:
    ids = torch.arange(1, n + 1)
    return Example(ids, torch.where(ids > 1, ids, -100), task, index)


def test_rows_are_padded_on_the_right():
    batch = collate([example(3, "holistic", 7), example(5, "retrieval", 2)], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100], [-100, 2, 3, 4, 5]]
    assert batch["task_id"].tolist() == [1, 0]
    assert batch["index"].tolist() == [7, 2]
    assert batch["prompt_length"].tolist() == [3, 5]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_task_ids_are_positions_among_the_known_tasks():
    tasks = resolve_tasks({"mine": 0.3})
    assert collate([example(3, "mine", 0)], 0, tasks)["task_id"].tolist() == [2]
    with pytest.raises(DataError, match=r"example 4: task: expected one of .*got 'mine'"):
        collate([example(3, "mine", 4)], 0)


def test_every_round_has_every_task_once():
    order = list(TaskBalancedSampler(TASKS, seed=1))
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert [sorted(TASKS[i] for i in row) for row in rounds] == [
        ["holistic", "mine", "retrieval"]
    ] * 12
    # The largest task is gone through once, the others as evenly as can be.
    seen = Counter(order)
    assert {seen[i] for i in range(12)} == {1}
    assert {seen[i] for i in range(12, 17)} == {2, 3}
    assert {seen[i] for i in range(17, 20)} == {4}
    assert len(TaskBalancedSampler(TASKS)) == len(order) == 36


def test_no_task_has_a_fixed_place_in_the_round():
    order = list(TaskBalancedSampler(TASKS, seed=1))
    assert len({TASKS[i] for i in order[::3]}) == 3


def test_the_order_depends_on_seed_and_epoch_alone():
    sampler, other = TaskBalancedSampler(TASKS, seed=1), TaskBalancedSampler(TASKS, seed=1)
    first = list(sampler)
    assert first == list(sampler) == list(other)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(TaskBalancedSampler(TASKS, seed=2)) != first


def test_a_single_task_is_a_shuffle():
    assert sorted(TaskBalancedSampler(["holistic"] * 9)) == list(range(9))


def test_no_examples_no_sampler():
    with pytest.raises(DataError, match="at least one example"):
        TaskBalancedSampler([])


def padding(batches: list[list[int]], lengths: list[int]) -> float:
    real = sum(lengths[i] for batch in batches for i in batch)
    return 1 - real / sum(len(b) * max(lengths[i] for i in b) for b in batches)


def chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def test_steps_keep_their_examples_and_pad_little():
    tasks = ["retrieval", "holistic"] * 60
    lengths = [(1000, 2000, 4000)[i * 7919 % 3] for i in range(len(tasks))]
    run = RunSampler(TaskBalancedSampler(tasks, seed=5), 30 * 24)  # goes through all six times
    sampler = ByLengthInStep(run, 24, lengths)
    plain, ordered = list(run), list(sampler)
    assert ordered == list(sampler)
    assert len(sampler) == len(ordered) == 30 * 24
    for before, after in zip(chunks(plain, 24), chunks(ordered, 24), strict=True):
        assert sorted(before) == sorted(after)
        assert [lengths[i] for i in after] == sorted(lengths[i] for i in after)
        assert Counter(tasks[i] for i in after) == {"retrieval": 12, "holistic": 12}
    assert padding(chunks(plain, 4), lengths) > 0.3
    assert padding(chunks(ordered, 4), lengths) < 0.1


def test_examples_of_one_length_keep_their_order():
    run = RunSampler(TaskBalancedSampler(TASKS), 40)
    assert list(ByLengthInStep(run, 7, [9] * len(TASKS))) == list(run)


@pytest.mark.parametrize("n_processes", [2, 3])
def test_accelerate_deals_the_order_out(n_processes):
    data_loader = pytest.importorskip("accelerate.data_loader")
    sampler = TaskBalancedSampler(["retrieval", "holistic"] * 12, seed=3)
    whole = torch.utils.data.BatchSampler(sampler, batch_size=2, drop_last=False)
    shards = [
        list(data_loader.BatchSamplerShard(whole, n_processes, rank)) for rank in range(n_processes)
    ]
    dealt = [batch for step in zip(*shards, strict=True) for batch in step]
    assert dealt == list(whole)
