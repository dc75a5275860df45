"""Batches: every task equally often, rows of similar length together.

Both samplers draw one global order that depends on nothing but ``(seed, epoch)``: every process
computes the same one, and accelerate deals its batches out. An epoch goes through the largest task
once; smaller tasks are drawn again (reshuffled) until it is through.
"""

import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.data import Sampler

from fluxcompile.errors import DataError
from fluxcompile.training.encoding import IGNORED
from fluxcompile.training.examples import Example
from fluxcompile.training.tasks import BUILT_IN, Task


def collate(
    examples: Sequence[Example],
    pad_token_id: int,
    tasks: Mapping[str, Task] = BUILT_IN,
    pad_to_multiple_of: int = 1,
) -> dict[str, torch.Tensor]:
    """Pad rows on the right and stack them.

    Args:
        examples: B rows.
        pad_token_id: fills ``input_ids``; any id will do, no loss and no attention reaches it.
        tasks: known tasks; a row's ``task_id`` is its task's position among them.
        pad_to_multiple_of: round S up, so that fewer shapes are compiled.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` [B, S], ``task_id``, ``index`` and
        ``prompt_length`` [B]; all int64.
    """
    longest = max(len(example) for example in examples)
    shape = (len(examples), -(-longest // pad_to_multiple_of) * pad_to_multiple_of)
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED),
    }
    for i_row, example in enumerate(examples):
        n = len(example)
        batch["input_ids"][i_row, :n] = torch.as_tensor(example.input_ids)
        batch["attention_mask"][i_row, :n] = 1
        batch["labels"][i_row, :n] = torch.as_tensor(example.labels)
    batch["task_id"] = torch.tensor([_position(example, tasks) for example in examples])
    batch["index"] = torch.tensor([example.index for example in examples])
    batch["prompt_length"] = torch.tensor([example.prompt_length for example in examples])
    return batch


def _position(example: Example, tasks: Mapping[str, Task]) -> int:
    try:
        return list(tasks).index(example.task)
    except ValueError:
        raise DataError.mismatch(
            f"example {example.index}: task", f"one of {list(tasks)}", repr(example.task)
        ) from None


class TaskBalancedSampler(Sampler[int]):
    """Positions in which any ``n_tasks`` in a row, from a multiple of it on, hold every task once.

    So a batch of ``k * n_tasks`` rows has ``k`` of each task, and so has the union of the batches
    that several processes, or several accumulation steps, take for one optimiser step.

    Args:
        tasks_of_examples: the task of every example, by position.
        seed: with the epoch, decides the whole order.
        lengths: tokens of every example. If given, rows of similar length share a batch: within
            a pool every task's rows are sorted by length, so that the k-th shortest of all tasks
            meet, and neighbours there make a batch. The batches come in random order.
        batch_size: rows that are padded to one length.
        pool: rounds (one row of each task) that are sorted together: the larger, the less padding
            and the less randomness.
    """

    def __init__(
        self,
        tasks_of_examples: Sequence[str],
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
        pool: int = 256,
    ) -> None:
        if not len(tasks_of_examples):
            raise DataError.mismatch("sampler", "at least one example", "none")
        self.seed = seed
        self.epoch = 0
        self.positions: dict[str, list[int]] = {}
        for i_example, task in enumerate(tasks_of_examples):
            self.positions.setdefault(task, []).append(i_example)
        self.lengths = lengths
        self.rounds_a_batch = max(batch_size // len(self.positions), 1)
        # Only the epoch's last batch may be short, or all after it would be out of step.
        self.pool = -(-pool // self.rounds_a_batch) * self.rounds_a_batch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def rounds(self) -> int:
        """Times that every task appears in an epoch: the size of the largest."""
        return max(map(len, self.positions.values()))

    def __len__(self) -> int:
        return self.rounds * len(self.positions)

    def __iter__(self) -> Iterator[int]:
        rng = self.rng()
        batches = [
            pool[start : start + self.rounds_a_batch]
            for pool in self.pools(rng)
            for start in range(0, len(pool), self.rounds_a_batch)
        ]
        whole = len(batches) - (len(batches[-1]) < self.rounds_a_batch)
        for batch in rng.sample(batches[:whole], whole) + batches[whole:]:
            for row in batch:
                # Shuffled, lest one of two processes get the same task every time.
                yield from rng.sample(row, len(row))

    def rng(self) -> random.Random:
        return random.Random(f"{self.seed}/{self.epoch}")

    def pools(self, rng: random.Random) -> Iterator[list[tuple[int, ...]]]:
        """The epoch's rounds, one pool after another; in a pool by length, if that is known."""
        columns = [self._draws(task, rng) for task in sorted(self.positions)]
        for start in range(0, self.rounds, self.pool):
            pool = [column[start : start + self.pool] for column in columns]
            if self.lengths is not None:
                pool = [sorted(column, key=self.lengths.__getitem__) for column in pool]
            yield list(zip(*pool, strict=True))

    def _draws(self, task: str, rng: random.Random) -> list[int]:
        """The task's examples in random order, over and over until there are `rounds`."""
        drawn: list[int] = []
        while len(drawn) < self.rounds:
            drawn += rng.sample(self.positions[task], len(self.positions[task]))
        return drawn[: self.rounds]


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Task-balanced batches of similar lengths, of ``max_tokens`` tokens at most with padding.

    The rounds of a pool (see `TaskBalancedSampler`) fill a batch one after another, whole.

    With several processes pass ``even_batches=False`` to accelerate (a batch has no fixed size),
    and ``multiple_of`` the number of processes, so that all of them get the same number.

    Args:
        tasks_of_examples: the task of every example, by position.
        lengths: tokens of every example.
        max_tokens: rows × longest row of a batch, at most.
        seed: with the epoch, decides the whole order.
        pool: rounds that are sorted together.
        multiple_of: batches an epoch is cut to a multiple of.

    Raises:
        DataError: ``max_tokens`` does not hold the longest row once for every task, or an epoch
            has fewer than ``multiple_of`` batches.
    """

    def __init__(
        self,
        tasks_of_examples: Sequence[str],
        lengths: Sequence[int],
        max_tokens: int,
        seed: int = 0,
        pool: int = 256,
        multiple_of: int = 1,
    ) -> None:
        self.sampler = TaskBalancedSampler(tasks_of_examples, seed, lengths, pool=pool)
        self.lengths = lengths
        self.max_tokens = max_tokens
        self.multiple_of = multiple_of
        least = len(self.sampler.positions) * max(lengths)
        if max_tokens < least:
            raise DataError.mismatch(
                "max_tokens", f"at least {least}: the longest row once for every task", max_tokens
            )

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def _batches(self) -> list[list[int]]:
        rng = self.sampler.rng()
        batches = [batch for pool in self.sampler.pools(rng) for batch in self._filled(pool)]
        kept = len(batches) // self.multiple_of * self.multiple_of
        if not kept:
            raise DataError.mismatch("batches an epoch", f">= {self.multiple_of}", len(batches))
        return rng.sample(batches, kept)

    def _filled(self, rounds: list[tuple[int, ...]]) -> Iterator[list[int]]:
        batch: list[int] = []
        for row in rounds:
            # The rounds come by length: the longest row of the batch is in its last round.
            longest = max(self.lengths[i] for i in row)
            if batch and longest * (len(batch) + len(row)) > self.max_tokens:
                yield batch
                batch = []
            batch.extend(row)
        yield batch
