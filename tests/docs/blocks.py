"""Fenced blocks of a page of docs/."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs"
_FENCE = re.compile(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file it is said to be of, and its text."""

    language: str
    title: str | None
    text: str
    line: int


def blocks_of(page: str) -> list[Block]:
    """All fenced blocks of ``docs/<page>``, in order."""
    text = (FOLDER / page).read_text()
    found = [
        Block(m.group(1), m.group(2), m.group(3), text[: m.start(3)].count("\n") + 1)
        for m in _FENCE.finditer(text)
    ]
    assert 2 * len(found) == sum(line.startswith("```") for line in text.splitlines()), (
        f"{page}: a fenced block without a language, or one that is not closed"
    )
    return found


def run_python(page: str, blocks: list[Block], namespace: dict) -> None:
    """Run blocks one after the other in one namespace; errors name the page's lines."""
    for block in blocks:
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(FOLDER / page), "exec"), namespace)
