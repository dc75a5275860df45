"""Batches: padding, balance of tasks, similar lengths, one order on every process."""

from collections import Counter

import pytest
import torch

from fluxcompile.errors import DataError
from fluxcompile.training.batching import TaskBalancedSampler, TokenBudgetBatchSampler, collate
from fluxcompile.training.examples import Example
from fluxcompile.training.tasks import resolve_tasks

TASKS = ["retrieval"] * 12 + ["holistic"] * 5 + ["mine"] * 3
LENGTHS = [10 + 7 * i % 90 for i in range(len(TASKS))]


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


def test_lengths_can_be_rounded_up():
    batch = collate([example(3, "holistic", 0)], pad_token_id=0, pad_to_multiple_of=8)
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 8)


def test_task_ids_are_positions_among_the_known_tasks():
    tasks = resolve_tasks({"mine": 0.3})
    assert collate([example(3, "mine", 0)], 0, tasks)["task_id"].tolist() == [2]
    with pytest.raises(DataError, match=r"example 4: task: expected one of .*got 'mine'"):
        collate([example(3, "mine", 4)], 0)


@pytest.mark.parametrize("options", [{}, {"lengths": LENGTHS, "batch_size": 6, "pool": 4}])
def test_every_round_has_every_task_once(options):
    order = list(TaskBalancedSampler(TASKS, seed=1, **options))
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


def test_known_lengths_keep_padding_low_and_batches_whole():
    tasks = ["retrieval", "holistic"] * 251
    lengths = [1 + hash_like(i) % 1000 for i in range(len(tasks))]
    plain = list(TaskBalancedSampler(tasks))
    sorted_ = list(TaskBalancedSampler(tasks, lengths=lengths, batch_size=8))
    assert sorted(plain) == sorted(sorted_)
    cut = [[order[i : i + 8] for i in range(0, 502, 8)] for order in (plain, sorted_)]
    assert padding(cut[0], lengths) > 0.3
    assert padding(cut[1], lengths) < 0.1
    assert {len(batch) for batch in cut[1][:-1]} == {8}


def hash_like(i: int) -> int:
    return i * 7919 + (i * i) % 101


@pytest.mark.parametrize("multiple_of", [1, 4])
def test_batches_hold_a_budget_of_tokens(multiple_of):
    tasks = ["retrieval", "holistic"] * 200
    lengths = [20 + hash_like(i) % 900 for i in range(len(tasks))]
    sampler = TokenBudgetBatchSampler(
        tasks, lengths, max_tokens=4000, pool=64, multiple_of=multiple_of
    )
    batches = list(sampler)
    assert batches == list(sampler)
    assert len(sampler) == len(batches)
    assert len(batches) % multiple_of == 0
    assert max(len(b) * max(lengths[i] for i in b) for b in batches) <= 4000
    assert all(Counter(tasks[i] for i in b) == dict.fromkeys(tasks, len(b) // 2) for b in batches)
    assert padding(batches, lengths) < 0.15
    seen = [i for batch in batches for i in batch]
    assert len(seen) == len(set(seen))
    if multiple_of == 1:
        assert len(seen) == 400
    sampler.set_epoch(1)
    assert list(sampler) != batches


def test_a_budget_below_one_round_is_refused():
    with pytest.raises(DataError, match=r"max_tokens: expected at least 60.*got 59"):
        TokenBudgetBatchSampler(["a", "b"], [10, 30], max_tokens=59)


def test_too_few_batches_for_all_processes_are_refused():
    with pytest.raises(DataError, match="batches an epoch: expected >= 2, got 1"):
        list(TokenBudgetBatchSampler(["a", "b"], [10, 30], max_tokens=60, multiple_of=2))


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
