"""The order of the examples over a whole run."""

from collections.abc import Iterator
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
