"""A file of recipes, and the runs that it asks for."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxcompile.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """How to train a router.

    Attributes:
        name: also of the folders of its runs, with the seed.
        why: one sentence.
        arguments: all that ``fluxcompile train`` is given, but for seed and output.
    """

    name: str
    why: str
    arguments: tuple[str, ...]


def read_recipes(file: Path, only: Sequence[str] | None = None) -> list[Recipe]:
    """The recipes in ``file``, a JSON object.

    ``common`` are arguments of ``fluxcompile train``, its model first. ``recipes`` has one object a
    name: ``why``, the ``arguments`` that follow the common ones (of an option that is given twice
    the later value counts), and perhaps ``like``: an earlier recipe whose arguments come before.

    Args:
        file: to read.
        only: names of the recipes wanted, all by default. The order is the file's.

    Raises:
        ConfigError: the file is not so, or has no recipe of such a name.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        common, entries = _texts(content["common"]), dict(content["recipes"])
        own: dict[str, tuple[str, ...]] = {}
        found = []
        for name, entry in entries.items():
            first = own[entry["like"]] if "like" in entry else ()
            own[name] = first + _texts(entry["arguments"])
            found.append(Recipe(name, entry["why"], common + own[name]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = 'a JSON object of "common" and "recipes"'
        raise ConfigError.mismatch(str(file), expected, repr(error)) from error
    if unknown := sorted(set(only or ()) - own.keys()):
        raise ConfigError.mismatch("--only", f"some of {list(own)}", unknown)
    return [recipe for recipe in found if not only or recipe.name in only]


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"arguments must be a list of strings, got {value!r}")
    return tuple(value)
