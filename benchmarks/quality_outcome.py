"""What a job found, and its form in files and between processes."""

import io
from dataclasses import dataclass
from typing import Self

import torch

from fluxcompile.evaluation import Cell, CellResult, Results
from fluxcompile.evaluation.compare import omega


@dataclass(frozen=True)
class Outcome:
    """What a job found.

    Attributes:
        seconds: it took, compiling included.
        results: of a contender, by cell.
        through: ``"user"`` or ``"graph"``, of a contender.
        apart: how far two compiles of full attention were apart, where that was looked at.
        order: of layers, of a search.
    """

    seconds: float
    results: Results | None = None
    through: str = ""
    apart: float | None = None
    order: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.results is None:
            return f"an order of {len(self.order)} layers in {self.seconds:.0f} s"
        prompts = sum(len(result.loss) for result in self.results.values())
        return f"Ω {omega(self.results):.2f}, {prompts} prompts in {self.seconds:.0f} s"

    def to_bytes(self) -> bytes:
        """Numbers, words and tensors only: to read it is safe."""
        plain = {**vars(self), "order": list(self.order)}
        if self.results is not None:
            plain["results"] = [
                [*cell, result.loss, result.exact, result.full]
                for cell, result in self.results.items()
            ]
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What :meth:`to_bytes` wrote."""
        plain = torch.load(io.BytesIO(data), weights_only=True)
        plain["order"] = tuple(plain["order"])
        if plain["results"] is not None:
            plain["results"] = {
                Cell(task, length): CellResult(Cell(task, length), *columns)
                for task, length, *columns in plain["results"]
            }
        return cls(**plain)
