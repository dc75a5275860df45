"""The order of the examples over a whole run, and within a step."""

from collections.abc import Iterator, Sequence
from itertools import islice

from torch.utils.data import Sampler


class RunSampler(Sampler[int]):
    """Epoch after epoch of another sampler, as one order of a given length.

    A run counts steps, not epochs. One order for all of it keeps every step's batch whole, where
    an epoch's end would cut it short, and lets a resumed run skip to its place. It is the same on
    every process; accelerate deals the batches out.

    Args:
        epochs: has ``set_epoch``; its order depends on nothing but its seed and that epoch.
        length: examples of the run: steps × batch size.
    """

    def __init__(self, epochs: Sampler[int], length: int) -> None:
        self.epochs = epochs
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return islice(self._endless(), self.length)

    def _endless(self) -> Iterator[int]:
        epoch = 0
        while True:
            self.epochs.set_epoch(epoch)
            yield from self.epochs
            epoch += 1


class ByLengthInStep(Sampler[int]):
    """The same steps, each with its examples sorted by length.

    What is padded to one length is then of similar length, and processes that take turns get about
    the same work. Which examples a step has does not change, nor therefore what it learns: not with
    the rows run at once, nor with the number of processes, nor when the run is resumed. Examples of
    one length keep their order.

    Args:
        run: the order of the whole run.
        step_size: examples of an optimiser step, over all processes.
        lengths: tokens of every example, by position.
    """

    def __init__(self, run: Sampler[int], step_size: int, lengths: Sequence[int]) -> None:
        self.run = run
        self.step_size = step_size
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.run)

    def __iter__(self) -> Iterator[int]:
        order = iter(self.run)
        while step := list(islice(order, self.step_size)):
            yield from sorted(step, key=self.lengths.__getitem__)
