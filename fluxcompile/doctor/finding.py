"""One line of the doctor's report."""

from dataclasses import asdict, dataclass
from enum import StrEnum


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What was looked at and what was found.

    Attributes:
        name: what was looked at.
        status: "warn" works, but not as well as it could; "fail" does not work.
        found: what was found, in words.
        advice: what to do; empty where all is well.
    """

    name: str
    status: Status
    found: str
    advice: str = ""

    def __post_init__(self) -> None:
        if (self.status is Status.OK) == bool(self.advice):
            raise ValueError(
                f"{self.name}: expected advice with warn and fail only, got {self.status.value} "
                f"and {self.advice!r}"
            )

    def to_dict(self) -> dict[str, str]:
        return asdict(self) | {"status": self.status.value}


def ok(name: str, found: str) -> Finding:
    return Finding(name, Status.OK, found)


def warn(name: str, found: str, advice: str) -> Finding:
    return Finding(name, Status.WARN, found, advice)


def fail(name: str, found: str, advice: str) -> Finding:
    return Finding(name, Status.FAIL, found, advice)
