"""Text that every Python installation has: the standard library's sources, and its help texts.

Two kinds. *code*: the modules at the top level of the standard library. *prose*: the help topics
of ``pydoc_data`` and, since those come to under 100,000 tokens, the longer docstrings of the same
modules. The text is that of the running Python, so figures measured on it name its version.

About a quarter of either is held out. A module is held out with its docstrings, by a hash of its
name; paragraphs that stand in several help texts or docstrings are kept in the first one only, so
no prose is in both splits.
"""

import ast
import hashlib
import sysconfig
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SPLITS = ("train", "heldout")
KINDS = ("code", "prose")
HELD_OUT_ONE_IN = 4
LEAST_CHARS = 2000  # shorter sources are mostly shims
LEAST_DOCSTRING = 200  # chars; shorter ones are hardly prose
REPEATED_FROM = 80  # chars from which on a paragraph that comes again is dropped


@dataclass(frozen=True)
class Source:
    """One text: a module, the docstrings of a module, or a help topic."""

    name: str
    text: str


@cache
def sources(kind: str, split: str) -> tuple[Source, ...]:
    """The texts of ``kind`` (``"code"`` or ``"prose"``) in ``split``, by name."""
    found = _modules() if kind == "code" else _prose()
    return tuple(source for source in found if split_of(source.name) == split)


def split_of(name: str) -> str:
    """``"train"`` or ``"heldout"``, from the name alone (the same on every machine)."""
    digest = hashlib.sha256(name.encode()).digest()
    return "heldout" if digest[0] % HELD_OUT_ONE_IN == 0 else "train"


@cache
def _modules() -> tuple[Source, ...]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    # _sysconfigdata…: generated when Python was built, different on every machine.
    read = [
        Source(file.stem, file.read_text(encoding="utf-8", errors="replace"))
        for file in files
        if not file.stem.startswith("_sysconfigdata")
    ]
    return tuple(source for source in read if len(source.text) >= LEAST_CHARS)


@cache
def _prose() -> tuple[Source, ...]:
    from pydoc_data.topics import topics

    # Longest first: long topics contain short ones whole ("compound" has "for", "if" and "with").
    texts = sorted(topics.items(), key=lambda item: (-len(item[1]), item[0]))
    texts = [(f"topic {name}", text) for name, text in texts]
    texts += [(module.name, _docstrings(module.text)) for module in _modules()]
    seen: set[str] = set()
    unique = [Source(name, _without_repeats(text, seen)) for name, text in texts]
    return tuple(sorted((s for s in unique if len(s.text) >= LEAST_CHARS), key=lambda s: s.name))


def _without_repeats(text: str, seen: set[str]) -> str:
    kept = []
    for paragraph in text.split("\n\n"):
        mark = " ".join(paragraph.split())
        if len(mark) >= REPEATED_FROM:
            if mark in seen:
                continue
            seen.add(mark)
        kept.append(paragraph)
    return "\n\n".join(kept)


def _docstrings(code: str) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in the library's own strings
        nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, documented)]
    found = (ast.get_docstring(node) or "" for node in nodes)
    return "\n\n".join(text for text in found if len(text) >= LEAST_DOCSTRING)
