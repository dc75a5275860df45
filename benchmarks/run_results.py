"""What a run's files say, by part and row."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_parts import Part

BAD = ("wrong", "failed", "skipped")  # what a row without a measurement has instead


def at_once(row: dict[str, Any]) -> int:
    """How many benchmarks ran on the machine while the row was measured, itself counted."""
    return row.get("at_once", 1)  # records of before it could be more have none


@dataclass(frozen=True)
class Results:
    """The files of an output folder, by the name of the part."""

    records: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, folder: Path, parts: Sequence[Part]) -> "Results":
        files = {part.name: folder / f"{part.name}.json" for part in parts}
        return cls({k: json.loads(f.read_text()) for k, f in files.items() if f.exists()})

    def row(self, part: str, name: str) -> dict[str, Any] | None:
        """A row that was measured, or None."""
        return next((row for row in self.rows_of(part) if row["name"] == name), None)

    def rows_of(self, part: str) -> list[dict[str, Any]]:
        """All measured rows of a part."""
        rows = self.records.get(part, {}).get("results", ())
        return [row for row in rows if not any(word in row for word in BAD)]

    def rows(self, script: str, shape: str) -> list[dict[str, Any]]:
        """All measured rows of a benchmark with a model of ``shape``."""
        return [
            row
            for part, record in self.records.items()
            if record["benchmark"] == script and record["settings"]["shape"] == shape
            for row in self.rows_of(part)
        ]

    def bad(self) -> list[tuple[str, str, str]]:
        """Part, row and reason of what gave no measurement."""
        return [
            (part, row["name"], f"{word}: {row[word]}".splitlines()[0])
            for part, record in self.records.items()
            for row in record["results"]
            for word in BAD
            if word in row
        ]

    def about(self) -> dict[str, dict[str, Any]]:
        """What each part ran on, beside how many others at most, and whether it is complete."""
        return {
            part: {
                "complete": record["complete"],
                "at_once": max(map(at_once, record["results"]), default=1),
                **record["environment"],
            }
            for part, record in self.records.items()
        }
