"""Reads the "Args:" and "Attributes:" sections that this project's docstrings have."""

from __future__ import annotations

import inspect
import re

_ENTRY = re.compile(r"^(\w+(?:, \w+)*): (.*)$")
_ROLE = re.compile(r":\w+:`~?(?:fluxcompile\.(?:\w+\.)*)?([^`]+)`")


def described(documented: object, section: str) -> dict[str, str]:
    """Name -> what the docstring says of it, as Markdown on one line.

    Args:
        documented: whatever has a docstring.
        section: "Args" or "Attributes".

    Raises:
        ValueError: there is no such section.
    """
    text = inspect.getdoc(documented) or ""
    found = re.search(rf"^{section}:\n((?:    .*\n|\n)+)", f"{text}\n", re.MULTILINE)
    if found is None:
        raise ValueError(f"{documented}: expected a section {section!r} in its docstring, got none")
    entries: dict[str, list[str]] = {}
    current: list[str] = []
    for line in inspect.cleandoc(found.group(1)).splitlines():
        entry = _ENTRY.match(line)
        if entry:
            current = [entry.group(2)]
            entries |= dict.fromkeys(entry.group(1).split(", "), current)
        elif line.strip():
            current.append(line.strip())
    return {name: markdown(" ".join(lines)) for name, lines in entries.items()}


def markdown(text: str) -> str:
    """A docstring's markup as Markdown that fits into a table."""
    return _ROLE.sub(r"`\1`", text).replace("``", "`").replace("|", "\\|")
