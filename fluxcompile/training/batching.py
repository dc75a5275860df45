"""Batches: rows padded to one length, and an order that has every task equally often."""

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
) -> dict[str, torch.Tensor]:
    """Pad rows on the right and stack them.

    Args:
        examples: B rows.
        pad_token_id: fills ``input_ids``; any id will do, no loss and no attention reaches it.
        tasks: known tasks; a row's ``task_id`` is its task's position among them.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` [B, S], ``task_id``, ``index`` and
        ``prompt_length`` [B]; all int64.
    """
    shape = (len(examples), max(len(example) for example in examples))
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

    So the examples of an optimiser step, over all processes and accumulation steps, have every
    task equally often. The order depends on nothing but ``(seed, epoch)``: every process computes
    the same one, and accelerate deals its batches out. An epoch goes through the largest task
    once; smaller tasks are drawn again (reshuffled) until it is through.

    Args:
        tasks_of_examples: the task of every example, by position.
        seed: with the epoch, decides the whole order.
    """

    def __init__(self, tasks_of_examples: Sequence[str], seed: int = 0) -> None:
        if not len(tasks_of_examples):
            raise DataError.mismatch("sampler", "at least one example", "none")
        self.seed = seed
        self.epoch = 0
        self.positions: dict[str, list[int]] = {}
        for i_example, task in enumerate(tasks_of_examples):
            self.positions.setdefault(task, []).append(i_example)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def rounds(self) -> int:
        """Times that every task appears in an epoch: the size of the largest."""
        return max(map(len, self.positions.values()))

    def __len__(self) -> int:
        return self.rounds * len(self.positions)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        columns = [self._draws(task, rng) for task in sorted(self.positions)]
        rounds = list(zip(*columns, strict=True))
        for row in rng.sample(rounds, len(rounds)):
            # Shuffled, lest one of two processes get the same task every time.
            yield from rng.sample(row, len(row))

    def _draws(self, task: str, rng: random.Random) -> list[int]:
        """The task's examples in random order, over and over until there are `rounds`."""
        drawn: list[int] = []
        while len(drawn) < self.rounds:
            drawn += rng.sample(self.positions[task], len(self.positions[task]))
        return drawn[: self.rounds]
