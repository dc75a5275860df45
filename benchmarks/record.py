"""The JSON file of one run: written after every row, and taken up again where it stopped."""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from common import environment, synchronise, undated, write_json

#: what has no influence on a row; `at_once` may have, and is said of each
ASIDE = ("json", "resume", "only", "at_once")


class Record:
    """Rows as they are measured, with what they were measured on.

    Rows have a ``name`` each; ``run`` is the time their process started, by which rows that were
    not measured in one go can be told apart, and ``at_once`` how many benchmarks, this one among
    them, may have been running on the machine.

    Args:
        path: where to write; None for nowhere.
        args: the script's arguments; ``args.resume`` keeps the rows of an earlier run of the same
            arguments, commit, device and versions.
        about: what else to say.
    """

    def __init__(
        self, benchmark: str, args: argparse.Namespace, about: dict[str, Any] | None = None
    ) -> None:
        self.path: Path | None = args.json
        self.at_once: int = args.at_once
        self.run = datetime.now(UTC).isoformat(timespec="seconds")
        where = environment(args.device)
        self.content: dict[str, Any] = {
            "benchmark": benchmark,
            "complete": False,
            "environment": where,
            "settings": settings_of(args),
            **(about or {}),
            "results": [],
        }
        if args.resume and self.path is not None and self.path.exists():
            earlier = json.loads(self.path.read_text())
            if _same(earlier, self.content):
                self.content["results"] = [x for x in earlier["results"] if not _again(x)]
                print(f"taking up {self.path}: {len(self.rows)} rows are there", flush=True)
        for key, value in where.items():
            print(f"{key:>12}: {value}", flush=True)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["results"]

    def has(self, name: str) -> bool:
        return any(row["name"] == name for row in self.rows)

    def say(self, **about: Any) -> None:
        self.content.update(about)

    def add(self, row: dict[str, Any]) -> None:
        """Keep ``row``, in the file too, before the next one is measured.

        Raises:
            SystemExit: the row says that the device is lost (see `failure`).
        """
        self.rows.append({**row, "run": self.run, "at_once": self.at_once})
        write_json(self.path, self.content)
        if row.get("lost"):
            raise SystemExit(f"{row['name']}: {row['failed']}\nNothing more runs on the device in "
                             "this process; --resume goes on with the next row.")  # fmt: skip

    def finish(self) -> list[str]:
        """Say in the file that nothing is missing; returns the rows that were found wrong."""
        self.content["complete"] = True
        write_json(self.path, self.content)
        return [row["name"] for row in self.rows if row.get("wrong")]


def failure(problem: Exception, device: str) -> dict[str, Any]:
    """What a row has instead of a measurement; ``lost`` if nothing runs on the device any more.

    After an illegal access every later call fails too, until the process ends. Tried again, the row
    would end each process before the rows that follow; so it is not.
    """
    found: dict[str, Any] = {"failed": f"{type(problem).__name__}: {problem}"[:500]}
    try:
        synchronise(device)
    except RuntimeError:
        found["lost"] = True
    return found


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that have an influence on rows, as JSON keeps them."""
    kept = {name: value for name, value in vars(args).items() if name not in ASIDE}
    return json.loads(json.dumps(kept, default=str))


def _again(row: dict[str, Any]) -> bool:
    """Whether a row of an earlier run is measured again."""
    return "failed" in row and not row.get("lost")


def _same(earlier: dict[str, Any], now: dict[str, Any]) -> bool:
    there, here = (undated(x["environment"]) for x in (earlier, now))
    return there == here and earlier["settings"] == now["settings"]


def add_common(parser: argparse.ArgumentParser, tiny: str) -> None:
    """What every script takes that measures; ``tiny`` says what a run to try it is of."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help=f"{tiny}, to try the script")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument(
        "--at-once", type=int, default=1, metavar="N",
        help="for the record: so many benchmarks run on this machine, on a GPU each",
    )  # fmt: skip


def parse_with_common(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> argparse.Namespace:
    """Parse what ``parser`` knows, ``--shape`` among it, and what all scripts with a record take.

    These are ``--device``, ``--tiny``, ``--lowering``, ``--only``, ``--json``, ``--resume`` and
    ``--at-once``.
    """
    add_common(parser, tiny="a toy model")
    parser.add_argument("--lowering", default="inductor", help="of flux")
    parser.add_argument("--only", metavar="REGEX", help="only rows whose name this is found in")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that --json has, if they are of this"
    )
    args = parser.parse_args(arguments)
    args.shape = "tiny" if args.tiny else args.shape
    return args


def dtype_on(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32
