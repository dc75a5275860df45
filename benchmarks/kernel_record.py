"""What the kernel table's JSON file holds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Record:
    """Times in seconds, rates a second.

    Attributes:
        environment: where, when and of what commit; see `common.environment`.
        kernels: what was asked for, by the names of `measured_kernels.MEASURED`.
        matmul_ceiling_flops, copy_ceiling_bytes: what floors are computed from; of several
            processes the median, while each has floors of its own.
        rows: a `Measurement` and the shape each.
        failures: what there are no rows of, and why.
        complete: all was measured, or is among the failures.
        at_once: so many processes measured on this machine, on a GPU each.
        processes: of several, each one's shape, date and ceilings.
    """

    environment: dict[str, Any]
    dtype: str
    heads: int
    kv_heads: int
    kernels: list[str]
    matmul_ceiling_flops: float | None = None
    copy_ceiling_bytes: float | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    complete: bool = False
    at_once: int = 1
    processes: list[dict[str, Any]] = field(default_factory=list)


def merge(into: Record, found: Sequence[tuple[str, Record]]) -> None:
    """Take over rows, failures and ceilings of processes, given by the names of their shapes."""
    ceilings = ("matmul_ceiling_flops", "copy_ceiling_bytes")
    into.rows = [row for _, record in found for row in record.rows]
    into.failures = [text for _, record in found for text in record.failures]
    into.processes = [
        {"shape": name, "date": record.environment["date"], "at_once": record.at_once,
         **{ceiling: getattr(record, ceiling) for ceiling in ceilings}}
        for name, record in found
    ]  # fmt: skip
    for ceiling in ceilings:
        measured = [getattr(record, ceiling) for _, record in found]
        measured = [value for value in measured if value is not None]
        setattr(into, ceiling, statistics.median(measured) if measured else None)
